"""A run on disk: what was asked for, how it stands, and its numbers.

run.json        {format_version, status, created, updated, notes, folder, inputs, ...}
config.yaml     the resolved configuration
metrics.jsonl   {"step": 12, "reward/mean": 0.5, ...}, one line a call of `log`
run.pid         held (locked) by the one process that writes the run
checkpoints/    data/checkpoint.py      evaluations/NAME/    agent/evaluation/evaluate.py
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import yaml

from data.atomic import atomic_write
from data.errors import ConfigError, DataError, RunStopped, StorageError, reason_of
from data.jsonl import append_jsonl, read_json, read_jsonl, write_json, write_jsonl
from data.machine.lock import lock
from data.records import FORMAT_VERSION
from data.trackers import Tracker

logger = logging.getLogger(__name__)


class RunStatus(StrEnum):
    """State of a run. A killed one still says `running`, but nobody holds its lock."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """By the user (Ctrl-C)."""
    STOPPED = "stopped"
    """By itself, or by an error: see `reason` in run.json."""
    FINISHED = "finished"


class RunDir:
    """The open folder of one run; a context manager that records how the run ended."""

    def __init__(
        self,
        path: Path | str,
        config: Mapping[str, Any],
        resume: bool = False,
        notes: Sequence[str] = (),
        on_log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
        inputs: Mapping[str, tuple[str, str]] | None = None,
        beside: Collection[str] = (),
        defaults: Any = None,
    ) -> None:
        """Create the run, or open it again where it exists with the same configuration and inputs.

        `resume` also accepts a changed configuration, which is then the run's. `notes` are what a
        reader of the results must know (what is wired in). `on_log` is called by each `log`.
        `inputs`: setting -> the file it names, a hash of what that holds.
        `beside`: files that may lie in a folder without a run. `defaults`: of settings that a run which was
        begun before they existed does not name; a dataclass stands for those of its fields. Raises
        ConfigError where configuration or inputs differ, there is nothing to resume, the folder holds
        something else, or another process is writing the run.
        """
        self.path = Path(path)
        self.tracker = Tracker()
        self._on_log = on_log
        known = defaults_of(defaults) if is_dataclass(defaults) else defaults or {}
        self._defaults = json.loads(json.dumps(known, default=str))
        plain = json.loads(json.dumps(config, default=str))  # as it will be read back
        if resume and not (self.path / "run.json").exists():
            raise ConfigError(f"nothing to resume in {self.path}: it holds no run.json")
        if not (self.path / "run.json").exists():
            check_free(self.path, {"run.pid", *beside})
        self._make_folder()
        self._lock = lock(self.path / "run.pid", f"{self.path} is being written", str(os.getpid()))
        try:
            self._open(plain, resume, notes, dict(inputs or {}))
        except BaseException:
            self._lock.close()
            raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of `step` to metrics.jsonl, hand them to the tracker and to `on_log`.

        Keys are `group/name`. NaN and infinities become null on disk. Raises StorageError.
        """
        values = {key: float(value) for key, value in metrics.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        append_jsonl(self.path / "metrics.jsonl", [{"step": step, **finite}])
        self.tracker.log(step, values)
        self._on_log(step, values)

    def rewind(self, step: int) -> None:
        """Drop the metrics of `step` and later: training goes on from there and logs them anew."""
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] < step]
        if kept != rows:
            write_jsonl(self.path / "metrics.jsonl", kept)

    def update(self, **fields: Any) -> None:
        """Set fields of run.json, such as `notes`; the file is replaced as a whole."""
        self.info = {**self.info, **fields, "updated": _now()}
        write_json(self.path / "run.json", self.info)

    def close(self, status: RunStatus = RunStatus.FINISHED, reason: str | None = None) -> None:
        """Record how the run ended, and let others open it. A second call does nothing."""
        if self._lock.closed:
            return
        try:
            self.update(status=str(status), reason=reason)
            self.tracker.close()
        finally:
            self._lock.close()  # closing releases the lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close(RunStatus.FINISHED)
        elif isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            self.close(RunStatus.INTERRUPTED, "interrupted by the user")
        else:
            named = str(error) if isinstance(error, RunStopped) else f"{type(error).__name__}: {error}"
            self.close(RunStatus.STOPPED, named)

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make run folder {self.path}: {error.strerror}") from error

    def _open(
        self, config: dict[str, Any], resume: bool, notes: Sequence[str], inputs: dict[str, tuple[str, str]]
    ) -> None:
        """Compare with what is there, then write run.json and config.yaml and open metrics.jsonl."""
        self.info: dict[str, Any] = {"format_version": FORMAT_VERSION, "created": _now(), "notes": []}
        if (self.path / "run.json").exists():
            self.info = read_run(self.path)
            if not resume and has_results(self.path):
                self._check_same(config, inputs)
        hashes = {name: held for name, (_, held) in inputs.items()}
        more = {"notes": list(notes or self.info["notes"]), "folder": str(Path.cwd()), "inputs": hashes}
        self.update(status=str(RunStatus.RUNNING), reason=None, **more)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        atomic_write(self.path / "config.yaml", text)

    def _check_same(self, config: dict[str, Any], inputs: dict[str, tuple[str, str]]) -> None:
        """Raise ConfigError where configuration or inputs are not those of the run that is here."""
        known = self.info.get("inputs", {})
        folder = self.info.get("folder", "")
        changed = describe_difference(read_config(self.path), config, "", folder, self._defaults)
        changed += [
            f"{name}: {file} holds something else than then"
            for name, (file, held) in inputs.items()
            if known.get(name, held) != held  # runs of before had no hashes
        ]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run of another configuration ({'; '.join(changed)}): "
                "--resume true goes on with these changes, another --out begins a new run"
            )


def has_results(path: Path | str) -> bool:
    """Return whether a run folder holds anything that another configuration would be mixed with."""
    return any((Path(path) / name).exists() for name in ("metrics.jsonl", "checkpoints"))


def read_run(path: Path | str) -> dict[str, Any]:
    """run.json of a run folder; DataError where it is missing, malformed or of a newer format."""
    file = Path(path) / "run.json"
    if not file.is_file():
        raise DataError(f"{path} is no run folder: it holds no run.json")
    info = read_json(file)
    if not isinstance(info, dict) or not isinstance(info.get("format_version"), int):
        raise DataError(f"{file}: no format_version")
    if info["format_version"] > FORMAT_VERSION:
        newer = f"format_version {info['format_version']} is newer than {FORMAT_VERSION}"
        raise DataError(f"{file}: {newer}: update sleuth-rl to read it")
    return info


def read_config(path: Path | str) -> dict[str, Any]:
    """config.yaml of a run folder, {} where there is none; DataError where it is malformed."""
    file = Path(path) / "config.yaml"
    if not file.exists():
        return {}
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{file}: not YAML: {' '.join(str(error).split())}") from error


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, [] where there is none; a last line cut by a kill is left out."""
    file = Path(path) / "metrics.jsonl"
    return list(read_jsonl(file, tolerate_cut_tail=True)) if file.exists() else []


def check_free(folder: Path, own: Collection[str]) -> None:
    """Raise ConfigError where the folder holds files other than `own` and hidden ones, or cannot be one."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ConfigError(f"{there}: is a file, must be a folder")
    try:
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        raise ConfigError(f"{folder}: nothing can be written in {there} ({reason_of(error)})") from error
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if name not in own and not name.startswith(".")]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise ConfigError(f"{folder}: holds other files ({shown}); give an empty or a new folder")


def defaults_of(config: Any) -> dict[str, Any]:
    """Return the defaults of the fields of a configuration, and of those of its parts."""
    found: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            found[each.name] = defaults_of(value)
        elif isinstance(value, list | tuple) and value and all(map(is_dataclass, value)):
            found[each.name] = {str(number): defaults_of(item) for number, item in enumerate(value)}
        elif each.default is not MISSING:
            found[each.name] = each.default
        elif each.default_factory is not MISSING:
            found[each.name] = each.default_factory()
    return found


def describe_difference(
    old: Any, new: Any, name: str = "", folder: str = "", defaults: Any = None
) -> list[str]:
    """The differences of two nested settings, each as "a.b: 1 -> 2"; [] where there is none.

    Two ways to write a path are the same; `folder` is where relative paths of `old` begin, else here.
    `defaults` are the values of what `old` does not name.
    """
    known = defaults if isinstance(defaults, Mapping) else {}
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        # A setting that one of the two does not have is what it was if it is none.
        keys = [key for key, value in old.items() if key in new or value not in (None, {})]
        keys += [key for key, value in new.items() if key not in old and value is not None]
        pairs = [(str(key), old.get(key, known.get(key, "absent")), new.get(key, "absent")) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new or _same_path(old, new, folder) else [f"{name}: {old!r} -> {new!r}"]
    return [
        line
        for key, before, now in pairs
        for line in describe_difference(before, now, f"{name}.{key}" if name else key, folder, known.get(key))
    ]


def _same_path(old: Any, new: Any, folder: str) -> bool:
    """Return whether two texts name the same files, commas between them."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    before = [os.path.realpath(os.path.join(folder, os.path.expanduser(part))) for part in old.split(",")]
    now = [os.path.realpath(os.path.expanduser(part)) for part in new.split(",")]
    return before == now and all(map(os.path.exists, now))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
