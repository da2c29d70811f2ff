"""A world small enough to train a retriever on in a second: rivers, their examples, dev queries, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.jsonl import write_jsonl
from retriever_server.training.recipe import RetrieverRecipe

COUNT = 48
NAMES = [f"{a}{b}" for a in ("ama", "dan", "niger", "rhei", "vol", "gang") for b in "bcdfghkl"]


def world(folder: Path) -> Path:
    """Corpus, examples with negatives and scores, dev queries and qrels in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    passages = [
        {"id": str(i), "title": NAMES[i], "text": f"the river {NAMES[i]} is {i} miles long"}
        for i in range(COUNT)
    ]
    write_jsonl(folder / "corpus.jsonl", passages)
    rows = [
        {
            "query_id": f"q{i}", "query": f"how long is {NAMES[i]}", "positives": [str(i)],
            "negatives": [str((i + 1) % COUNT), str((i + 2) % COUNT)],
            "scores": {str(i): 5.0, str((i + 1) % COUNT): 1.0, str((i + 2) % COUNT): 0.0},
        }
        for i in range(COUNT)
    ]  # fmt: skip
    write_jsonl(folder / "examples.jsonl", rows)
    write_jsonl(folder / "dev.jsonl", [{"id": r["query_id"], "question": r["query"]} for r in rows[:12]])
    lines = "".join(f"q{i}\t{i}\t1\n" for i in range(12))
    (folder / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    return folder


TOPICS = ["river", "fox", "sea", "city", "capital", "north", "blue", "old", "small", "big", "red", "one"]


def topics(folder: Path) -> Path:
    """Twelve passages with expansions, and examples of ten of them with negatives and scores, in a folder."""
    passages = [
        {"id": t, "title": t, "text": f"the {t} is here", "metadata": {"expansion": f"where {t}?"}}
        for t in TOPICS
    ]
    write_jsonl(folder / "corpus.jsonl", passages)
    rows = []
    for topic, *others in zip(TOPICS, TOPICS[1:], TOPICS[2:], strict=False):
        asked = {"query_id": topic, "query": f"where is the {topic}?", "positives": [topic]}
        scores = {topic: 4.0, **dict.fromkeys(others, 1.0)}
        rows.append({**asked, "negatives": others, "scores": scores})
    write_jsonl(folder / "examples.jsonl", rows)
    return folder


def base(folder: Path, **config: Any) -> dict[str, Any]:
    """A random BERT of one layer of 32, kept in the folder."""
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, **config}
    settings = {"config": config, "corpus": str(folder / "corpus.jsonl"), "vocabulary": 300}
    return {**settings, "folder": str(folder / "-".join(map(str, config.values())))}


def component(name: str, **arguments: Any) -> dict[str, Any]:
    """A class_path with its init_args."""
    return {"class_path": name, "init_args": arguments}


def settings(folder: Path, out: Path | str, **changes: Any) -> dict[str, Any]:
    """The fields of a recipe of six steps on the world in `folder`, as a mapping."""
    examples, corpus = str(folder / "examples.jsonl"), str(folder / "corpus.jsonl")
    return {
        "model": component("dense", base=base(folder), query_prompt="query: ", max_tokens=24),
        "loss": component("MultipleNegativesRankingLoss", scale=20.0),
        "train": [{"examples": examples, "corpus": corpus}],
        "out": str(out),
        "steps": 6,
        "batch_size": 16,
        "save_every": 2,
        "log_every": 1,
        "learning_rate": 2e-3,
        "device": "cpu",
        **changes,
    }


def recipe(folder: Path, out: Path | str, **changes: Any) -> RetrieverRecipe:
    """The recipe of `settings`."""
    from data.settings import LoraConfig
    from retriever_server.training.recipe import DataConfig, DevConfig

    fields = settings(folder, out, **changes)
    fields["train"] = [DataConfig(**each) for each in fields["train"]]
    for name, of in (("dev", DevConfig), ("lora", LoraConfig)):
        if name in fields:
            fields[name] = of(**fields[name])
    return RetrieverRecipe(**fields)
