"""What a caller got wrong is found first: before torch is imported, in one line, and every help is light."""

import json
import socket
import subprocess
import sys

import pytest

from scripts import __main__ as sleuth
from tests.retriever_server.running import build_small_index

HEAVY = ("torch", "transformers", "datasets", "faiss", "sentence_transformers", "trl", "peft", "wandb")
RUN = f"""
import sys
from scripts.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
print(status, *(set({HEAVY}) & sys.modules.keys()), sep=",", file=sys.stderr)
"""


def run(argv, folder=None):
    """Run `sleuth ARGV` in a process of its own -> (status, heavy modules loaded, stdout, stderr's lines)."""
    command = [sys.executable, "-c", RUN, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    *lines, last = done.stderr.splitlines()
    status, *heavy = last.split(",")
    return int(status), heavy, done.stdout, lines


@pytest.mark.parametrize("command", sleuth.COMMANDS)
def test_every_help_loads_nothing_heavy(command):
    status, heavy, out, _ = run([command, "--help"])
    assert (status, heavy) == (0, []) and f"sleuth {command}" in out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An index, questions, and a port that nobody listens on."""
    folder = tmp_path_factory.mktemp("startup")
    build_small_index(folder)
    row = {"id": "1", "question": "fox?", "golden_answers": ["red"]}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "wrong.jsonl").write_text('{"question": "fox?"}\n')
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("years")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        (folder / "dead").write_text(f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield folder


POLICY = ["--policy", "atlas", "--questions", "questions.jsonl", "--retriever", "index", "--out", "out"]
WRONG = {
    "evaluate": [
        (["--out", "x"], "missing: --policy, --questions, --retriever"),
        ([*POLICY, "--policy", "atlass"], "policy = 'atlass': no folder, no short name (atlas, smollm2)"),
        ([*POLICY, "--policy", "atlass"], "did you mean atlas?"),
        ([*POLICY, "--policy", "thesis"], "policy = 'thesis': holds no config.json"),
        ([*POLICY, "--questions", "wrong.jsonl"], "wrong.jsonl:1: no gold answer"),
        ([*POLICY, "--questions", "none.jsonl"], "none.jsonl: no such file"),
        ([*POLICY, "--retriever", "nowhere"], "retriever 'nowhere': must be an http"),
        ([*POLICY, "--retriever", "{dead}"], "{dead}: gave up after"),
        ([*POLICY, "--out", "thesis"], "thesis: holds other files (thesis.tex)"),
        ([*POLICY, "--engine", "vllm"], "engine.python = '.venv-vllm/bin/python': no such program"),
        (
            [*POLICY, "--engine", "vllm", "--engine.urls", "{dead}"],
            "engine.urls: no vLLM server listens ({dead}",
        ),
        ([*POLICY, "--temperature", "-1"], "sampling.temperature = -1.0: must be >= 0"),
        ([*POLICY, "--protocol", "xml"], "protocol = 'xml': must be one of search_r1, compact, hermes"),
    ],
    "train": [
        ([*POLICY, "--policy", "no/such-policy"], "policy = 'no/such-policy': no folder"),
        ([*POLICY, "--questions", "wrong.jsonl"], "wrong.jsonl:1: no gold answer"),
        ([*POLICY, "--retriever", "{dead}"], "{dead}: gave up after"),
        ([*POLICY, "--out", "thesis"], "thesis: holds other files (thesis.tex)"),
        ([*POLICY, "--resume", "true", "--out", "fresh"], "nothing to resume in fresh"),
        ([*POLICY, "--rewards", "{{ems: 1}}"], "rewards.ems: must be one of em, f1"),
        ([*POLICY, "--engine", "vllm"], "engine.python = '.venv-vllm/bin/python': no such program"),
    ],
    "ask": [
        (["q", "--policy", "atlas", "--retriever", "{dead}"], "{dead}: gave up after"),
        (["q", "--policy", "atlass", "--retriever", "index"], "did you mean atlas?"),
    ],
    "search": [(["q", "--retriever", "{dead}"], "{dead}: gave up after")],
    "warm-start": [
        (["--out", "w", "--demonstrations", "none.jsonl"], "none.jsonl: no such file"),
        (["--out", "w", "--demonstrations", "wrong.jsonl"], "wrong.jsonl:1: not a demonstration"),
        (["--out", "w", "--invented", "3", "--policy", "atlass"], "did you mean atlas?"),
    ],
}


@pytest.mark.parametrize(
    ("command", "argv", "message"), [(name, *case) for name, cases in WRONG.items() for case in cases]
)
def test_what_is_wrong_is_one_line_before_anything_heavy(world, monkeypatch, command, argv, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dead = (world / "dead").read_text()
    status, heavy, _, lines = run([command, *(word.format(dead=dead) for word in argv)], world)
    assert (status, heavy) == (2, []), lines
    assert lines[-1].startswith("sleuth: ") and message.format(dead=dead) in lines[-1]
    assert len(lines) == 1, lines
