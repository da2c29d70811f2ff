"""`sleuth matrix`: cells are evaluations, only what is missing is asked, wrong input is one line."""

import json

import pytest

from data.jsonl import read_json
from scripts import __main__ as sleuth
from tests.toy import build_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


def matrix(toy, out, *options):
    policies = json.dumps({"one": str(toy / "policy"), "two": str(toy / "policy")})
    retrievers = json.dumps({"index": str(toy / "index"), "none": "none"})
    shared = ["--questions", str(toy / "dev.jsonl"), "--limit", "3", "--device", "cpu", "--out", str(out)]
    return sleuth.main(["matrix", "--policies", policies, "--retrievers", retrievers, *shared, *options])


def test_each_cell_is_evaluated_once_with_its_limits_across_restarts(toy, tmp_path, capsys):
    limits = ["--top_k", "[1, 2]", "--searches", "[0]"]
    assert matrix(toy, tmp_path, *limits, "--diagonal") == 0
    out = capsys.readouterr().out
    assert "interaction at k1.s0" in out and "diagonal less the rest at k2.s0" in out
    cells = {path.name: path for path in (tmp_path / "cells").iterdir()}
    assert cells.keys() == {
        f"{p}.{r}.k{k}.s0" for p in ("one", "two") for r in ("index", "none") for k in (1, 2)
    }
    own = read_json(cells["two.none.k2.s0"] / "evaluation.json")
    assert (own["protocol"]["top_k"], own["protocol"]["max_turns"], own["n"]) == (2, 0, 3)
    before = read_json(tmp_path / "matrix.json")
    files = {name: (path / "trajectories.jsonl") for name, path in cells.items()}
    kept = {name: file.read_bytes() for name, file in files.items()}
    lost = files["one.none.k1.s0"]
    lost.write_bytes(b"".join(lost.read_bytes().splitlines(keepends=True)[:1]))  # as a kill leaves it
    assert matrix(toy, tmp_path, *limits, "--diagonal") == 0
    assert read_json(tmp_path / "matrix.json") == before
    again = {name: file.read_bytes() for name, file in files.items() if file != lost}
    assert again == {name: content for name, content in kept.items() if name in again}


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ["--baseline", "three.none"],
            "baseline = 'three.none': must be one of one.index, one.none, ",
        ),
        (["--retrievers", '{"a b": "none"}'], "retrievers.a b = 'none': must be a name of letters"),
        (["--retrievers", '{"a": "none"}', "--diagonal"], "diagonal = True: must be as many policies"),
        (["--retrievers", "{}"], "retrievers = {}: must be at least one"),
        (["--retrievers", '{"a": "/nowhere"}'], "/nowhere"),
        (["--policies", '{"a": "/nowhere"}'], "/nowhere"),
        (["--top_k", "[0]"], "top_k = [0]: must be >= 1"),
        (["--samples", "2"], "temperature = 0.0: must be > 0 for 2 samples"),
    ],
)
def test_wrong_input_is_one_line(toy, tmp_path, options, said, capsys):
    assert matrix(toy, tmp_path / "out", *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sleuth: ") and said in line
    assert not (tmp_path / "out").exists()
