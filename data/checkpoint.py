"""Checkpoint folders that are either whole or not there: save, find, prune. Knows nothing of what is in them.

checkpoints/
  step-000040/     what `write` put there, and checkpoint.json {format_version, step}, written last
  step-000060/
  step-000060.old/ while that step is saved again where two folders cannot be exchanged; it counts until then
  best.json        {format_version, step, score}: this one is never pruned
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data.atomic import atomic_write, new_folder, remove_folder, sync_files
from data.errors import ConfigError, DataError, StorageError, reason_of
from data.records import FORMAT_VERSION

MARK = "checkpoint.json"
BEST = "best.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `step` updates had been made when it was written."""

    step: int
    path: Path


def save_checkpoint(
    directory: Path | str, step: int, write: Callable[[Path], None], keep: int = 2
) -> Checkpoint:
    """Save what `write(folder)` writes as the checkpoint of `step`; keep the newest `keep` and the best.

    The folder gets its name only when it is whole. Raises StorageError where the disk is full or
    refuses; whatever went wrong, earlier checkpoints are untouched and nothing half-written stays.
    """
    if keep < 1:
        raise ConfigError(f"keep = {keep}: at least 1 checkpoint must be kept")
    directory = Path(directory)
    final = directory / f"step-{step:06d}"
    with saving(f"cannot save checkpoint {final}"):
        _tidy(directory)
        with new_folder(final, mark=MARK, aside=final.with_name(f"{final.name}.old")) as partial:
            write(partial)
            mark = {"format_version": FORMAT_VERSION, "step": step}
            (partial / MARK).write_text(json.dumps(mark) + "\n", encoding="utf-8")
            sync_files(partial)
    prune_checkpoints(directory, keep)
    return Checkpoint(step, final)


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Raise StorageError, in one line, where the disk refuses what is written in this block."""
    try:
        yield
    except Exception as error:
        # safetensors and torch raise errors of their own, torch's without the system's reason
        reason = reason_of(error).splitlines()[0]
        by_torch = "inline_container" in reason
        by_safetensors = type(error).__name__ == "SafetensorError" and "os error" in reason.lower()
        if not (isinstance(error, OSError) or by_torch or by_safetensors):
            raise
        reason = f"torch could not write all of a file ({reason})" if by_torch else reason
        raise StorageError(f"{what}: {reason}") from error


def list_checkpoints(directory: Path | str) -> list[Checkpoint]:
    """Return the complete checkpoints of a directory, oldest first; an absent directory has none.

    Raises DataError where one was written by a newer format.
    """
    marks = sorted(Path(directory).glob(f"step-*/{MARK}"), reverse=True)
    found = {int(_read_json(mark)["step"]): mark.parent for mark in marks}  # step-000060 after .old
    return [Checkpoint(*each) for each in sorted(found.items())]


def latest_checkpoint(directory: Path | str) -> Checkpoint | None:
    """The complete checkpoint of the highest step, or None."""
    return next(reversed(list_checkpoints(directory)), None)


def mark_best(directory: Path | str, step: int, score: float) -> None:
    """Name the checkpoint of `step` the best so far, at `score`; pruning spares it from now on."""
    best = {"format_version": FORMAT_VERSION, "step": step, "score": score}
    atomic_write(Path(directory) / BEST, json.dumps(best) + "\n")


def best_checkpoint(directory: Path | str) -> tuple[Checkpoint, float] | None:
    """The checkpoint marked best and its score, or None where none is marked or it is gone."""
    mark = Path(directory) / BEST
    if not mark.exists():
        return None
    best = _read_json(mark)
    found = [each for each in list_checkpoints(directory) if each.step == best["step"]]
    return (found[0], float(best["score"])) if found else None


def prune_checkpoints(directory: Path | str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; the best one stays whatever its age."""
    best = best_checkpoint(directory)
    for old in list_checkpoints(directory)[:-keep]:
        if best is None or old.step != best[0].step:
            with suppress(OSError):
                pruned = old.path.with_name(f".{old.path.name}.pruned")  # at no time half a checkpoint
                os.rename(old.path, pruned)
                remove_folder(pruned)


def _tidy(directory: Path) -> None:
    """Undo or end what a killed process was at. A run has one writer (its lock), so none is live."""
    for left in (*directory.glob(".step-*"), *directory.glob(".partial-*")):  # those of earlier versions
        remove_folder(left, MARK)
    for old in directory.glob("step-*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, old.with_suffix(""))


def _read_json(path: Path) -> dict:
    """The object in a mark; it was renamed into place whole, so anything else is damage from outside."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version, _ = value["format_version"], value["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a checkpoint mark with format_version and step") from error
    if version > FORMAT_VERSION:
        raise DataError(f"{path}: format_version {version} is newer than {FORMAT_VERSION}")
    return value
