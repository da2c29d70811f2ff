"""`sleuth evaluate-retriever`: how good a retriever is on a test collection, alone or beside another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError, require, require_template
from data.jsonl import write_json, write_jsonl
from data.records import FORMAT_VERSION, Benchmark, Question
from scripts.console import show_table, track

_log = logging.getLogger(__name__)


def main(
    retriever: str,
    queries: str | None = None,
    qrels: str | None = None,
    benchmark: str | None = None,
    metrics: str = "nDCG@10,R@10,R@100,RR@10,AP,P@10",
    answers: bool = False,
    compare: str | None = None,
    top_k: int = 100,
    where: dict[str, Any] | None = None,
    query_template: str = "{query}",
    out: str | None = None,
    run_out: str | None = None,
) -> None:
    """Score a retriever against relevance judgements, gold answers, or both.

    Args:
        retriever: Folder of an index, URL of a server, YAML file, none, random:INDEX, or a TREC run (.run,
            .trec).
        queries: JSON lines of {"id", "question", "golden_answers"}, or a table of id and text.
        qrels: Table of query-id, corpus-id and score, or TREC's qrels.
        benchmark: Instead of both: FOLDER or FOLDER:SPLIT of BEIR's form, FOLDER:DOMAIN of BRIGHT's.
        metrics: Names of ir-measures with commas between them; recall@k, MRR@k and MAP too.
        answers: Count queries that have a gold answer in one of the best k passages (answer@k).
        compare: A second retriever; the differences are tested for significance.
        top_k: How many passages a query is asked for.
        where: Only passages whose metadata agree, as JSON: {"year": {"gte": 1990}, "lang": "de"}.
        query_template: What is searched for a query: may name {query} and {instruction} (BRIGHT's).
        out: Folder for scores.json, queries.jsonl and the runs in TREC's format.
        run_out: File for the retriever's run alone, in TREC's format.
    """
    _check_given(queries, qrels, benchmark, answers, top_k)
    require_template(query_template, "query_template", "instruction")
    _check_retrievers([retriever, compare], where or {})
    from retriever_server.evaluation import judge, judge_answers, parse_metrics

    measures = parse_metrics(metrics, top_k)
    collection = _collection(benchmark, queries, qrels)

    def judged(rankings: Any) -> Any:
        values = judge(rankings, collection.qrels, measures) if collection.qrels else {}
        return values | (judge_answers(rankings, collection.queries, top_k) if answers else {})

    runs, parts = [], {}
    for spec in filter(None, (retriever, compare)):
        rankings, of_parts = _rank(spec, collection, top_k, where, query_template)
        _warn_of_strangers(spec, rankings, collection.qrels)
        runs.append((rankings, judged(rankings)))
        parts = parts or {name: judged(each) for name, each in of_parts.items() if spec is retriever}
    scores = _scores([values for _, values in runs], parts)
    _show(scores, retriever if not compare else f"first: {retriever}, second: {compare}")
    settings = {
        "retriever": retriever, "compare": compare, "queries": queries, "qrels": qrels,
        "benchmark": benchmark, "top_k": top_k, "where": where, "query_template": query_template,
    }  # fmt: skip
    summary = {"format_version": FORMAT_VERSION, **settings, "scores": scores}
    _write(out, run_out, summary, collection.queries, runs)


def _check_given(
    queries: str | None, qrels: str | None, benchmark: str | None, answers: bool, top_k: int
) -> None:
    if (benchmark is None) == (queries is None):
        raise ConfigError("either --queries FILE or --benchmark FOLDER must be given")
    if benchmark is not None and qrels is not None:
        raise ConfigError(f"--qrels {qrels}: has no meaning with --benchmark, which has its own")
    if benchmark is None and qrels is None and not answers:
        raise ConfigError("nothing to judge by: give --qrels FILE, --answers true, or both")
    require(top_k >= 1, "top_k", top_k, ">= 1")


def _check_retrievers(specs: Sequence[str | None], where: dict[str, Any]) -> None:
    from retriever_server.filters import parse_filter
    from retriever_server.open_retriever import check_retriever

    parse_filter(where)
    for spec in filter(None, specs):
        if not spec.endswith((".run", ".trec")):
            check_retriever(spec)


def _scores(values: list[Any], parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the number of queries and the mean of each metric; of a second retriever the difference, too.

    parts: the values of what the first is fused from.
    """
    from retriever_server.evaluation import compare, means

    differences = compare(*values) if len(values) > 1 else {}
    rows: dict[str, dict[str, Any]] = {
        metric: {"queries": len(of), "mean": means({metric: of})[metric], **differences.get(metric, {})}
        for metric, of in values[0].items()
    }
    for metric, mean in means(values[1]).items() if differences else ():
        rows[metric]["compared_mean"] = mean
    for metric, row in rows.items() if parts else ():
        row["parts"] = {name: means({metric: of[metric]})[metric] for name, of in parts.items()}
    return rows


def _collection(benchmark: str | None, queries: str | None, qrels: str | None) -> Any:
    from data.formats.beir import load_queries
    from data.formats.benchmarks import load_benchmark
    from data.formats.trec import load_qrels

    if benchmark is not None:
        return load_benchmark(benchmark)
    return Benchmark(load_queries(queries or ""), load_qrels(qrels) if qrels else {})


def _rank(
    spec: str, collection: Any, top_k: int, where: dict[str, Any] | None, template: str
) -> tuple[Any, dict[str, Any]]:
    """Rank by a retriever, or read the file of a run, without what is excluded; its parts, too."""
    from data.formats.benchmarks import without_excluded
    from data.formats.trec import load_run
    from retriever_server.evaluation import rank_all
    from retriever_server.open_retriever import open_retriever

    if spec.endswith((".run", ".trec")):
        run = load_run(spec)
        rankings = {query.id: run.get(query.id, []) for query in collection.queries}
        if not any(rankings.values()):
            ids = f"{next(iter(run))!r} there, {next(iter(rankings), '')!r} here"
            raise DataError(f"{spec}: ranks none of the queries ({ids})")
        return without_excluded(rankings, collection.excluded, top_k), {}
    told = collection.instruction
    asked = [
        replace(query, text=template.format(query=query.text, instruction=told))
        for query in collection.queries
    ]
    opened = open_retriever(spec)
    try:
        more = max(map(len, collection.excluded.values()), default=0)
        parts = {
            f"{part.generation} (part {i})": part for i, part in enumerate(_parts(opened, asked), start=1)
        }
        found = {
            name: without_excluded(
                rank_all(each, asked, top_k + more, track(f"searching queries{name and f', {name}'}"), where),
                collection.excluded,
                top_k,
            )
            for name, each in {"": opened, **parts}.items()
        }
    finally:
        opened.close()
    return found.pop(""), found


def _parts(retriever: Any, asked: Sequence[Question]) -> list[Any]:
    """Return the parts of a fused retriever that can be asked all queries."""
    from retriever_server.retriever import inside
    from retriever_server.retrievers.fuse import Fuse

    fused = next((each for each in inside(retriever) if isinstance(each, Fuse)), None)
    return [part for part in fused.parts if all(part.accepts(q.asked) for q in asked)] if fused else []


def _warn_of_strangers(spec: str, rankings: Any, qrels: Any) -> None:
    """Say so where hits and judgements have no passage in common: most likely not the same ids."""
    found = [hit.passage.id for hits in rankings.values() for hit in hits]
    judged = {passage for query in rankings for passage in qrels.get(query, {})}
    if found and judged and judged.isdisjoint(found):
        example = f"hits are such as {found[0]!r}, judgements such as {min(judged)!r}"
        _log.warning(
            "%s: no passage found is judged; do qrels and corpus have the same ids? %s", spec, example
        )


def _generation(rankings: Any) -> str:
    hits = next(filter(None, rankings.values()), None)
    return hits[0].generation if hits else "none"


def _write(
    folder: str | None,
    run_out: str | None,
    summary: dict[str, Any],
    queries: Sequence[Question],
    runs: list[Any],
) -> None:
    """Write the first run alone, and all into the folder, where they are asked for."""
    from data.formats.trec import write_run

    if run_out:
        write_run(run_out, runs[0][0], _generation(runs[0][0]))
    if not folder:
        return
    out = Path(folder)
    names = ("scores", "compared")
    rows = [
        {"id": query.id, "question": query.text}
        | {
            name: {metric: of[query.id] for metric, of in values.items() if query.id in of}
            for name, (_, values) in zip(names, runs, strict=False)
        }
        for query in queries
    ]
    write_jsonl(out / "queries.jsonl", rows)
    for name, (rankings, _) in zip(("run.trec", "compared.trec"), runs, strict=False):
        write_run(out / name, rankings, _generation(rankings))
    write_json(out / "scores.json", summary)


def _show(scores: dict[str, dict[str, Any]], title: str) -> None:
    compared = any("p" in row for row in scores.values())
    rows = []
    for metric, row in scores.items():
        cells = [metric, str(row["queries"]), f"{row['mean']:.4f}"]
        if compared:
            cells.append(f"{row['compared_mean']:.4f}")
            cells += [f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]", f"{row['p']:.4f}"]
        rows.append(cells)
    means = ("first", "second", "first - second [95 %]", "p") if compared else ("mean",)
    show_table(title, ("metric", "queries", *means), rows)
    if parts := list(next(iter(scores.values())).get("parts", ())):
        _show_parts(scores, parts)


def _show_parts(scores: dict[str, dict[str, Any]], parts: list[str]) -> None:
    """Show a fused retriever beside its parts; warn where it is worse than one of these."""
    rows = [[metric, row["mean"], *row["parts"].values()] for metric, row in scores.items()]
    cells = [[metric, *(f"{value:.4f}" for value in values)] for metric, *values in rows]
    show_table("fused, and its parts alone", ("metric", "fused", *parts), cells)
    metric, mean, *of = rows[0]
    if max(of) > mean:
        best = parts[of.index(max(of))]
        _log.warning(
            "%s: %s alone %.4f, fused %.4f: weigh it more, or take it alone", metric, best, max(of), mean
        )
