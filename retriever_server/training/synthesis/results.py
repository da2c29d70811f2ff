"""The last step: labels and filters make drafts into examples, rejections and a summary."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.corpus import Corpus
from data.errors import DataError, RunStopped
from data.formats.rows import passage_row
from data.jsonl import read_json, write_json, write_jsonl
from data.records import FORMAT_VERSION, Example, Passage
from retriever_server.training.synthesis.config import LabelRules
from retriever_server.training.synthesis.drafts import Draft, draw_seed
from retriever_server.training.synthesis.filters import Check, make_filters, same_text
from retriever_server.training.synthesis.judges import believed, fuse

if TYPE_CHECKING:
    from retriever_server.training.synthesis.pipeline import Synthesis

MEASURED = "judges.json"


def load_measured(run: Synthesis) -> dict[str, Any]:
    """The measurement of judges that the configuration names, or that lies in the folder; {} without."""
    own = run.folder / MEASURED
    path = Path(run.config.measured) if run.config.measured else own
    return read_json(path)["judges"] if run.config.measured or own.exists() else {}


def write_results(run: Synthesis, count: int) -> dict[str, Any]:
    """Write examples.jsonl, rejected.jsonl and summary.json, in this order; return the summary.

    Raises RunStopped where no example is left.
    """
    measured, checks = load_measured(run), make_filters(run.config.filters, run.corpus)
    kept: list[tuple[Draft, dict[str, Any]]] = []
    rejected: list[dict[str, Any]] = []
    tokens, relabelled = Counter[str](), 0
    for row, candidates, judged in _rows(run, count):
        tokens.update(dict(zip(("read", "written"), row["tokens"], strict=True)))
        if "rejected" in row:
            rejected.append(
                {"id": row["id"], "stage": "generated", "reason": row["rejected"], "raw": row["raw"]}
            )
            continue
        draft = Draft(
            row["id"], row["seed"], row["fields"], row["draws"],
            tuple(map(tuple, candidates.get("hits", ()))), judged.get("scores", {}), row.get("logprob"),
        )  # fmt: skip
        draft, stage, reason = _judged(run, draft, measured, checks)
        if reason:
            rejected.append(
                {"id": draft.id, "stage": stage, "reason": reason, "query": draft.query, "seed": draft.seed}
            )
        else:
            relabelled += bool(draft.seed and draft.positive != draft.seed)
            kept.append((draft, row))
    if not kept:
        write_jsonl(run.path("rejected"), rejected)
        most = Counter(each["reason"] for each in rejected).most_common(1)[0]
        raise RunStopped(
            f"no example is left of {count} texts; mostly: {most[0]} ({most[1]}); see {run.path('rejected')}"
        )
    corpus = _write_passages(run, [draft for draft, _ in kept]) if run.recipe.writes_passages else run.corpus
    assert corpus is not None
    write_jsonl(run.path("examples"), (_record(run, *each, list(checks), corpus, measured) for each in kept))
    write_jsonl(run.path("rejected"), rejected)
    if run.config.expansion:
        _write_expanded(run, [draft for draft, _ in kept])
    reasons = Counter((each["stage"], each["reason"]) for each in rejected)
    summary = {
        "format_version": FORMAT_VERSION, "recipe": run.recipe.name, "generator": run.generator.name,
        "corpus": str(corpus.path), "texts": count, "examples": len(kept), "relabelled": relabelled,
        "without_negative": sum(not draft.negatives for draft, _ in kept), "tokens": dict(tokens),
        "tokens_per_example": round(tokens.total() / len(kept), 1),
        "judges": {judge.name: measured.get(judge.name, "not measured") for judge in run.judges},
        "rejected": [{"stage": s, "reason": r, "count": n} for (s, r), n in reasons.most_common()],
    }  # fmt: skip
    write_json(run.folder / "summary.json", summary)
    return summary


def _rows(run: Synthesis, count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield what the stages say of each draft; a retriever or judges that are not asked now are left out."""
    empty = iter(dict, None)
    candidates = run.rows("candidates") if run.retriever and run.config.candidates else empty
    judged = run.rows("judged") if run.judges or run.answer_gain else empty
    return islice(zip(run.rows("generated"), candidates, judged, strict=False), count)


def _judged(
    run: Synthesis, draft: Draft, measured: Mapping[str, Any], checks: Mapping[str, Check]
) -> tuple[Draft, str, str]:
    """The draft with its labels; filter and reason where one of the filters rejects it."""
    kind = str(draft.fields.get("kind") or "all")
    names = [j.name for j in run.judges if believed(measured, j.name, kind, run.config.least_auc)]
    if run.corpus:
        draft = label(draft, run.config.labels, names, run.corpus, run.config.seed)
    text = str(draft.fields.get("positive", ""))
    if text:
        draft = replace(draft, positive=f"{draft.id}.positive", labels={}, labelled_by=())
    elif run.corpus and (passage := run.corpus.get(draft.positive)):
        text = passage.text
    if run.config.labels.negative == "written" and draft.fields.get("negative"):
        draft = replace(draft, negatives=(f"{draft.id}.negative",))
    if reason := run.held_out.reason(draft, [text]):
        return draft, "leakage", reason
    for name, check in checks.items():
        verdict = check(draft)
        if isinstance(verdict, str):
            return draft, name, verdict
        draft = verdict
    return draft, "", ""


def _record(
    run: Synthesis,
    draft: Draft,
    row: Mapping[str, Any],
    passed: list[str],
    corpus: Corpus,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    ids = (draft.positive, *draft.negatives)
    judges = {name: {i: of[i] for i in ids if i in of} for name, of in draft.scores.items()}
    task = str(draft.fields.get("task") or draft.draws.get("task", ""))
    query = run.config.query_template.format(query=draft.query, task=task)
    provenance = {
        "corpus": corpus.content_hash, "recipe": run.recipe.name, "generator": run.generator.name,
        "prompt": row["prompt"], "seed_passage": draft.seed, "random_seed": run.config.seed,
        "draws": dict(draft.draws), "task": task, "raw": row["raw"], "judges": judges, "passed": passed,
        "generation": run.retriever.generation if run.retriever else "",
        "scores": " + ".join(draft.labelled_by),
    }  # fmt: skip
    answer = str(draft.fields.get("answer", ""))
    answers = (answer,) if answer else ()
    name, labels = f"{run.recipe.name}-{draft.id}", draft.labels or None
    return Example(query, ids[:1], draft.negatives, labels, name, answers, provenance).as_record()


def _write_passages(run: Synthesis, drafts: list[Draft]) -> Corpus:
    """OUT/corpus.jsonl: the passages that are there, and those that were written."""
    path = run.path("corpus")

    def rows() -> Iterator[dict[str, Any]]:
        for passage in run.corpus or ():
            yield passage_row(passage, path.parent)
        for draft in drafts:
            for name in ("positive", "negative"):
                if text := draft.fields.get(name):
                    yield passage_row(Passage(f"{draft.id}.{name}", str(text)), path.parent)

    if run.corpus and (clash := next((d for d in drafts if run.corpus.get(f"{d.id}.positive")), None)):
        raise DataError(f"{run.config.corpus}: has a passage {clash.id}.positive of its own")
    write_jsonl(path, rows())
    return Corpus(path)


def _write_expanded(run: Synthesis, drafts: list[Draft]) -> None:
    """OUT/expanded.jsonl: each passage with the queries that were kept for it (doc2query)."""
    queries: dict[str, list[str]] = {}
    for draft in drafts:
        queries.setdefault(draft.seed, []).append(draft.query)

    def rows() -> Iterator[dict[str, Any]]:
        for passage in run.corpus or ():
            expansion = " ".join(queries.get(passage.id, ()))
            metadata = {**passage.metadata, "expansion": expansion}
            yield {**passage_row(passage, run.folder), "metadata": metadata}

    write_jsonl(run.path("expanded"), rows())


def label(draft: Draft, rules: LabelRules, judges: Sequence[str], corpus: Corpus, seed: int) -> Draft:
    """The draft with positive, negatives and labels. `judges`: those believed for this kind of query.

    A judge that gave no number for one of the candidates does not count for this draft.
    """
    hits = [id_ for id_, _ in draft.hits]
    everyone = {*hits, *([draft.seed] if draft.seed else [])}
    judges = [name for name in judges if everyone <= set(draft.scores.get(name, ()))]
    known = [draft.scores[name] for name in judges]
    fused = fuse([{id_: scores[id_] for id_ in everyone} for scores in known])
    ranked = sorted(
        fused, key=lambda id_: (-fused[id_], id_ != draft.seed, hits.index(id_) if id_ in hits else -1)
    )
    positive = ranked[0] if ranked and rules.positive == "best" else draft.seed
    texts = {i: same_text(passage.text) for i in {positive, *hits} if (passage := corpus.get(i))}
    same = texts.get(positive)
    others = [i for i in (ranked or hits) if i not in (positive, draft.seed) and texts.get(i) != same]
    negatives = _negatives(others, hits, rules, random.Random(draw_seed(seed, "negatives", draft.id)))
    labels = known[0] if len(known) == 1 else fused
    kept = {id_: round(labels[id_], 6) for id_ in (positive, *negatives) if id_ in labels}
    by = tuple(judges) if kept else ()
    return replace(draft, positive=positive, negatives=tuple(negatives), labels=kept, labelled_by=by)


def _negatives(others: list[str], hits: list[str], rules: LabelRules, rng: random.Random) -> list[str]:
    if rules.negative == "far":
        return others[::-1][: rules.negatives]
    if rules.negative == "sampled":
        return rng.sample(others, min(rules.negatives, len(others)))
    if rules.negative == "ranks":
        return [i for i in hits[rules.first_rank - 1 :] if i in set(others)][: rules.negatives]
    return []
