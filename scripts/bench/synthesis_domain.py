"""A collection without training questions: MiniLM trained on written examples, judged by people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.metrics.significance import estimate
from retriever_server.training.recipe import DataConfig
from scripts.bench.retriever_world import minilm
from scripts.bench.synthesis_students import bm25, collection, mean, ndcg, search, shuffled, train


def domain(
    out: Path, examples: str, where: str, others: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """nDCG@10 on human judgements: BM25, MiniLM frozen, trained on the examples, and on shuffled pairs."""
    corpus, folder = Corpus(Path(where) / "corpus.jsonl"), out / "domain"
    negatives = int(settings.pop("negatives", 0))
    rows = list(read_jsonl(examples))
    write_jsonl(folder / "shuffled.jsonl", shuffled(rows))
    model = {"class_path": "pretrained", "init_args": {"base": minilm(), "max_tokens": 128}}
    sources = {"trained": Path(examples), "shuffled": folder / "shuffled.jsonl"}
    models = {"frozen": Path(minilm())}
    for name, path in sources.items():
        data = [DataConfig(str(corpus.path), str(path), negatives=negatives)]
        models[name] = train(folder / name, model, data, settings)
    found: dict[str, Any] = {"examples": len(rows), **settings}
    for at in map(Path, (where, *others)):
        asked, qrels = collection(at)
        there, scores = Corpus(at / "corpus.jsonl"), {}
        scores["BM25"] = ndcg(bm25(there, folder / f"bm25-{at.name}"), asked, qrels)
        for name, path in models.items():
            kept = folder / f"{name}-{at.name}.json"
            if not kept.exists():
                write_json(kept, search(folder, f"{name}-{at.name}", path, there, asked, qrels))
            scores[name] = read_json(kept)
        ids = [each.id for each in asked]
        found[at.name] = {
            "queries": len(asked), "nDCG@10": {name: mean(of) for name, of in scores.items()},
            "trained -": {
                name: estimate(np.subtract(scores["trained"], of)[:, None], ids)[0]
                for name, of in scores.items() if name != "trained"
            },
        }  # fmt: skip
    return found
