"""Push to the hub, with a card made of the run alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from data.checkpoint import mark_best, save_checkpoint
from data.jsonl import write_json, write_jsonl
from data.run_dir import RunDir
from scripts import __main__ as sleuth
from tests.retriever_server.tiny_encoders import tiny_model

SCORES = {
    "n": 400,
    "em": {"mean": 0.73, "low": 0.664, "high": 0.793},
    **{metric: {"mean": 0.75, "low": 0.7, "high": 0.8} for metric in ("f1", "cover_em")},
    "searches_per_question": 1.8,
    "valid_format_rate": 0.95,
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what it is sent: (repositories, files of each)."""
    kept = {}

    class Fake:
        def create_repo(self, name, private, exist_ok):
            kept[name] = {"private": private}
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            from huggingface_hub.utils import filter_repo_objects

            files = [str(at.relative_to(folder_path)) for at in Path(folder_path).rglob("*") if at.is_file()]
            kept[repo_id]["files"] = sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            kept[repo_id][path_in_repo] = path_or_fileobj.decode()

    monkeypatch.setattr("huggingface_hub.HfApi", Fake)
    return kept


@pytest.fixture
def run(tmp_path):
    """A run of a policy whose first checkpoint is the best."""
    config = {"policy": "org/base", "questions": str(tmp_path / "train.jsonl"), "seed": 3}
    inputs = {"questions": (config["questions"], "b24b")}
    with RunDir(tmp_path / "run", config, notes=["It copies."], inputs=inputs) as opened:
        for step in (1, 2):

            def write(folder):
                for file in ("config.json", "model.safetensors", "optimizer.safetensors", "trainer.json"):
                    (folder / file).write_text("{}")

            save_checkpoint(opened.path / "checkpoints", step, write)
            write_json(opened.path / "evaluations" / f"dev-{step:06d}" / "scores.json", {**SCORES, "n": step})
        mark_best(opened.path / "checkpoints", 1, 0.7)
    return tmp_path / "run"


def push(*arguments) -> int:
    return sleuth.main(["push", *map(str, arguments)])


def test_the_best_checkpoint_of_a_run_goes_with_its_card(run, hub, capsys):
    assert push(run, "me/policy", "--licence", "apache-2.0") == 0
    assert "step-000001 to https://hub/me/policy" in capsys.readouterr().out
    sent = hub["me/policy"]
    assert sent["private"] and sent["files"] == ["config.json", "model.safetensors"]
    _, head, card = sent["README.md"].split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sleuth", "policy"],
        "base_model": "org/base",
    }
    assert "- questions: `train.jsonl` (hash b24b)" in card and "seed: 3" in card
    assert "| all | 1 | 0.730 [0.664, 0.793] |" in card and "- It copies." in card
    assert str(run.parent) not in card  # no place of this machine


def test_a_dry_run_prints_card_and_files_and_sends_nothing(run, hub, capsys):
    assert push(run, "me/policy", "--licence", "mit", "--dry_run") == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("files: config.json model.safetensors README.md") and "license: mit" in out
    assert hub == {}


def test_a_retriever_has_the_intervals_of_its_queries(tmp_path, hub):
    model = tmp_path / "run" / "model"
    trained = {"class_path": "dense", "init_args": {"base": "org/bert"}}
    config = {
        "model": trained,
        "train": [{"examples": "/data/e.jsonl"}],
        "dev": {"queries": None, "limit": 500},
    }
    with RunDir(tmp_path / "run", config):
        shutil.copytree(tiny_model(tmp_path / "tiny", "dense"), model)
    write_json(model / "encoding_spec.json", {})
    values = np.random.default_rng(0).random(50).tolist()
    rows = [{"id": str(i), "scores": {"nDCG@10": value}} for i, value in enumerate(values)]
    write_jsonl(tmp_path / "beir" / "queries.jsonl", rows)
    results = json.dumps([str(tmp_path / "beir")])
    assert push(tmp_path / "run", "me/retriever", "--licence", "mit", "--results", results) == 0
    card = hub["me/retriever"]["README.md"]
    read = ModelCard(card).data  # as the hub reads it
    assert (read.library_name, read.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert "- dev:" not in card  # there was none
    assert "sleuth index --encoder me/retriever" in card and "- retriever\n" in card
    assert "base_model: org/bert" in card and "- train: `[{examples: e.jsonl}]`" in card
    assert f"| nDCG@10 | 50 | {np.mean(values):.3f} [" in card
    assert "modules.json" in hub["me/retriever"]["files"]


def test_what_was_not_evaluated_says_so(tmp_path, hub):
    (tmp_path / "config.json").write_text("{}")
    assert push(tmp_path, "me/policy", "--licence", "mit") == 0
    assert "- It was not evaluated" in hub["me/policy"]["README.md"]


def test_a_run_that_was_killed_says_so(run, hub):
    record = json.loads((run / "run.json").read_text())
    for status, reason, said in (("running", None, "finish."), ("stopped", "by hand", "finish: by hand.")):
        write_json(run / "run.json", record | {"status": status, "reason": reason})
        assert push(run, "me/policy", "--licence", "mit") == 0
        assert f"- The run did not {said}\n" in hub["me/policy"]["README.md"]


@pytest.mark.parametrize(
    ("file", "content"),
    [("queries.jsonl", ""), ("queries.jsonl", '{"id": "1"}'), ("scores.json", "{}"), ("scores.json", "[]")],
)
def test_results_of_another_kind_are_refused_in_one_line(run, hub, tmp_path, capsys, file, content):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / file).write_text(content)
    assert push(run, "me/x", "--licence", "mit", "--results", f"[{tmp_path / 'odd'}]") == 2
    assert capsys.readouterr().err == f"sleuth: results: {tmp_path / 'odd'} holds no whole evaluation\n"
    assert hub == {}


@pytest.mark.parametrize(
    ("folder", "name", "more", "reason"),
    [
        ("nowhere", "me/x", (), "no such folder"),
        (".", "me/x", (), "holds no model"),
        ("model", "a/b/c", (), "name = 'a/b/c': must be owner/name"),
        ("model", "xy", ("--dry_run",), "name = 'xy': must be owner/name"),
        ("model", "me/x", ("third",), "'third': push takes a folder and a name"),
        ("model", "me/x", ("--results", "[nowhere]"), "results: nowhere holds neither"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, hub, folder, name, more, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert push(folder, name, *more, "--licence", "mit") == 2
    err = capsys.readouterr().err
    assert err.startswith("sleuth: ") and reason in err and err.count("\n") == 1
    assert hub == {}


def test_a_licence_must_be_given_and_a_hub_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert push(tmp_path, "me/x") == 2 and "licence" in capsys.readouterr().err
    assert push(tmp_path, "me/x", "--licence", "Apache-2", "--dry_run") == 2
    assert "identifier of the hub (apache-2.0, " in capsys.readouterr().err

    def refuse(self, *_, **__):
        raise Exception("no token\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    assert push(tmp_path, "me/x", "--licence", "mit") == 2
    assert "push to me/x: Exception: no token" in capsys.readouterr().err
