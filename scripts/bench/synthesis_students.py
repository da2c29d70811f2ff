"""Students of written examples: encoders that learn from extracts of SQuAD and answer people's questions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.metrics.significance import estimate
from data.records import Qrels, Question
from retriever_server.retriever import Retriever
from retriever_server.training.recipe import Component, DataConfig, RetrieverRecipe
from retriever_server.training.synthesis.config import EvaluationSet, LabelRules, SynthesisConfig
from retriever_server.training.synthesis.pipeline import Synthesis
from retriever_server.training.synthesis.results import write_results
from scripts.bench.retriever_world import TINY, minilm
from scripts.bench.synthesis_templates import Extracts, HasAllWords

FILTERED: dict[str, Any] = {"quotes": {}, "answerable": {"required": True}, "duplicates": {}}
LABELS: dict[str, tuple[LabelRules, dict[str, Any]]] = {
    "seed": (LabelRules("seed", "none"), {}),
    "seed, far": (LabelRules("seed", "far"), {}),
    "best": (LabelRules("best", "none"), {}),
    "best, far": (LabelRules("best", "far"), {}),
    "seed, filtered": (LabelRules("seed", "none"), {"round_trip": {}, **FILTERED}),
    "best, filtered": (LabelRules("best", "none"), FILTERED),
}
"""Variant -> its labels and filters. The judge repairs wrong seeds; without it the round trip drops them."""
MIXTURES = ["200 real", "200 real + best, filtered", "2000 real", "2000 real + best, filtered"]
"""Sets of examples with a plus between them; a batch comes from one of them, each in turn."""
TINY_STUDENTS = ["untrained", *LABELS, "shuffled", *MIXTURES]
MINILM_STUDENTS = ["untrained", "seed", "best", "shuffled"]
PAIRED = [
    ("best", "seed"), ("seed, far", "seed"), ("best, far", "best"), ("best, far", "seed"),
    ("seed, filtered", "seed"), ("best, filtered", "best"), ("shuffled", "seed"),
    ("200 real + best, filtered", "200 real"), ("2000 real + best, filtered", "2000 real"),
    ("seed", "untrained"), ("best", "untrained"), ("shuffled", "untrained"),
]  # fmt: skip


def tiny_students(out: Path, data: Path, faults: dict[str, float], drafts: int) -> dict[str, Any]:
    """Measure the whole grid with a tiny encoder and three seeds."""
    world = Squad(out, data, faults, drafts)
    base = {"config": TINY, "corpus": str(world.corpus.path)}
    model = {"class_path": "dense", "init_args": {"base": base, "max_tokens": 96}}
    much = {"steps": 200, "learning_rate": 1e-3}
    return world.grid("tiny", TINY_STUDENTS, model, much, range(3), world.part(2000), {})


def minilm_students(out: Path, data: Path, faults: dict[str, float], drafts: int) -> dict[str, Any]:
    """Measure MiniLM with one seed, also on two collections that were not in training."""
    world = Squad(out, data, faults, drafts)
    model = {"class_path": "pretrained", "init_args": {"base": minilm(), "max_tokens": 64}}
    others = {name: data / "ir" / name for name in ("cranfield", "cisi")}
    much = {"steps": 60, "learning_rate": 1e-4}  # enough for pairs that are wrong to harm
    return world.grid("MiniLM", MINILM_STUDENTS, model, much, range(1), world.part(600), others)


class Squad:
    """The articles of SQuAD: extracts of the train ones teach, the questions about the dev ones judge.

    No passage of a dev article is a seed, a positive or a negative.
    """

    def __init__(self, out: Path, data: Path, faults: dict[str, float], drafts: int) -> None:
        self.folder, self.squad, self.drafts = out / "students", data / "squad", drafts
        self.corpus = Corpus(self.squad / "corpus.jsonl")
        self.bm25 = bm25(self.corpus, self.folder / "bm25")
        self.generator = Extracts(str(self.corpus.path), faults)
        rows = list(read_jsonl(self.squad / "dev.jsonl"))
        self.asked = [Question(row["id"], row["question"], ()) for row in rows]
        self.qrels: Qrels = {r["id"]: dict.fromkeys(r["metadata"]["supporting_ids"], 1) for r in rows}
        self.held = {id_ for of in self.qrels.values() for id_ in of}

    def part(self, size: int) -> Corpus:
        """The passages of the dev articles and random others, `size` in all."""
        path = self.folder / f"part-{size}" / "corpus.jsonl"
        if not path.exists():
            rows = list(read_jsonl(self.corpus.path))
            random.Random(0).shuffle(rows)
            write_jsonl(path, sorted(rows, key=lambda row: row["id"] not in self.held)[:size])
        return Corpus(path)

    def examples(self, name: str) -> Path:
        """The file of a set of examples, made once."""
        path = self.folder / "examples" / f"{slug(name)}.jsonl"
        if not path.exists():
            write_jsonl(path, self._real(int(name.split()[0])) if "real" in name else self._written(name))
        return path

    def _real(self, count: int) -> Iterator[dict[str, Any]]:
        for row in random.Random(0).sample(list(read_jsonl(self.squad / "train.jsonl")), count):
            yield {"query": row["question"], "positives": row["metadata"]["supporting_ids"][:1]}

    def _written(self, name: str) -> list[dict[str, Any]]:
        labels, filters = LABELS["seed" if name == "shuffled" else name]
        config = SynthesisConfig(
            recipe="fret", generator={"class_path": "Extracts"}, corpus=str(self.corpus.path),
            out=str(self.folder / "written"), limit=self.drafts, per_passage=2,
            labels=labels, filters=filters,
            evaluation=[EvaluationSet(str(self.squad / "dev.jsonl"), str(self.squad / "qrels.tsv"))],
        )  # fmt: skip
        made = Synthesis(config, self.generator, self.corpus, self.bm25, [HasAllWords()])
        write_results(made, made.run())
        rows = [r for r in read_jsonl(made.path("examples")) if not self.held & set(r.get("negatives", ()))]
        return shuffled(rows) if name == "shuffled" else rows

    def grid(
        self, student: str, names: list[str], model: Component, much: dict[str, Any], seeds: range,
        searched: Corpus, others: dict[str, Path],
    ) -> dict[str, Any]:  # fmt: skip
        """nDCG@10 of each variant by seed, and paired differences of its mean, on SQuAD and elsewhere."""
        tests = {"squad": (searched, self.asked, self.qrels)}
        tests |= {name: (Corpus(at / "corpus.jsonl"), *collection(at)) for name, at in others.items()}
        scores: dict[str, dict[str, list[list[float]]]] = {where: {} for where in tests}
        for seed in seeds:
            for name in names:
                place = self.folder / student / f"{slug(name)}-{seed}"
                for where, values in self._score(place, name, model, {**much, "seed": seed}, tests).items():
                    scores[where].setdefault(name, []).append(values)
        counts = {n: sum(1 for _ in read_jsonl(self.examples(n))) for n in (*LABELS, "shuffled")}
        found: dict[str, Any] = {"examples": counts}
        for where, (corpus, asked, qrels) in tests.items():
            lexical = ndcg(bm25(corpus, self.folder / f"bm25-{where}-{len(corpus)}"), asked, qrels)
            found[where] = _compared(scores[where], qrels) | {"BM25": mean(lexical)}
        return found

    def _score(
        self, place: Path, name: str, model: Component, much: dict[str, Any], tests: dict[str, Any]
    ) -> dict[str, list[float]]:
        """Collection -> nDCG@10 of each query, by a model that is trained and kept."""
        if not (place / "scores.json").exists():
            sets = [self.examples("seed" if name == "untrained" else each) for each in name.split(" + ")]
            far = int(name.endswith("far"))
            data = [DataConfig(str(self.corpus.path), str(each), negatives=far) for each in sets]
            settings = {**much, "steps": 1, "learning_rate": 1e-9} if name == "untrained" else much
            trained = train(place, model, data, settings)
            found = {where: search(place, where, trained, *test) for where, test in tests.items()}
            write_json(place / "scores.json", found)
        return read_json(place / "scores.json")


def _compared(scores: dict[str, list[list[float]]], qrels: Qrels) -> dict[str, Any]:
    """Means by seed; differences of means over the seeds, with gold passages as clusters."""
    clusters = [min(of) for of in qrels.values()]
    over = {name: np.array(of).mean(0) for name, of in scores.items()}
    paired = {
        f"{ours} - {other}": estimate((over[ours] - over[other])[:, None], clusters)[0]
        for ours, other in PAIRED
        if ours in over and other in over
    }
    return {"nDCG@10": {name: [mean(each) for each in of] for name, of in scores.items()}, "paired": paired}


# ---- what the parts share ------------------------------------------------------------------------------


def bm25(corpus: Corpus, folder: Path) -> Retriever:
    """BM25 of a corpus, made once."""
    from retriever_server.indexes.base import open_index
    from retriever_server.indexes.bm25 import BM25Index

    if not folder.exists():
        BM25Index.build(corpus, folder)
    return open_index(folder)


def train(place: Path, model: Component, data: list[DataConfig], settings: dict[str, Any]) -> Path:
    """The folder of a model trained with in-batch negatives; a run that was stopped goes on."""
    from retriever_server.training.run import train as train_by

    loss = {"class_path": "MultipleNegativesRankingLoss", "init_args": {"scale": 20.0}}
    done = train_by(RetrieverRecipe(model, loss, data, out=str(place / "training"), **settings))
    assert done is not None
    return done


def search(
    place: Path, name: str, model: Path, corpus: Corpus, asked: Sequence[Question], qrels: Qrels
) -> list[float]:
    """nDCG@10 of each query by a dense index, made in PLACE/NAME."""
    from retriever_server.encoders.loading import load_encoder
    from retriever_server.indexes.flat import FlatIndex

    encoder = load_encoder(str(model))
    return ndcg(FlatIndex.build(corpus, place / name, encoder, overwrite=True), asked, qrels)


def ndcg(retriever: Retriever, asked: Sequence[Question], qrels: Qrels) -> list[float]:
    """nDCG@10 of each query."""
    from retriever_server.evaluation import judge, parse_metrics, rank_all

    values = judge(rank_all(retriever, asked, 10), qrels, parse_metrics("nDCG@10", 10))["nDCG@10"]
    return [values[question.id] for question in asked]


def collection(folder: Path) -> tuple[list[Question], Qrels]:
    """The judged questions of a collection, 500 at most, and what answers them."""
    from data.formats.beir import load_queries
    from data.formats.trec import load_qrels

    qrels = load_qrels(folder / "qrels.tsv")
    asked = [each for each in load_queries(folder / "queries.jsonl") if each.id in qrels][:500]
    return asked, {each.id: qrels[each.id] for each in asked}


def shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Queries with the positives of others: the control that must fail."""
    positives = [row["positives"] for row in rows]
    random.Random(0).shuffle(positives)
    return [{**row, "positives": each} for row, each in zip(rows, positives, strict=True)]


def mean(values: Sequence[float]) -> float:
    """The mean, rounded."""
    return round(sum(values) / len(values), 4)


def slug(name: str) -> str:
    """A name as that of a folder."""
    return name.replace(", ", "-").replace(" + ", "-and-").replace(" ", "-")
