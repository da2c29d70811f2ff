"""`sleuth replay`: a recorded trajectory again, but that another retriever answers one of its queries."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.engines.config import EngineConfig
from data.errors import ConfigError, require, require_range
from data.jsonl import check_is_file, read_json, read_jsonl
from data.metrics.answers import exact_match
from rl.config import ProtocolConfig
from scripts.console import stdout_console, visible

if TYPE_CHECKING:
    from agent.protocol import Protocol
    from agent.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplayConfig:
    """Replay a recorded trajectory with another retriever."""

    trajectory: Path
    """Folder of an evaluation, or its trajectories.jsonl."""
    retriever: str
    """The other one: URL of a server, folder of an index or a .yaml file; none finds nothing."""
    turn: int = 0
    """Turn whose query it is asked, from 0, as in the searches on record."""
    id: str | None = None
    """Id of the trajectory, where the file holds several."""
    policy: str | None = None
    """Folder, hub name, or one that comes with Sleuth; none: that of the evaluation."""
    samples: int = 1
    """Continuations of either side; several need a temperature."""
    temperature: float | None = None
    """Temperature of sampling; none: 0 (greedy) for one sample, else 1."""
    seed: int = 0
    """Seed of sampling."""
    out: Path | None = None
    """Folder for both, as evaluations, and a report of them side by side."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    deadline_seconds: float = 60.0
    """Seconds for which a search is retried."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 on cuda, else float32."""

    def __post_init__(self) -> None:
        require_range(self, "", ">= 1", "samples")
        many = self.samples > 1 and not self.heat
        require(not many, "temperature", self.temperature, f"> 0 for {self.samples} samples")

    @property
    def heat(self) -> float:
        """The temperature of sampling."""
        return float(self.samples > 1) if self.temperature is None else self.temperature


def main(config: ReplayConfig) -> None:
    """Show what would have happened had another retriever answered the query of a turn, and all later ones.

    The tokens before are those on record: `sleuth evaluate --keep_tokens` keeps them. With several samples
    the shares of right answers after the passages on record and after the other's are compared.
    """
    from agent.evaluation.evaluate import check_folder
    from agent.replay import replay, resample, until
    from scripts.wiring import fingerprint, open_agent

    recorded, settings = read_trajectory(config.trajectory, config.id)
    until(recorded, config.turn, observed=config.heat > 0)
    for side in ("original", "replay") if config.out else ():
        check_folder(Path(config.out or "") / side)
    policy = config.policy or _policy_of(settings, config.trajectory)
    sampling = config.heat, config.samples, config.device, config.dtype, config.deadline_seconds
    protocol = _protocol_of(settings, config.protocol)
    opened = open_agent(policy, config.retriever, protocol, *sampling, engine=config.engine)
    if settings.get("weights") not in (None, fingerprint(opened.policy.model)):
        logger.warning("%s is not the policy that wrote the trajectory: its weights are others", policy)
    given = opened.agent, recorded, config.turn, config.samples, config.seed

    async def both() -> tuple[list[Trajectory], list[Trajectory]]:
        async with opened:
            await opened.check()
            return await resample(*given) if config.heat else [recorded], await replay(*given)

    before, after = asyncio.run(both())
    _show(before, after, config, opened.agent.spoken)
    if config.out:
        print(_write(config.out, before, after, config, {"policy": policy, **opened.settings()}))


def read_trajectory(path: Path, id_: str | None) -> tuple[Trajectory, dict[str, Any]]:
    """The trajectory of that id, and the settings of its evaluation where they lie beside it."""
    from agent.transcripts import from_record, trajectory_file

    file = trajectory_file(path)
    check_is_file(file)
    records = [record for record in read_jsonl(file) if id_ in (None, record.get("id"))]
    if len(records) != 1:
        some = ", ".join(str(record.get("id")) for record in records[:3])
        wrong = f"{len(records)} trajectories, name one: {some}, ..." if records else "no such trajectory"
        raise ConfigError(f"id = {id_!r}: {file} holds {wrong}")
    beside = file.parent / "evaluation.json"
    return from_record(records[0]), read_json(beside) if beside.exists() else {}


def _policy_of(settings: dict[str, Any], trajectory: Path) -> str:
    """The policy of the evaluation, whose path begins where that was started."""
    if "policy" not in settings:
        raise ConfigError(f"policy: {trajectory} does not say which: name it by --policy")
    there = Path(settings.get("folder", "")) / settings["policy"]
    return str(there) if there.exists() else settings["policy"]


def _protocol_of(settings: dict[str, Any], asked: ProtocolConfig) -> ProtocolConfig:
    known = settings.get("protocol", {})
    changed = {key: value for key, value in asdict(asked).items() if value is not None}
    own = {each.name: known[each.name] for each in fields(asked) if each.name in known}
    return replace(asked, **own | changed)


def _show(
    before: list[Trajectory], after: list[Trajectory], config: ReplayConfig, protocol: Protocol
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    console = stdout_console(160, highlight=False)
    question, turn, other = before[0].question, config.turn, f"with {config.retriever}"
    console.print(Text(visible(f"{question.text}  (gold: {' | '.join(question.gold_answers)})")))
    for at in range(turn + 1):
        for line in _told(before[0], at, protocol, passages=at < turn):
            console.print(Text(visible(line)))
    table = Table(box=SIMPLE_HEAD, show_edge=False, expand=True)
    for title in ("on record", other):
        table.add_column(Text(visible(title)), ratio=1)
    sides = [_rest(side[0], turn, protocol) for side in (before, after)]
    for lines in zip_longest(*sides, fillvalue=""):
        table.add_row(*(Text(visible(line)) for line in lines))
    console.print(table)
    if len(before) > 1:
        shares = [sum(map(_right, side)) / len(side) for side in (before, after)]
        said = f"on record {shares[0]:.3f}, {other} {shares[1]:.3f}"
        console.print(Text(visible(f"EM of {len(before)} continuations: {said}")))


def _rest(trajectory: Trajectory, turn: int, protocol: Protocol) -> list[str]:
    """Describe in lines what a turn found and all that followed."""
    turns = sum(segment.kind == "policy" for segment in trajectory.segments)
    lines = [line for at in range(turn, turns) for line in _told(trajectory, at, protocol, words=at > turn)]
    return [*lines, f"{'':>8}  {'right' if _right(trajectory) else f'wrong ({trajectory.stop_reason})'}"]


def _right(trajectory: Trajectory) -> bool:
    asked = trajectory.question
    return exact_match(trajectory.answer, asked.gold_answers, asked.normalizer) > 0


def _told(
    trajectory: Trajectory, turn: int, protocol: Protocol, words: bool = True, passages: bool = True
) -> list[str]:
    """A turn in lines: the parts of what the policy wrote, and the passages that it found."""
    from scripts.ask import preview

    written = [segment.text for segment in trajectory.segments if segment.kind == "policy"][turn]
    lines = [f"{label:>8}  {text}" for label, text in protocol.split_turn(written)] if words else []
    for search in trajectory.searches if passages else ():
        if search.turn == turn:
            lines += [f"{'found':>8}  {preview(hit)}" for hit in search.hits] or [f"{'found':>8}  nothing"]
    return lines


def _write(
    out: Path,
    before: list[Trajectory],
    after: list[Trajectory],
    config: ReplayConfig,
    settings: dict[str, Any],
) -> Path:
    from agent.evaluation.evaluate import evaluate
    from agent.evaluation.report.page import write_report

    settings |= {"trajectory": str(config.trajectory), "turn": config.turn, "seed": config.seed}
    for name, side, asked in (("original", before, "on record"), ("replay", after, config.retriever)):

        async def told(todo, on_finished, side=side) -> None:
            for trajectory in side:
                if trajectory.question in todo:
                    on_finished(trajectory)

        questions = [trajectory.question for trajectory in side]
        found = {**settings, "retriever": asked}
        asyncio.run(evaluate(questions, told, out / name, found, max_failed_share=1.0, tokens=True))
    return write_report(out)
