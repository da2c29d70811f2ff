"""Every command that draws a bar or a table, in a terminal of 60, 80 and 200 columns."""

import http.server
import itertools
import re
import threading
from functools import partial

import pytest
import yaml

from data.corpus import Corpus
from data.jsonl import read_json, read_jsonl, write_jsonl
from retriever_server.indexes.bm25 import BM25Index
from scripts import __main__ as sleuth
from scripts import convert
from tests.retriever_server.training.recipes import settings
from tests.samples import quick
from tests.scripted import ScriptedEngine
from tests.scripts.test_warm_start import RECORD as DEMONSTRATION
from tests.terminal import Terminal
from tests.toy import build_toy

TITLES = [*"abcdef", "[/bold] {task} \x1b[2J"]


@pytest.fixture(params=quick([60], [60, 80, 200]))
def terminal(request):
    return Terminal(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy policy with its questions and index; documents, examples with theirs."""
    folder = build_toy(tmp_path_factory.mktemp("terminal"))
    (folder / "documents").mkdir()
    for name in "abc":
        (folder / "documents" / f"{name}.txt").write_text(f"Once upon a time there was {name}. " * 9)
    lines = ["question,passage", *(f"where is the {a} fox?,The {a} fox lives here." for a in "abcdef")]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    convert.main(str(folder / "pairs.csv"), str(folder / "pairs"), "sentence-transformers")
    BM25Index.build(Corpus(folder / "pairs" / "corpus.jsonl"), folder / "pairs" / "index")
    rows = [
        {"id": f"q{i}", "question": f"fox {i}?", "golden_answers": ["red"], "metadata": {"kind": title}}
        for i, title in enumerate(TITLES)
    ]
    write_jsonl(folder / "questions.jsonl", rows)
    return folder


@pytest.fixture
def scripted(monkeypatch):
    """Wires an engine that searches once, then answers, in the place of the real one."""
    turns = ["<think> a </think><search> fox</search>", "<think> b </think><answer> red</answer>"]
    monkeypatch.setattr(
        "agent.engines.hf.HFEngine", lambda model, tokenizer, rows, **_: ScriptedEngine(tokenizer, turns)
    )


def the_bar(terminal, title, count):
    """The line of the bar in the end; it stands there once, whole, with its count."""
    (line,) = [line for line in terminal.lines if title in line]
    assert count in line and len(line) < terminal.columns
    return line


def test_corpus(folder, tmp_path, terminal):
    assert terminal.run("corpus", folder / "documents", "--out", tmp_path / "corpus.jsonl") == 0
    the_bar(terminal, "reading files", "810 bytes/810 bytes")


def test_index(folder, tmp_path, terminal):
    corpus = folder / "pairs" / "corpus.jsonl"
    assert terminal.run("index", "--corpus", corpus, "--out", tmp_path / "index") == 0
    the_bar(terminal, "reading passages", "6/6")
    assert "indexed 6 passages" in " ".join(terminal.lines)


def test_render(folder, tmp_path, terminal):
    pytest.importorskip("PIL")
    source = folder / "pairs" / "corpus.jsonl"
    assert terminal.run("render", source, "--out", tmp_path / "pages", "--processes", 1) == 0
    the_bar(terminal, "drawing pages", "6/6")


def test_convert_and_mine(folder, tmp_path, terminal):
    source = ["--source", folder / "pairs.csv", "--source_format", "sentence-transformers"]
    assert terminal.run("convert", *source, "--out", tmp_path) == 0
    assert (
        len([line for line in terminal.lines if "reading examples" in line]) == 2
    )  # passages, then examples
    terminal = Terminal(terminal.columns)
    retriever = ["--retriever", folder / "pairs" / "index"]
    asked = ["--queries", tmp_path / "examples.jsonl", "--corpus", tmp_path / "corpus.jsonl"]
    assert terminal.run("mine", *asked, *retriever, "--out", tmp_path / "mined.jsonl") == 0
    the_bar(terminal, "mining queries", "6/6")


def test_expand(folder, tmp_path, terminal):
    generator = "{class_path: tests.retriever_server.training.test_expansion.Shout}"
    options = [
        "--corpus",
        folder / "pairs" / "corpus.jsonl",
        "--generator",
        generator,
        "--passages_at_once",
        4,
    ]
    assert terminal.run("expand", *options, "--out", tmp_path / "expanded.jsonl") == 0
    the_bar(terminal, "expanding passages", "6/6")


def test_evaluate_retriever(folder, terminal):
    index = folder / "pairs" / "index"
    options = ["--retriever", index, "--compare", index, "--queries", folder / "questions.jsonl"]
    assert terminal.run("evaluate-retriever", *options, "--answers", "true") == 0
    seen = " ".join(terminal.lines)
    assert seen.count("searching queries") == 2 and "7/7" in seen
    assert "+0.0000 [+0.0000, +0.0000]" in seen and "answer@100" in seen


def test_search(folder, terminal):
    assert terminal.run("search", "fox", "--retriever", folder / "index") == 0
    assert terminal.lines[0].startswith("1  ")


def test_ask(folder, scripted, terminal):
    options = ["--policy", folder / "policy", "--retriever", folder / "index"]
    assert terminal.run("ask", "Which fox?", *options) == 0
    assert terminal.lines[-2] == "red" and "reading the question" not in " ".join(terminal.lines)


def test_evaluate(folder, scripted, tmp_path, terminal):
    options = ["--policy", folder / "policy", "--retriever", folder / "index", "--out", tmp_path / "scores"]
    assert terminal.run("evaluate", "--questions", folder / "questions.jsonl", *options) == 0
    the_bar(terminal, "answering questions", "7/7")
    assert read_json(tmp_path / "scores" / "scores.json")["n"] == 7
    seen = " ".join(terminal.lines)
    assert "1.000" in seen and "[/bold] {task} �[2J" in seen and "…" not in seen
    assert terminal.run("evaluate", "--questions", folder / "questions.jsonl", *options) == 0  # all is there


def test_an_evaluation_that_is_interrupted_keeps_its_records(folder, scripted, tmp_path, monkeypatch):
    from agent.evaluation import evaluate

    monkeypatch.setattr(evaluate, "_append", interrupted_after(3, evaluate._append))
    options = ["--policy", folder / "policy", "--retriever", folder / "index", "--out", tmp_path / "scores"]
    command = ["evaluate", "--questions", folder / "questions.jsonl", *options]
    terminal = Terminal(80)
    assert terminal.run(*command) == 130
    # A line that ends in a blank loses it.
    said = f"is kept in {tmp_path / 'scores'}: start the same command again to go on"
    assert "".join(terminal.lines).replace(" ", "").endswith(said.replace(" ", ""))
    monkeypatch.undo()
    assert len(list(read_jsonl(tmp_path / "scores" / "trajectories.jsonl"))) == 3


def interrupted_after(count, function):
    calls = itertools.count(1)

    def called(*arguments):
        function(*arguments)
        if next(calls) == count:
            raise KeyboardInterrupt

    return called


RECIPE = """
policy: {folder}/policy
questions: {folder}/train.jsonl
dev_questions: {folder}/dev.jsonl
retriever: {folder}/index
out: {out}
rollout: {{questions_per_step: 2, group_size: 2}}
device: cpu
steps: 3
eval_every: 2
"""


def test_train(folder, tmp_path, terminal):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=folder, out=tmp_path / "run"))
    assert terminal.run("train", "--config", tmp_path / "recipe.yaml") == 0
    steps = [line for line in terminal.lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == [f"step {step}/3" for step in (1, 2, 2, 3, 3)]
    assert all("reward 0." in line or "dev EM 0." in line for line in steps)
    if terminal.columns > 60:
        assert all(re.search(r"searches \d\.\d  \d+\.\d s", line) for line in steps)
        assert "ETA 0:" in steps[0]
    the_bar(terminal, "training  ", "3/3")
    assert terminal.lines[0].startswith("training ")  # at once, before anything is loaded
    for title in ("loading ", "answering questions", "updating the policy", "answering dev questions"):
        assert title in terminal.raw and title not in " ".join(terminal.lines)


def test_a_run_that_is_no_terminal_has_a_line_a_step(folder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=folder, out=tmp_path / "run"))
    assert sleuth.main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == (
        f"training {folder}/policy: 3 steps of 2 questions x 2 trajectories, into {tmp_path / 'run'}"
    )
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/3" for step in (1, 2, 2, 3, 3)]
    assert re.fullmatch(
        r"step 1/3  reward \d\.\d{3}  EM \d\.\d{3}  searches \d\.\d  \d+\.\d s  ETA \d+:\d\d", lines[0]
    )
    assert re.fullmatch(r"step 3/3  dev EM \d\.\d{3}  searches \d\.\d  \d+\.\d s", lines[-1])


def test_warm_start(tmp_path, terminal):
    write_jsonl(tmp_path / "demonstrations.jsonl", [DEMONSTRATION] * 4)
    options = ["--training.steps", 2, "--training.batch_size", 2, "--out", tmp_path / "out"]
    assert terminal.run("warm-start", "--demonstrations", tmp_path / "demonstrations.jsonl", *options) == 0
    the_bar(terminal, "training  ", "2/2")
    steps = [line for line in terminal.lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == ["step 1/2", "step 2/2", "step 2/2"]
    assert "loss " in steps[0] and "token accuracy" in steps[0] and "demonstrations/s" in steps[2]
    assert "Writing model shards" not in terminal.raw and "{'" not in terminal.raw


def test_train_retriever(rivers, tmp_path, terminal):
    dev = {"queries": str(rivers / "dev.jsonl"), "qrels": str(rivers / "qrels.tsv"), "shared": "all"}
    recipe = settings(rivers, tmp_path / "run", steps=4, log_every=2, save_every=4, dev=dev)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert terminal.run("train-retriever", "--config", tmp_path / "recipe.yaml") == 0
    the_bar(terminal, "training  ", "4/4")
    steps = [line for line in terminal.lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == ["step 0", *["step 2/4"], *["step 4/4"] * 3]
    assert "dev nDCG@10" in steps[0] and "loss " in steps[1] and "ETA" in steps[1]
    for title in ("encoding dev passages", "searching dev queries"):
        assert title in terminal.raw and title not in " ".join(terminal.lines)


def test_sizes(terminal):
    assert terminal.run("sizes", "--passages", 1_000_000, "--sample", 0) == 0
    seen = " ".join(terminal.lines)
    assert "flat float16" in seen and "1.5 GB" in seen and "…" not in seen


def test_download(folder, tmp_path, terminal, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/pairs.csv"
        assert terminal.run("download", url, "--out", tmp_path / "pairs.csv") == 0
        server.shutdown()
    the_bar(terminal, "pairs.csv  ", f"/{(tmp_path / 'pairs.csv').stat().st_size} bytes")
