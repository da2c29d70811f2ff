"""An evaluation that is killed (kill -9) and started again, against one that is left alone.

    python -m scripts.bench.killed --questions 20000 --out runs/killed

The embedded world's questions, under new ids where they are too few; a retriever server over HTTP; the hf
engine, greedy. Prints a table of the starts, and which records differ in more than the time they took.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from data.errors import EngineError
from data.jsonl import read_jsonl, write_jsonl
from data.machine.managed_process import ManagedProcess
from data.text import markdown_table
from scripts.quickstart import build_world, serve

COLUMNS = ("start", "ended by", "records", "seconds", "MB at the first record", "halfway", "at most")


def main(out: Path, questions: int = 20_000, kills: int = 2, policy: str = "atlas") -> None:
    """Evaluate questions in one go and in parts, and compare the records.

    Args:
        out: Folder; what is in it already is not asked again.
        questions: How many.
        kills: How often the second evaluation is killed, at places of equal distance.
        policy: Policy that answers.
    """
    print(markdown_table(COLUMNS, measure(out, questions, kills, policy)))
    differ = differing(out / "whole", out / "parts")
    print(f"{questions} questions, {len(differ)} records differ: {', '.join(differ[:10]) or 'none'}")


def measure(out: Path, questions: int, kills: int, policy: str) -> list[tuple[str, ...]]:
    """Evaluate in OUT/whole and, with kills, in OUT/parts; a row for each start."""
    build_world(out / "world")
    write_jsonl(out / "questions.jsonl", islice(_questions(out / "world"), questions))
    stops = [questions * place // (kills + 1) for place in range(1, kills + 1)]
    rows = []
    with serve(out / "world" / "index", out) as url:
        for name, stop in (("whole", None), *(("parts", stop) for stop in (*stops, None))):
            given = {"policy": policy, "questions": out / "questions.jsonl", "retriever": url}
            given |= {"protocol.max_turns": 1}  # the longest trajectory decides how much a step reads
            options = [f"--{key}={value}" for key, value in (given | {"out": out / name}).items()]
            rows.append(
                (name, *start([sys.executable, "-m", "scripts", "evaluate", *options], out / name, stop))
            )
    return rows


def _questions(world: Path) -> Iterator[dict[str, Any]]:
    """The questions of all splits, again and again."""
    rows = [row for split in ("test", "dev", "train") for row in read_jsonl(world / f"{split}.jsonl")]
    for number, row in enumerate(cycle(rows)):
        yield {**row, "id": f"{row['id']}/{number // len(rows)}"}


def start(command: list[str], folder: Path, stop: int | None) -> tuple[str, ...]:
    """Start an evaluation, and kill it once `stop` questions are recorded; the row of COLUMNS."""
    path, sizes, begun = folder / "trajectories.jsonl", [], time.monotonic()
    before = _records(path)
    process = ManagedProcess(command, folder.with_suffix(".log"))
    while process.status is None:
        time.sleep(0.3)
        if (done := _records(path)) != before:
            sizes.append(_memory_megabytes(process.process.pid))
        if stop and done >= stop:
            os.kill(process.process.pid, signal.SIGKILL)
            process.process.wait()
    if process.status != (-signal.SIGKILL if stop else 0):
        raise EngineError(f"it ended with {process.status}: {process.last_words()}")
    sizes = [size for size in sizes if size] or [0]
    memory = (sizes[0], sizes[len(sizes) // 2], max(sizes))
    ended = "kill -9" if stop else "itself"
    return (
        ended,
        str(_records(path)),
        f"{time.monotonic() - begun:.0f}",
        *(f"{size:.0f}" for size in memory),
    )


def _records(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _memory_megabytes(pid: int) -> float:
    """The memory of a process that runs; 0 of one that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def differing(left: Path, right: Path) -> list[str]:
    """The ids of the questions whose records are not the same in both, or are in one alone."""
    first, second = (
        dict(map(_timeless, read_jsonl(folder / "trajectories.jsonl"))) for folder in (left, right)
    )
    return sorted(id_ for id_ in first.keys() | second if first.get(id_) != second.get(id_))


def _timeless(record: dict[str, Any]) -> tuple[str, int]:
    """The id of a record, and a hash of all that is no time."""
    searches = [{**search, "seconds": 0} for search in record["searches"]]
    return record["id"], hash(json.dumps({**record, "seconds": 0, "searches": searches}, sort_keys=True))


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
