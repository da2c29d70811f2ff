"""Pairs become a live retriever: mined, trained, indexed, swapped in a server, asked by the agent."""

from __future__ import annotations

import time

import httpx
import pytest
import yaml

from data.jsonl import read_json, read_jsonl, write_jsonl
from scripts import __main__ as sleuth
from tests.retriever_server.running import running_server
from tests.retriever_server.training.recipes import component

pytestmark = pytest.mark.slow


def run(*words) -> None:
    assert sleuth.main([str(word) for word in words]) == 0


def write_pairs(folder) -> None:
    """The agent's query, the name that a question holds, with the passage of that entity."""
    ids = {passage["id"] for passage in read_jsonl(folder / "corpus.jsonl")}
    pairs = {}
    for question in read_jsonl(folder / "train.jsonl"):
        facts = question["metadata"]
        if facts["kind"] == "one_hop" and facts["entities"][0] in ids:
            pairs[facts["hops"][0]] = facts["entities"][0]
    rows = [{"query_id": f"p{i}", "query": q, "positives": [p]} for i, (q, p) in enumerate(pairs.items())]
    write_jsonl(folder / "examples.jsonl", rows)


def exact_match(url, folder, name) -> float:
    asked = ["--questions", folder / "one_hop.jsonl", "--retriever", url, "--out", folder / name]
    run("evaluate", "--policy", "atlas", *asked)
    return read_json(folder / name / "scores.json")["em"]["mean"]


def test_from_pairs_to_a_better_agent(tmp_path):
    run("atlas", "--out", tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    write_pairs(tmp_path)
    asked = [q for q in read_jsonl(tmp_path / "dev.jsonl") if q["metadata"]["kind"] == "one_hop"]
    write_jsonl(tmp_path / "one_hop.jsonl", asked[:80])
    run("index", "--corpus", corpus, "--out", tmp_path / "bm25")
    run("mine", "--queries", tmp_path / "examples.jsonl", "--retriever", tmp_path / "bm25",
        "--out", tmp_path / "mined.jsonl", "--per_query", 2)  # fmt: skip
    base = {"config": {"model_type": "bert"}, "corpus": str(corpus), "folder": str(tmp_path / "tiny")}
    recipe = {
        "model": component("dense", base=base, max_tokens=64),
        "loss": component("MultipleNegativesRankingLoss", scale=20.0),
        "train": [{"examples": str(tmp_path / "mined.jsonl"), "corpus": str(corpus), "negatives": 1}],
        "batch_size": 32,
        "learning_rate": 1e-3,
        "save_every": 1000,
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train = ["train-retriever", "--config", tmp_path / "recipe.yaml"]
    index = ["index", "--corpus", corpus, "--out", tmp_path / "live", "--device", "cpu"]
    run(*train, "--steps", 1, "--learning_rate", 1e-9, "--out", tmp_path / "untrained")
    run(*index, "--encoder", tmp_path / "untrained/model")
    with running_server(tmp_path / "live", "--watch_seconds", "0.2") as server:
        first = httpx.get(f"{server.url}/healthz", timeout=60).json()["generation"]
        before = exact_match(server.url, tmp_path, "before")
        run(*train, "--steps", 300, "--out", tmp_path / "trained", "--serves", tmp_path / "live")
        run(*index, "--encoder", tmp_path / "trained/model", "--overwrite", "true")
        end = time.monotonic() + 60
        while httpx.get(f"{server.url}/healthz", timeout=60).json()["generation"] == first:
            assert time.monotonic() < end, "the server did not take up the new index"
            time.sleep(0.1)
        after = exact_match(server.url, tmp_path, "after")
    hits = [
        hit["generation"]
        for row in read_jsonl(tmp_path / "after/trajectories.jsonl")
        for search in row["searches"]
        for hit in search["hits"]
    ]
    assert hits and first not in hits
    assert after > before + 0.2
