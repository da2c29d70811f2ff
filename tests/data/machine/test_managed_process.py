"""A child does not outlive its parent, however that ends, and is asked before it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.machine.managed_process import ManagedProcess

STUBBORN = ["sh", "-c", "trap '' TERM; echo ready; sleep 100 & wait; wait"]
WILLING = ["sh", "-c", "trap 'echo asked; exit 3' TERM; echo ready; sleep 100 & wait"]


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def group_lives(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    # Zombies of a group whose parent is gone may wait for init to take them.
    states = (path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat"))
    return any(int(fields[2]) == number and fields[0] != "Z" for fields in states)


def started(command, log, **options):
    child = ManagedProcess(command, log, **options)
    wait_for(lambda: "ready" in log.read_text())
    return child


def test_it_runs_with_its_environment_in_its_folder_and_says_how_it_ended(tmp_path):
    log = tmp_path / "log"
    log.write_text("of another\n")
    script = "echo $NAME; pwd; echo ValueError: no; echo on; exit 7"
    child = ManagedProcess(["/bin/sh", "-c", script], log, {"NAME": "given"}, tmp_path)
    wait_for(lambda: child.status is not None)
    assert child.status == 7 and child.seconds is None
    assert log.read_text().split("\n")[:3] == ["of another", "given", str(tmp_path)]
    assert child.last_words() == "ValueError: no"
    child.kill()


def test_it_is_asked_to_end_before_it_is_killed(tmp_path):
    child = started(WILLING, tmp_path / "log")
    assert child.seconds is not None
    child.stop(20)
    assert child.status == 3 and child.last_words() == "asked"
    stubborn = started(STUBBORN, tmp_path / "other")
    stubborn.stop(0.3)
    assert stubborn.status == -signal.SIGKILL
    wait_for(lambda: not group_lives(stubborn.process.pid))


@pytest.mark.parametrize(
    ("command", "grace", "asked"), [(WILLING, 30, True), (WILLING, 0, False), (STUBBORN, 1, False)]
)
def test_it_ends_when_its_parent_is_killed(command, grace, asked, tmp_path):
    log = tmp_path / "log"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from data.machine.managed_process import ManagedProcess\n"
        f"child = ManagedProcess({command!r}, Path({str(log)!r}), grace_seconds={grace})\n"
        "print(child.process.pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        group = int(parent.stdout.readline())
        wait_for(lambda: "ready" in log.read_text())
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not group_lives(group) or (asked and "asked" in log.read_text()))
    assert ("asked" in log.read_text()) == asked
