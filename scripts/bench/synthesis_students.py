"""Students of written examples: tiny encoders whose truth is known, and MiniLM on human judgements."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.records import Qrels, Question
from retriever_server.retriever import Retriever
from retriever_server.training.synthesis.config import LabelRules

Bench = Any
"""`scripts.bench.synthesis.Bench`, which imports this module."""


def bm25(corpus: Corpus, folder: Path) -> Retriever:
    """BM25 of a corpus, made once."""
    from retriever_server.indexes.base import open_index
    from retriever_server.indexes.bm25 import BM25Index

    if not folder.exists():
        BM25Index.build(corpus, folder)
    return open_index(folder)


# ---- students ------------------------------------------------------------------------------------------


def students(bench: Bench, test: list[tuple[Question, str]], filters: dict[str, Any]) -> dict[str, Any]:
    """nDCG@10 of a tiny encoder on held-out entities and phrasings: a list of three seeds a variant."""
    held = {e.id for e in bench.oracle.world.entities if e.split == "test"}
    variants: dict[str, tuple[LabelRules, dict[str, Any]]] = {
        "seed": (LabelRules("seed", "none"), {}),
        "seed, far negative": (LabelRules("seed", "far"), {}),
        "best": (LabelRules("best", "none"), {}),
        "best, far negative": (LabelRules("best", "far"), {}),
        "seed, filtered": (LabelRules("seed", "none"), filters),
        "best, filtered": (
            LabelRules("best", "none"),
            {k: v for k, v in filters.items() if k != "round_trip"},
        ),
        "shuffled": (LabelRules("seed", "none"), {}),
    }
    found: dict[str, Any] = {}
    for name, (labels, kept) in variants.items():
        made = bench.run("student", 0, [bench.oracle], labels=labels, filters=kept)
        rows = [
            r
            for r in read_jsonl(made.path("examples"))
            if not held & {*r["positives"], *r.get("negatives", ())}
        ]
        if name == "shuffled":
            positives = [row["positives"] for row in rows]
            random.Random(0).shuffle(positives)
            rows = [{**row, "positives": each} for row, each in zip(rows, positives, strict=True)]
        slug = name.replace(", ", "-").replace(" ", "-")
        write_jsonl(bench.out / "examples" / f"{slug}.jsonl", rows)
        scores = [_student(bench, slug, seed, "far" in name, test) for seed in range(3)]
        found[name] = {"examples": len(rows), "nDCG@10": [round(s, 4) for s in scores]}
    untrained = [_student(bench, "untrained", seed, False, test) for seed in range(3)]
    found["untrained"] = {"examples": 0, "nDCG@10": [round(s, 4) for s in untrained]}
    found["BM25"] = {"nDCG@10": round(_ndcg(bench.bm25, test)[0], 4)}
    return found


def _student(bench: Bench, name: str, seed: int, negative: bool, test: list[tuple[Question, str]]) -> float:
    """nDCG@10 of a tiny encoder that was trained on these examples; kept."""
    from retriever_server.encoders.loading import load_encoder
    from retriever_server.indexes.flat import FlatIndex

    folder = bench.out / "students" / f"{name}-{seed}"
    if (folder / "score.json").exists():
        return read_json(folder / "score.json")
    base = {"config": {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2}, "seed": seed}
    base |= {"corpus": str(bench.corpus.path)}
    trained = name != "untrained"
    examples = bench.out / "examples" / f"{name if trained else 'seed'}.jsonl"
    dense = {"class_path": "dense", "init_args": {"base": base, "max_tokens": 96}}
    much: dict[str, Any] = (
        {"steps": 250, "learning_rate": 1e-3} if trained else {"steps": 1, "learning_rate": 1e-9}
    )
    model = _train(folder, dense, examples, bench.corpus, int(negative), seed=seed, **much)
    index = FlatIndex.build(bench.corpus, folder / "index", load_encoder(str(model)), overwrite=True)
    write_json(folder / "score.json", value := _ndcg(index, test)[0])
    return value


def _train(
    folder: Path, model: Any, examples: Path, corpus: Corpus, negatives: int = 0, **fields: Any
) -> Path:
    from retriever_server.training.recipe import DataConfig, RetrieverRecipe
    from retriever_server.training.run import train

    data = DataConfig(str(corpus.path), str(examples), negatives=negatives)
    loss = {"class_path": "MultipleNegativesRankingLoss", "init_args": {"scale": 20.0}}
    settings = {"batch_size": 32, "save_every": 10_000, "out": str(folder / "training"), **fields}
    done = train(RetrieverRecipe(model, loss, [data], **settings))
    assert done is not None
    return done


def _ndcg(retriever: Retriever, test: list[tuple[Question, str]]) -> tuple[float, dict[str, float]]:
    return _judged(retriever, [q for q, _ in test], {q.id: {gold: 1} for q, gold in test})


def _judged(retriever: Retriever, asked: list[Question], qrels: Qrels) -> tuple[float, dict[str, float]]:
    """nDCG@10, and that of each query."""
    from retriever_server.evaluation import judge, parse_metrics, rank_all

    values = judge(rank_all(retriever, asked, 100), qrels, parse_metrics("nDCG@10", 100))["nDCG@10"]
    return sum(values.values()) / len(values), values


# ---- a real domain -------------------------------------------------------------------------------------


def domain(bench: Bench, examples: str, collection: str, others: list[str]) -> dict[str, Any]:
    """nDCG@10 on human judgements: BM25, MiniLM frozen, trained on the examples, and on shuffled pairs."""
    from retriever_server.encoders.loading import load_encoder
    from retriever_server.evaluation import compare
    from retriever_server.indexes.base import open_index
    from retriever_server.indexes.flat import FlatIndex
    from scripts.bench.retriever_world import minilm

    corpus, folder = Corpus(Path(collection) / "corpus.jsonl"), bench.out / "domain"
    rows = list(read_jsonl(examples))
    positives = [row["positives"] for row in rows]
    random.Random(0).shuffle(positives)
    shuffled = [{**row, "positives": each} for row, each in zip(rows, positives, strict=True)]
    write_jsonl(folder / "shuffled.jsonl", shuffled)
    pretrained = {"class_path": "pretrained", "init_args": {"base": minilm(), "max_tokens": 128}}
    models = {"MiniLM": minilm()}
    for name, path in (
        ("MiniLM, trained", Path(examples)),
        ("MiniLM, shuffled pairs", folder / "shuffled.jsonl"),
    ):
        place = folder / name.replace(", ", "-").replace(" ", "-")
        settings = {"epochs": 3.0, "learning_rate": 2e-5, "batch_size": 32}
        models[name] = str(_train(place, pretrained, path, corpus, **settings))
    found: dict[str, Any] = {"examples": len(rows)}
    for at in (collection, *others):
        where, values = Path(at), {}
        asked, qrels = _collection(where)
        there = Corpus(where / "corpus.jsonl")
        values["BM25"] = _judged(bm25(there, folder / f"bm25-{where.name}"), asked, qrels)[1]
        for name, model in models.items():
            place = folder / f"index-{where.name}-{name.replace(', ', '-').replace(' ', '-')}"
            built = (
                open_index(place) if place.exists() else FlatIndex.build(there, place, load_encoder(model))
            )
            values[name] = _judged(built, asked, qrels)[1]
        means = {name: round(sum(of.values()) / len(of), 4) for name, of in values.items()}
        paired = {
            f"trained - {name}": compare({"nDCG@10": values["MiniLM, trained"]}, {"nDCG@10": values[name]})[
                "nDCG@10"
            ]
            for name in ("BM25", "MiniLM", "MiniLM, shuffled pairs")
        }
        found[where.name] = {"queries": len(asked), "nDCG@10": means, "paired": paired}
        write_json(bench.out / "domain-so-far.json", found)
    return found


def _collection(folder: Path) -> tuple[list[Question], Qrels]:
    from data.formats.beir import load_queries
    from data.formats.trec import load_qrels

    qrels = load_qrels(folder / "qrels.tsv")
    file = next(f for f in ("queries.jsonl", "dev.jsonl") if (folder / f).exists())
    return [q for q in load_queries(folder / file) if q.id in qrels][:500], qrels
