"""Checkpoints are whole or not there, whatever goes wrong while they are written."""

import errno
import json
import os
import resource
import shutil

import numpy as np
import pytest

from data import atomic
from data.checkpoint import (
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    mark_best,
    save_checkpoint,
)
from data.errors import ConfigError, DataError, StorageError


def write_weights(folder):
    (folder / "weights.bin").write_bytes(b"w" * 100)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a b c")


def steps(directory):
    return [found.step for found in list_checkpoints(directory)]


def leftovers(directory):
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_the_latest_checkpoint_holds_what_was_written(tmp_path):
    save_checkpoint(tmp_path, 9, write_weights, keep=5)
    save_checkpoint(tmp_path, 1_000_000, write_weights, keep=5)
    save_checkpoint(tmp_path, 100, write_weights, keep=5)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.step == 1_000_000
    assert (latest.path / "tokenizer" / "vocab.txt").read_text() == "a b c"
    assert steps(tmp_path) == [9, 100, 1_000_000]


def test_no_directory_has_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    assert best_checkpoint(tmp_path / "absent") is None


def test_a_full_disk_in_mid_write_leaves_the_earlier_checkpoints(tmp_path):
    save_checkpoint(tmp_path, 1, write_weights)

    def write(folder):
        write_weights(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"cannot save checkpoint .*step-000002: No space left on device"):
        save_checkpoint(tmp_path, 2, write, keep=1)
    assert steps(tmp_path) == [1] and leftovers(tmp_path) == []


def by_safetensors(folder):
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(100_000)}, folder / "model.safetensors")


def by_torch(folder):
    import torch

    torch.save({"w": torch.zeros(100_000)}, folder / "optimizer.pt")


@pytest.mark.parametrize("write", [by_safetensors, by_torch])
def test_a_library_running_into_a_limit_of_the_disk_is_a_storage_error_in_one_line(write, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # Python ignores SIGXFSZ: writing fails
    try:
        with pytest.raises(StorageError, match=r"step-000003: .+$") as caught:
            save_checkpoint(tmp_path, 3, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(caught.value).splitlines()) == 1
    assert steps(tmp_path) == [] and leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_any_other_failure_is_passed_on_and_leaves_nothing_half_written(tmp_path, error):
    def write(folder):
        write_weights(folder)
        raise error

    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 2, write)
    assert steps(tmp_path) == [] and leftovers(tmp_path) == []


def test_a_folder_without_its_mark_is_no_checkpoint_and_what_a_kill_left_is_removed(tmp_path):
    (tmp_path / "step-000007").mkdir()
    (tmp_path / ".partial-step-000008").mkdir()
    (tmp_path / ".partial-step-000008" / "weights.bin").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 9, write_weights)
    assert steps(tmp_path) == [9] and leftovers(tmp_path) == []


def test_the_mark_is_written_after_everything_else(tmp_path):
    def write(folder):
        assert not (folder / "checkpoint.json").exists()
        assert latest_checkpoint(tmp_path) is None

    found = save_checkpoint(tmp_path, 4, write)
    assert json.loads((found.path / "checkpoint.json").read_text()) == {"format_version": 1, "step": 4}


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    save_checkpoint(tmp_path, 5, lambda folder: (folder / "a").write_text("old"))
    found = save_checkpoint(tmp_path, 5, lambda folder: (folder / "a").write_text("new"))
    assert (found.path / "a").read_text() == "new"
    assert steps(tmp_path) == [5] and leftovers(tmp_path) == []


class Killed(BaseException):
    """As a kill: nothing of what was going on is ended."""


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_kill_while_a_step_is_saved_again_leaves_the_old_checkpoint_or_the_new(
    tmp_path, monkeypatch, renamed
):
    """Also where there is no other, and `keep` is 1; the next save puts all names right."""
    save_checkpoint(tmp_path, 5, lambda folder: (folder / "a").write_text("old"))
    left, rename = [renamed], os.rename
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)  # as on systems that cannot

    def killed_rename(*names):
        if not left[0]:
            raise Killed
        left[0] -= 1
        rename(*names)

    def killed_rmtree(folder, ignore_errors=False):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "rename", killed_rename)
        patch.setattr("shutil.rmtree", killed_rmtree)
        save_checkpoint(tmp_path, 5, lambda folder: (folder / "a").write_text("new"), keep=1)
    kept = "new" if renamed == 2 else "old"
    assert (latest_checkpoint(tmp_path).path / "a").read_text() == kept and steps(tmp_path) == [5]
    mark_best(tmp_path, 5, 0.5)
    save_checkpoint(tmp_path, 6, write_weights, keep=1)
    assert (tmp_path / "step-000005" / "a").read_text() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "step-000005", "step-000006"]


def test_a_kill_after_two_folders_were_exchanged_leaves_the_new_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 5, lambda folder: (folder / "a").write_text("old"))

    def killed(folder, ignore_errors=False):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("shutil.rmtree", killed)
        save_checkpoint(tmp_path, 5, lambda folder: (folder / "a").write_text("new"))
    assert (latest_checkpoint(tmp_path).path / "a").read_text() == "new" and steps(tmp_path) == [5]
    save_checkpoint(tmp_path, 6, write_weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000005", "step-000006"]


def test_a_kill_while_pruning_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, write_weights, keep=1)

    def killed_rmtree(folder, ignore_errors=False):
        if os.path.exists(folder):
            os.remove(os.path.join(folder, "weights.bin"))
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killed_rmtree)
        save_checkpoint(tmp_path, 2, write_weights, keep=1)
    assert steps(tmp_path) == [2]
    save_checkpoint(tmp_path, 3, write_weights, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003"]


def test_pruning_keeps_the_newest_and_never_drops_the_best(tmp_path):
    save_checkpoint(tmp_path, 1, write_weights, keep=2)
    save_checkpoint(tmp_path, 2, write_weights, keep=2)
    mark_best(tmp_path, 1, 0.7)
    for step in (3, 4, 5):
        save_checkpoint(tmp_path, step, write_weights, keep=2)
    assert steps(tmp_path) == [1, 4, 5]
    best = best_checkpoint(tmp_path)
    assert best is not None and (best[0].step, best[1]) == (1, 0.7)
    mark_best(tmp_path, 5, 0.8)
    save_checkpoint(tmp_path, 6, write_weights, keep=1)
    assert steps(tmp_path) == [5, 6]


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="keep = 0"):
        save_checkpoint(tmp_path, 1, write_weights, keep=0)


def test_a_mark_of_a_newer_format_or_a_damaged_one_is_refused_by_name(tmp_path):
    found = save_checkpoint(tmp_path, 1, write_weights)
    mark = found.path / "checkpoint.json"
    mark.write_text('{"format_version": 99, "step": 1}')
    with pytest.raises(DataError, match="format_version 99 is newer"):
        latest_checkpoint(tmp_path)
    mark.write_text("{")
    with pytest.raises(DataError, match=r"step-000001/checkpoint\.json: not a checkpoint mark"):
        latest_checkpoint(tmp_path)
