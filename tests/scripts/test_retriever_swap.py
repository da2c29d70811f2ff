"""One line of a recipe changes the retriever: `sleuth train` on the toy world, what answered on record."""

import json

import pytest

from scripts import __main__ as sleuth
from tests.scripts.test_train import command
from tests.toy import bigram_policy

FUSED = """
class_path: Fuse
init_args:
  parts:
  - {index}
  - class_path: Cached
    init_args: {{retriever: "{index}"}}
"""
SHARDED = "class_path: Sharded\ninit_args: {{parts: [{index}], deadline_seconds: 60}}"


def generations(run) -> set[str]:
    """Of all hits of the evaluation on the dev questions."""
    files = list(run.rglob("trajectories.jsonl"))
    assert files
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {hit["generation"] for row in rows for search in row["searches"] for hit in search["hits"]}


@pytest.mark.parametrize(
    ("written", "begins"),
    [(None, "bm25-"), (FUSED, "fuse-"), (SHARDED, "sharded(bm25-")],
    ids=["bm25", "fuse", "sharded"],
)
def test_training_takes_whatever_opens_as_its_retriever(written, begins, toy, tmp_path):
    spec = toy / "index"
    if written is not None:
        spec = tmp_path / "retriever.yaml"
        spec.write_text(written.format(index=toy / "index"))
    searches = bigram_policy({"</think>": {"<search>": 0.9, "<answer>": 0.1}})  # greedily, too
    searches.save(tmp_path / "policy", "compact")
    evaluated = [
        "--policy",
        tmp_path / "policy",
        "--dev_questions",
        toy / "dev.jsonl",
        "--eval_every",
        1,
        "--steps",
        1,
    ]
    assert command(toy, tmp_path / "run", "--retriever", spec, *evaluated) == 0
    found = generations(tmp_path / "run")
    assert found and all(name.startswith(begins) for name in found)


def test_a_wrong_retriever_file_is_one_line_before_a_model_loads(toy, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("class_path: Fuse\ninit_args: {parts: [none], depht: 2}")
    assert command(toy, tmp_path / "run", "--retriever", tmp_path / "r.yaml") == 2
    assert "r.yaml: init_args.depht: unknown key; Fuse takes parts" in capsys.readouterr().err


def test_search_reads_a_yaml_file_too(toy, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(FUSED.format(index=toy / "index"))
    assert sleuth.main(["search", "sea", "--retriever", str(tmp_path / "r.yaml"), "--top_k", "1"]) == 0
    assert "sea" in capsys.readouterr().out
    assert sleuth.main(["search", "sea", "--retriever", "none"]) == 0
    assert "nothing found" in capsys.readouterr().out
