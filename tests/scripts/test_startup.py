"""Mistakes of a caller are found first: before torch is imported, in one line, and every help is light."""

import json
import socket
import subprocess
import sys

import pytest

from scripts import __main__ as sleuth
from tests.retriever_server.running import build_small_index

HEAVY = ("torch", "transformers", "datasets", "faiss", "sentence_transformers", "trl", "peft", "wandb")
RUN = f"""
import contextlib, io, json, sys
import data.machine.listening
data.machine.listening.PROBE_SECONDS = 0.3
from scripts.__main__ import main

def run(argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
    heavy = sorted(set({HEAVY}) & sys.modules.keys())
    return status, heavy, out.getvalue(), err.getvalue().splitlines()

print(json.dumps([run(argv) for argv in json.load(sys.stdin)]))
"""


def run(argvs, folder=None):
    """Run each `sleuth ARGV` in one new process -> (status, heavy modules loaded, stdout, stderr's lines)."""
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=json.dumps(argvs), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_help_loads_nothing_heavy():
    commands = list(sleuth.COMMANDS)
    for command, (status, heavy, out, _) in zip(
        commands, run([[command, "--help"] for command in commands]), strict=True
    ):
        assert (status, heavy) == (0, []) and f"sleuth {command}" in out


RECIPE = """
model: {class_path: dense, init_args: {base: atlas}}
loss: {class_path: MultipleNegativesRankingLoss}
train: [{examples: examples.jsonl, corpus: corpus.jsonl}]
out: learnt
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """An index, questions, and a port that nobody listens on."""
    folder = tmp_path_factory.mktemp("startup")
    build_small_index(folder)
    row = {"id": "1", "question": "fox?", "golden_answers": ["red"]}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "wrong.jsonl").write_text('{"question": "fox?"}\n')
    example = {"query": "fox?", "positives": ["0"]}
    (folder / "examples.jsonl").write_text(json.dumps(example) + "\n")
    (folder / "wrong.yaml").write_text("class_path: Fuse\ninit_args: {parts: [none, nowhere]}\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("years")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        (folder / "dead").write_text(f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield folder


POLICY = ["--policy", "atlas", "--questions", "questions.jsonl", "--retriever", "index", "--out", "out"]
JUDGE = ["--rewards", "{{judge: 1}}", "--judge.url", "{dead}/v1"]
MINE = ["--queries", "examples.jsonl", "--retriever", "index", "--out", "x"]
JUDGED = ["--retriever", "index", "--queries", "questions.jsonl", "--answers", "true"]
SEQ2SEQ = "{{class_path: retriever_server.training.expansion.Seq2SeqQueries, init_args: {{model: atlass}}}}"
LEARN = ["--config", "recipe.yaml"]
WRONG = {
    "evaluate": [
        (["--out", "x"], "missing: --policy, --retriever, --questions"),
        (
            [*POLICY, "--policy", "atlass"],
            "policy = 'atlass': no folder, no short name (atlas, atlas-compares, smollm2)",
        ),
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
        ([*POLICY, *JUDGE], "judge.url = '{dead}/v1': nobody listens (Connection refused)"),
        ([*POLICY, "--retriever", "wrong.yaml"], "wrong.yaml: init_args.parts[1]: retriever 'nowhere'"),
        ([*POLICY, "--engine", "vllm"], "engine.python = '.venv-vllm/bin/python': no such program"),
    ],
    "ask": [
        (["q", "--policy", "atlas", "--retriever", "{dead}"], "{dead}: gave up after"),
        (["q", "--policy", "atlass", "--retriever", "index"], "did you mean atlas?"),
    ],
    "search": [(["q", "--retriever", "{dead}"], "{dead}: gave up after")],
    "train-retriever": [
        ([*LEARN, "--model.class_path", "dens"], "model.class_path: 'dens' must be one of colbert"),
        ([*LEARN, "--model.init_args.pool", "cls"], "model.init_args.pool: unknown key; dense takes base"),
        ([*LEARN, "--model.init_args.base", "atlass"], "base = 'atlass': no folder"),
        ([*LEARN, "--loss.class_path", "NoLoss"], "loss.class_path: 'NoLoss' must be one of"),
        ([*LEARN, "--train", "[{{examples: none.jsonl, corpus: corpus.jsonl}}]"], "none.jsonl: No such file"),
        ([*LEARN, "--train", "[{{examples: wrong.jsonl, corpus: corpus.jsonl}}]"], "wrong.jsonl:1: "),
        ([*LEARN, "--dev.queries", "none.jsonl", "--dev.qrels", "none.tsv"], "none.tsv: no such file"),
        ([*LEARN, "--serves", "nowhere"], "nowhere: no such folder"),
        ([*LEARN, "--out", "thesis"], "thesis: holds other files (thesis.tex)"),
        ([*LEARN, "--out", "fresh", "--resume", "true"], "nothing to resume in fresh"),
    ],
    "index": [
        (["--corpus", "none.jsonl", "--encoder", "atlas", "--out", "x"], "none.jsonl: no such file"),
        (["--corpus", "corpus.jsonl", "--encoder", "atlass", "--out", "x"], "did you mean atlas?"),
    ],
    "mine": [
        (["--queries", "none.jsonl", "--retriever", "index", "--out", "x"], "none.jsonl: No such file"),
        (["--queries", "examples.jsonl", "--retriever", "{dead}", "--out", "x"], "{dead}: gave up after"),
        ([*MINE, "--teacher", "atlass"], "teacher = 'atlass': no folder"),
        ([*MINE, "--teacher", "wrong.yaml"], "wrong.yaml: init_args.parts[1]: retriever 'nowhere'"),
    ],
    "evaluate-retriever": [
        (
            ["--retriever", "index", "--queries", "none.jsonl", "--answers", "true"],
            "none.jsonl: no such file",
        ),
        ([*JUDGED, "--compare", "nowhere"], "retriever 'nowhere': must be"),
        ([*JUDGED, "--retriever", "{dead}"], "{dead}: gave up after"),
    ],
    "serve": [
        (["--index", "nowhere"], "retriever 'nowhere': must be"),
        (["--index", "{dead}", "--port", "0"], "{dead}: gave up after"),
        (["--index", "index", "--others", "{{b: nowhere}}", "--port", "0"], "retriever 'nowhere': must be"),
        (["--index", "index", "--token_file", "none", "--port", "0"], "none: No such file"),
    ],
    "expand": [
        (["--corpus", "none.jsonl", "--out", "x", "--generator", SEQ2SEQ], "none.jsonl: no such file"),
        (["--corpus", "corpus.jsonl", "--out", "x", "--generator", SEQ2SEQ], "model = 'atlass': no folder"),
    ],
    "promptreps": [
        (["--base", "atlass", "--out", "x"], "base = 'atlass': no folder"),
        (["--base", "atlas", "--out", "x", "--dtype", "int4"], "dtype = 'int4': must be float32 or bfloat16"),
    ],
    "sizes": [(["--passages", "9", "--encoder", "atlass"], "encoder = 'atlass': no folder")],
    "merge": [(["--models", "[thesis, thesis]", "--out", "x"], "thesis: ")],
    "download": [
        (["--url", "{dead}/f", "--out", "x"], "{dead}/f: nobody answers there (Connection refused)")
    ],
    "demonstrations": [
        (["--questions", "none.jsonl", "--retriever", "index", "--out", "x"], "none.jsonl: no such file"),
        (["--questions", "questions.jsonl", "--retriever", "{dead}", "--out", "x"], "{dead}"),
    ],
    "score-searches": [
        (
            ["--policy", "atlas", "--retriever", "index", "--out", "x", "--trajectories", "wrong.jsonl"],
            "wrong.jsonl:1: no trajectory",
        )
    ],
    "warm-start": [
        (["--out", "w", "--demonstrations", "none.jsonl"], "none.jsonl: no such file"),
        (["--out", "w", "--demonstrations", "wrong.jsonl"], "wrong.jsonl:1: not a demonstration: no 'steps'"),
        (["--out", "w", "--invented", "3", "--policy", "atlass"], "did you mean atlas?"),
    ],
}


@pytest.fixture(scope="module", params=[slice(3), pytest.param(slice(3, None), marks=pytest.mark.slow)])
def outcomes(broken, request):
    """Run wrong command lines of each command, the first three or the others, in one process, in turn."""
    dead = (broken / "dead").read_text()
    argvs = [
        (command, message.format(dead=dead), [command, *(word.format(dead=dead) for word in argv)])
        for command, lines in WRONG.items()
        for argv, message in lines[request.param]
    ]
    came = {command: [] for command in WRONG}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for (command, *asked), outcome in zip(argvs, run([argv for *_, argv in argvs], broken), strict=True):
            came[command].append((*asked, outcome))
    return came


@pytest.mark.parametrize("command", WRONG)
def test_what_is_wrong_is_one_line_before_anything_heavy(outcomes, command):
    for message, argv, (status, heavy, _, lines) in outcomes[command]:
        assert (status, heavy, len(lines)) == (2, [], 1), (argv, heavy, lines)
        assert lines[0].startswith("sleuth: ") and message in lines[0], (argv, lines)
