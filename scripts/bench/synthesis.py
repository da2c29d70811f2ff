"""The reach of synthesis, measured where the truth is known.

    python -m scripts.bench.synthesis [--out runs/bench_synthesis] [--parts '[hard]'] [--judge smollm2]

Each part is kept as OUT/PART.json, so that the same command goes on where it was stopped.

faults    planted in questions of the embedded world (three seeds): what relabelling repairs by the oracle, by
          random numbers and, with --judge, by a language model; precision and recall of every filter
judges    gold@1 and AUC of the judges of --judge by kind of question
hard      BM25's recall@10 on direct and on indirect questions, all of them answerable
students  a tiny encoder (three seeds) that learns from extracts of SQuAD with planted faults: four kinds of
          labels, filtered or not, beside 200 and 2,000 real pairs, shuffled; asked people's questions
minilm    the same with MiniLM (one seed), also on two collections that were not in training
domain    a collection without training questions: the examples of --examples train MiniLM, which is held
          against itself frozen and BM25 on the human judgements of --collection
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.atlas.questions import make_questions
from data.corpus import Corpus
from data.errors import ConfigError
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.metrics.answers import normalize_unicode
from data.records import Passage, Qrels, Question
from retriever_server.retriever import Scorer
from retriever_server.training.synthesis.config import LabelRules, SynthesisConfig
from retriever_server.training.synthesis.filters import make_filters
from scripts.bench.synthesis_domain import domain
from scripts.bench.synthesis_students import bm25, minilm_students, tiny_students
from scripts.bench.synthesis_templates import AtlasOracle, AtlasTemplates, RandomJudge, corpus_rows

FAULTS = {"wrong_seed": 0.15, "duplicate": 0.2, "quote": 0.1, "unanswerable": 0.1}
FILTERS: dict[str, Any] = {"quotes": {}, "answerable": {"required": True}, "round_trip": {}, "duplicates": {}}
CATCHES = {
    "quotes": "quote",
    "answerable": "unanswerable",
    "round_trip": "wrong_seed",
    "duplicates": "duplicate",
}
"""Filter -> the fault that it is for."""


class Bench:
    """The folder of a measurement, with the corpus of the embedded world and its BM25."""

    def __init__(self, out: Path, judge: str | None, drafts: int, data: str) -> None:
        self.out, self.judge, self.drafts, self.data = out, judge, drafts, Path(data)
        self.oracle = AtlasOracle()
        if not (out / "corpus.jsonl").exists():
            write_jsonl(out / "corpus.jsonl", corpus_rows(self.oracle.world))
        self.corpus = Corpus(out / "corpus.jsonl")
        self.bm25 = bm25(self.corpus, out / "bm25")

    def run(self, name: str, seed: int, judges: list[Scorer], **fields: Any) -> Any:
        """A synthesis over the world, made once; its examples lie in OUT/runs/NAME."""
        from retriever_server.training.synthesis.pipeline import Synthesis
        from retriever_server.training.synthesis.results import write_results

        generator = AtlasTemplates(FAULTS)
        settings = {"recipe": "fret", "limit": self.drafts, "per_passage": 2, "candidates": 10, **fields}
        made = Synthesis(
            SynthesisConfig(
                generator={"class_path": "AtlasTemplates"}, corpus=str(self.corpus.path), seed=seed,
                out=str(self.out / "runs" / name), **settings,
            ),
            generator, self.corpus, self.bm25, judges,
        )  # fmt: skip
        write_results(made, made.run())
        return made

    def passages(self, ids: set[str]) -> dict[str, Passage]:
        """The passages of these ids."""
        return {id_: p for id_ in ids if (p := self.corpus.get(id_)) is not None}


# ---- faults ------------------------------------------------------------------------------------------


def faults(bench: Bench) -> dict[str, Any]:
    """Repairs of wrong seeds by each judge, and precision and recall of the filters; a row a seed."""
    judges: dict[str, Scorer] = {"oracle": bench.oracle, "random": RandomJudge()}
    if bench.judge:
        from retriever_server.training.synthesis.judges import QueryLikelihood

        judges["query likelihood"] = QueryLikelihood(bench.judge, dtype="bfloat16")
    found: dict[str, Any] = {"repairs": {}, "filters": []}
    for name, judge in judges.items():
        rows = []
        for seed in range(3 if name in ("oracle", "random") else 1):
            made = bench.run(f"{name}-{seed}", seed, [judge], labels=LabelRules("best", "far"))
            rows.append(_repairs(bench, made))
        found["repairs"][name] = rows
    for seed in range(3):
        made = bench.run(f"seed-{seed}", seed, [])
        found["filters"].append(_filters(bench, made))
    return found


def _repairs(bench: Bench, made: Any) -> dict[str, float]:
    """Shares of drafts that a passage answers: wrong seeds with a right positive now, right ones lost."""
    counts: Counter[str] = Counter()
    for row in read_jsonl(made.path("examples")):
        query = str(row["query"])
        seed, positive = row["provenance"]["seed_passage"], row["positives"][0]
        known = bench.passages({seed, positive})
        right = {id_: bench.oracle.score([(query, p)])[0] > 0 for id_, p in known.items()}
        if right[seed]:
            counts["right seeds"] += 1
            counts["right seeds lost"] += not right[positive]
        elif normalize_unicode(query) in bench.oracle._truth:
            counts["wrong seeds"] += 1
            counts["repaired"] += right[positive]
    return {
        **counts,
        "repaired share": round(counts["repaired"] / counts["wrong seeds"], 4),
        "lost share": round(counts["right seeds lost"] / counts["right seeds"], 4),
    }


def _filters(bench: Bench, made: Any) -> dict[str, Any]:
    """Each filter alone, and all: of what it keeps, free of its own fault; of the good ones, kept; ..."""
    drafts = list(_drafts(bench, made))
    planted = Counter(fault for _, of in drafts for fault in of)
    table: dict[str, Any] = {"planted": {name: round(n / len(drafts), 4) for name, n in planted.items()}}
    for name in (*FILTERS, "all together"):
        chosen = {name: FILTERS[name]} if name in FILTERS else FILTERS
        own = {CATCHES[each] for each in chosen}
        checks = make_filters(chosen, bench.corpus).values()
        kept = [not any(isinstance(check(draft), str) for check in checks) for draft, _ in drafts]
        rejected = [not each for each in kept]
        faulty, caught = [bool(of) for _, of in drafts], [bool(own & of) for _, of in drafts]
        table[name] = {
            "kept, free of its fault": 1 - _share(caught, kept),
            "without fault, kept": _share(kept, [not each for each in faulty]),
            "rejected, faulty": _share(faulty, rejected),
            "its fault, rejected": _share(rejected, caught),
        }
        table[name] = {what: round(value, 4) for what, value in table[name].items()}
    return table


def _share(those: list[bool], among: list[bool]) -> float:
    return sum(a for a, b in zip(those, among, strict=True) if b) / max(1, sum(among))


def _drafts(bench: Bench, made: Any) -> Any:
    """Each draft with its true faults: a seed that does not answer, a question asked before, ..."""
    from retriever_server.training.synthesis.drafts import Draft

    asked: set[str] = set()
    for row, found in zip(made.rows("generated"), made.rows("candidates"), strict=True):
        import json

        query, fault = row["fields"]["query"], json.loads(row["raw"][0])["fault"]
        passage = bench.corpus.get(row["seed"])
        assert passage is not None
        true = {fault} & {"quote", "unanswerable"}
        if not true and not bench.oracle.score([(query, passage)])[0]:
            true.add("wrong_seed")
        if normalize_unicode(query) in asked:
            true.add("duplicate")
        asked.add(normalize_unicode(query))
        hits = tuple(map(tuple, found["hits"]))
        yield Draft(row["id"], row["seed"], row["fields"], hits=hits, positive=row["seed"]), true


# ---- judges and hard queries ---------------------------------------------------------------------------


def judges(bench: Bench) -> dict[str, Any]:
    """Gold@1 and AUC of query likelihood and relevance by a language model, by kind of question."""
    from retriever_server.training.synthesis.judges import QueryLikelihood, Relevance, measure
    from scripts.console import bar

    if not bench.judge:
        raise ConfigError("judge: the part judges needs one, such as --judge smollm2")
    asked = [(q, gold) for q, gold in _questions(bench, "dev") if q.metadata["kind"] != "comparison"]
    chosen = [
        each
        for kind in ("one_hop", "two_hop")
        for each in [a for a in asked if a[0].metadata["kind"] == kind][:30]
    ]
    qrels: Qrels = {q.id: {gold: 1} for q, gold in chosen}
    both = [QueryLikelihood(bench.judge), Relevance(bench.judge)]
    return measure(both, [q for q, _ in chosen], qrels, bench.bm25, bench.corpus, 7, bar)


def hard(bench: Bench) -> dict[str, Any]:
    """BM25's recall@10 of the passage with the answer, for questions of one and of two hops."""
    found: dict[str, Any] = {}
    for kind in ("one_hop", "two_hop"):
        rows = [(q, gold) for q, gold in _questions(bench, None) if q.metadata["kind"] == kind]
        answered = [row for row in rows if bench.oracle.score([(row[0].text, bench.corpus.get(row[1]))])[0]]  # type: ignore[list-item]
        hits = bench.bm25.search([q.text for q, _ in answered], 10)
        hit = [gold in [h.passage.id for h in each] for (_, gold), each in zip(answered, hits, strict=True)]
        found[kind] = {
            "questions": len(answered),
            "answerable": 1.0,
            "BM25 recall@10": round(sum(hit) / len(hit), 4),
        }
    return found


def _questions(bench: Bench, split: str | None, unseen: float = 0.0) -> list[tuple[Question, str]]:
    """Questions of a split with the passage that has the answer."""
    counts = {"one_hop": 300, "two_hop": 300}
    asked = make_questions(bench.oracle.world, split, counts, unseen)
    return [(question, question.metadata["entities"][-1]) for question in asked]


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "faults": faults,
    "judges": judges,
    "hard": hard,
    "students": lambda bench: tiny_students(bench.out, bench.data, FAULTS, bench.drafts),
    "minilm": lambda bench: minilm_students(bench.out, bench.data, FAULTS, bench.drafts),
}


def main(
    out: str = "runs/bench_synthesis",
    parts: list[str] = ["faults", "hard", "students"],  # noqa: B006 (jsonargparse)
    judge: str | None = None,
    drafts: int = 1500,
    data: str = "../shared/data",
    examples: str = "",
    collection: str = "",
    others: list[str] = [],  # noqa: B006
    training: dict[str, Any] = {"epochs": 3.0, "learning_rate": 2e-5, "batch_size": 32},  # noqa: B006
) -> None:
    """Measure; print each part as it is done.

    Args:
        out: Folder that keeps what was measured.
        parts: faults, judges, hard, students, minilm, domain.
        judge: A causal language model: folder, hub name or short name.
        drafts: Queries to write, about the embedded world or SQuAD.
        data: Folder with squad/ and ir/, for students and minilm.
        examples: For domain: the examples of a synthesis over the collection.
        collection: For domain: folder with corpus.jsonl, queries.jsonl and qrels.tsv.
        others: For domain: collections that were not in training.
        training: For domain: fields of a recipe of sleuth train-retriever; negatives: how many an example.
    """
    import json

    bench = Bench(Path(out), judge, drafts, data)
    for part in parts:
        kept = Path(out) / f"{part}.json"
        if part not in (*PARTS, "domain"):
            raise ConfigError(f"parts: {part!r}: must be of {', '.join((*PARTS, 'domain'))}")
        if not kept.exists():
            asked = (bench.out, examples, collection, others, training)
            made = domain(*asked) if part == "domain" else PARTS[part](bench)
            write_json(kept, made)
        print(part, json.dumps(read_json(kept), indent=1))


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
