"""One line of a recipe changes the retriever: `sleuth train` with each kind, what answered on record."""

import json
import re
import shutil
import threading
import time
from pathlib import Path

import httpx
import pytest

from data.corpus import Corpus
from data.jsonl import read_jsonl
from data.run_dir import read_metrics
from retriever_server.indexes.base import read_manifest
from retriever_server.indexes.bm25 import BM25Index
from rl.co_training import live
from scripts import __main__ as sleuth
from scripts.train import train
from tests.retriever_server.running import build_small_index, running_server
from tests.retriever_server.tiny_encoders import tiny_model
from tests.scripts.test_train import command
from tests.toy import bigram_policy, toy_config

ATLAS = Path(__file__).parents[2] / "scripts/configs/atlas.yaml"
KINDS = {"dense": "flat", "sparse": "inverted", "multi": "maxsim"}
BEGINS = {
    **{"bm25": "bm25-", "flat": "flat-", "inverted": "inverted-", "maxsim": "maxsim-"},
    **{"hybrid.yaml": "fuse-", "reranked.yaml": "rerank(bm25-", "sharded.yaml": "sharded(bm25-"},
}
FILES = {
    "hybrid.yaml": "class_path: Fuse\ninit_args: {{parts: [{at}/bm25, {at}/flat]}}",
    "sharded.yaml": "class_path: Sharded\ninit_args: {{parts: [{at}/bm25], deadline_seconds: 60}}",
    "reranked.yaml": """
class_path: Cached
init_args:
  retriever:
    class_path: Rerank
    init_args:
      retriever: {at}/bm25
      scorer: {{class_path: CrossEncoder, init_args: {{model: {at}/cross, max_length: 64}}}}
      depth: 4
""",
}


def build_all(corpus: Path, at: Path) -> Path:
    """Every kind of retriever over this corpus in the folder `at`, each by its command or file."""
    for kind in ("bm25", *KINDS):
        encoder = [] if kind == "bm25" else ["--encoder", tiny_model(at / kind, kind)]
        index = ["--corpus", str(corpus), "--out", str(at / KINDS.get(kind, kind))]
        assert sleuth.main(["index", *index, *encoder]) == 0
    tiny_model(at / "cross", "cross")
    for name, text in FILES.items():
        (at / name).write_text(text.format(at=at))
    return at


def hits_of(file: Path) -> list[dict]:
    """Return the hits of all searches in a file of trajectories."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [hit for row in rows for search in row["searches"] for hit in search["hits"]]


def generations(file: Path) -> set[str]:
    return {hit["generation"] for hit in hits_of(file)}


def without_seconds(value):
    """A record without what the clock says."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def built(toy, tmp_path_factory):
    return build_all(toy / "corpus.jsonl", tmp_path_factory.mktemp("retrievers"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGINS)
def test_training_takes_whatever_opens_as_its_retriever(name, built, toy, tmp_path):
    kept = ["--steps", 1, "--keep_rollouts_every", 1]
    assert command(toy, tmp_path / "run", "--retriever", built / name, *kept) == 0
    found = generations(tmp_path / "run/rollouts/step-000001-0.jsonl")
    assert len(found) == 1 and found.pop().startswith(BEGINS[name])


@pytest.mark.slow
def test_the_recipe_of_the_embedded_world_takes_each_kind_by_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sleuth.main(["atlas", "--out", "runs/atlas"]) == 0
    build_all(Path("runs/atlas/corpus.jsonl"), tmp_path)
    few = ["--steps=2", "--eval_every=0", "--keep_rollouts_every=1"]
    few += ["--rollout.questions_per_step=2", "--rollout.group_size=4"]
    for name in BEGINS:
        recipe = re.sub("(?m)^retriever: .*$", f"retriever: {name}", ATLAS.read_text())
        Path("recipe.yaml").write_text(recipe)
        run = Path("runs", name)
        assert sleuth.main(["train", "--config", "recipe.yaml", "--out", str(run), *few]) == 0
        assert len(read_metrics(run)) == 2
        for step in (1, 2):
            hits = hits_of(run / f"rollouts/step-{step:06d}-0.jsonl")
            assert hits and all(hit["generation"].startswith(BEGINS[name]) for hit in hits)
            assert all("/" in hit["id"] for hit in hits)  # of this corpus: country/albania


def test_a_live_swap_between_steps_shows_in_the_trajectories(toy, tmp_path):
    index = build_small_index(tmp_path)
    with running_server(index, "--watch_seconds", "0.1") as server:

        def served() -> str:
            return httpx.get(f"{server.url}/healthz").json()["generation"]

        def swap(step: int) -> None:
            if step == 2:
                corpus = Corpus(tmp_path / "corpus.jsonl")
                BM25Index.build(corpus, index, overwrite=True, title_boost=2)
                deadline = time.monotonic() + 60
                while served() == before and time.monotonic() < deadline:
                    time.sleep(0.05)

        before = served()
        changes = {"steps": 3, "keep_rollouts_every": 1, "deterministic": False}
        train(toy_config(toy, tmp_path / "run", retriever=server.url, **changes), on_step=swap)
        after = served()
    assert before != after
    steps = [generations(tmp_path / f"run/rollouts/step-{step:06d}-0.jsonl") for step in (1, 2, 3)]
    assert steps == [{before}, {before}, {after}]


@pytest.mark.slow
def test_swaps_to_an_identical_retriever_change_no_greedy_trajectory(toy, tmp_path):
    bigram_policy({"</think>": {"<search>": 0.9, "<answer>": 0.1}}).save(tmp_path / "policy", "compact")
    (tmp_path / "token").write_text("word\n")
    shutil.copytree(toy / "index", tmp_path / "copy")
    live.put_in_place(toy / "index", tmp_path / "place")
    over, swaps = threading.Event(), []

    def written(name: str) -> bytes:
        asked = ["--questions", str(toy / "dev.jsonl"), "--retriever", server.url, "--keep_tokens", "true"]
        out = ["--out", str(tmp_path / name), "--policy", str(tmp_path / "policy")]
        assert sleuth.main(["evaluate", *asked, *out]) == 0
        rows = read_jsonl(tmp_path / name / "trajectories.jsonl")
        return json.dumps([without_seconds(row) for row in rows]).encode()

    def swap() -> None:
        while not over.is_set():
            live.put_in_place(tmp_path / "copy" if len(swaps) % 2 else toy / "index", tmp_path / "place")
            live.reload(server.url, str(tmp_path / "token"), read_manifest(toy / "index").generation)
            swaps.append(server.url)

    options = ["--admin_token_file", str(tmp_path / "token"), "--watch_seconds", "3600"]
    with running_server(tmp_path / "place", *options) as server:
        alone = written("alone")
        thread = threading.Thread(target=swap)
        thread.start()
        beside = written("beside")
        over.set()
        thread.join()
    assert alone == beside and swaps and b'"hits"' in alone


@pytest.mark.slow
def test_evaluations_during_training_name_what_answered(toy, tmp_path):
    searches = bigram_policy({"</think>": {"<search>": 0.9, "<answer>": 0.1}})  # greedily, too
    searches.save(tmp_path / "policy", "compact")
    dev = ["--dev_questions", toy / "dev.jsonl", "--eval_every", 1, "--steps", 1]
    policy = ["--policy", tmp_path / "policy"]
    assert command(toy, tmp_path / "run", *policy, *dev) == 0
    (found,) = generations(tmp_path / "run/evaluations/dev-000001/trajectories.jsonl")
    assert found.startswith("bm25-")


def test_a_wrong_retriever_file_is_one_line_before_a_model_loads(toy, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("class_path: Fuse\ninit_args: {parts: [none], depht: 2}")
    assert command(toy, tmp_path / "run", "--retriever", tmp_path / "r.yaml") == 2
    assert "r.yaml: init_args.depht: unknown key; Fuse takes parts" in capsys.readouterr().err


def test_search_reads_a_yaml_file_too(toy, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(f"class_path: Cached\ninit_args: {{retriever: {toy / 'index'}}}")
    assert sleuth.main(["search", "sea", "--retriever", str(tmp_path / "r.yaml"), "--top_k", "1"]) == 0
    assert "sea" in capsys.readouterr().out
    assert sleuth.main(["search", "sea", "--retriever", "none"]) == 0
    assert "nothing found" in capsys.readouterr().out
