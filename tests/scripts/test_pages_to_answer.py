"""Pages of a folder of PDFs, an index of screenshots, a server, and an agent's answers."""

from __future__ import annotations

import asyncio
import textwrap
from pathlib import Path

import pytest
import yaml

from agent.protocol import COMPACT
from agent.rollout import Agent
from agent.trajectory import Trajectory
from data.jsonl import read_json, read_jsonl, write_jsonl
from data.run_dir import read_metrics
from retriever_server.client.search_client import connect
from scripts import __main__ as sleuth
from tests.fakes import question
from tests.pdfs import write_pdf
from tests.retriever_server.running import running_server
from tests.retriever_server.training.recipes import component
from tests.vision import Turns, seeing_policy

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 1}
RECIPES = Path(__file__).parents[2] / "scripts/configs"


def run(*words) -> None:
    assert sleuth.main([str(word) for word in words]) == 0


def write_reports(world: Path, folder: Path, count: int) -> None:
    """A PDF of one page for each of the first entities that one-hop questions are about; those questions."""
    passages = {passage["id"]: passage for passage in read_jsonl(world / "corpus.jsonl")}
    asked, pairs = [], []
    for row in read_jsonl(world / "dev.jsonl"):
        facts = row["metadata"]
        entity = facts["entities"][0]
        if facts["kind"] == "one_hop" and entity in passages and len(asked) < count:
            name = entity.replace("/", "-")
            if not (folder / f"{name}.pdf").exists():
                text = "\n".join(textwrap.wrap(passages[entity]["text"], 42))
                folder.mkdir(exist_ok=True)
                write_pdf(folder / f"{name}.pdf", [text], title=passages[entity]["title"])
            asked.append(row)
            positive = f"{name}.pdf#page=1"
            pairs.append({"query_id": f"q{len(pairs)}", "query": facts["hops"][0], "positives": [positive]})
    write_jsonl(world / "asked.jsonl", asked)
    write_jsonl(world / "examples.jsonl", pairs)


def write_recipe(world: Path, corpus: Path) -> Path:
    """Return the folder of a screenshot encoder that learns these few pages by heart."""
    text = {"model_type": "bert", **SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    image = {"model_type": "vit", **SIZES, "image_size": [64, 96], "patch_size": 16}
    recipe = {
        "model": component(
            "two_tower_pages",
            base={"config": text, "corpus": str(world / "corpus.jsonl"), "vocabulary": 600},
            image_base={"config": image},
            dimension=64,
            max_tokens=16,
        ),
        "loss": component("MultipleNegativesRankingLoss", scale=20.0),
        "train": [{"examples": str(world / "examples.jsonl"), "corpus": str(corpus)}],
        "inputs": "image",
        "batch_size": 16,
        "learning_rate": 2e-3,
        "steps": 120,
        "save_every": 1000,
        "device": "cpu",
        "out": str(world / "encoder"),
    }
    path = world / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_pdfs_become_pages_an_index_a_server_and_answers(tmp_path):
    run("atlas", "--out", tmp_path)
    write_reports(tmp_path, tmp_path / "reports", 24)
    corpus = tmp_path / "pages/corpus.jsonl"
    run("render", tmp_path / "reports", "--out", tmp_path / "pages", "--max_side", 192, "--processes", 1)
    run("train-retriever", "--config", write_recipe(tmp_path, corpus))
    encoder = ["--encoder", tmp_path / "encoder/model", "--device", "cpu"]
    run("index", "--corpus", corpus, *encoder, "--out", tmp_path / "index")
    with running_server(tmp_path / "index") as server:
        asked = ["--questions", tmp_path / "asked.jsonl", "--retriever", server.url]
        run("evaluate", "--policy", "atlas", *asked, "--out", tmp_path / "answers")
        trajectory = look(server.url, tmp_path / "seeing")
    assert read_json(tmp_path / "answers/scores.json")["em"]["mean"] > 0.5
    records = list(read_jsonl(tmp_path / "answers/trajectories.jsonl"))
    hits = [hit for row in records for search in row["searches"] for hit in search["hits"]]
    assert hits and all(hit["image"].startswith(server.url) for hit in hits)
    [picture] = trajectory.pictures
    assert picture.source.startswith(server.url) and trajectory.answer == "yes"
    pages = ["--retriever", tmp_path / "index", "--questions", tmp_path / "asked.jsonl"]
    dev = ["--dev_questions", tmp_path / "asked.jsonl", "--eval_limit", 4, "--device", "cpu"]
    size = ["--steps", 2, "--rollout.questions_per_step", 2, "--rollout.group_size", 4]
    out = ["--out", tmp_path / "trained"]
    run("train", "--config", RECIPES / "atlas_pages.yaml", *pages, *dev, *size, *out)
    rows = [row for row in read_metrics(tmp_path / "trained") if "rollout/searches" in row]
    assert len(rows) == 2 and all(row["stop/search_failed"] == 0 < row["rollout/searches"] for row in rows)


def look(url: str, folder: Path) -> Trajectory:
    """Return what a policy with eyes is shown of the server's pages."""
    policy = seeing_policy(folder)

    async def ask() -> Trajectory:
        async with connect(url) as client:
            engine = Turns(policy.tokenizer, "<search>Mexico</search>", "<answer>yes</answer>")
            agent = Agent(engine, policy.tokenizer, client, COMPACT, vision=policy.vision)
            return (await agent.rollout([question()]))[0]

    return asyncio.run(ask())
