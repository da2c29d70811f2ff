"""`sleuth mine`: hard negatives for examples, labels of several retrievers, queries cropped from passages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError, DataError


def main(
    queries: str,
    out: str,
    retriever: str | None = None,
    corpus: str | None = None,
    teacher: str | None = None,
    teachers: list[str] | None = None,
    first_rank: int = 1,
    last_rank: int = 100,
    per_query: int = 15,
    pick: Literal["top", "random"] = "top",
    margin: float | None = None,
    relative_margin: float | None = None,
    keep_answers: bool = False,
    positive_ranks: tuple[int, int] = (1, 10),
    negative_ranks: tuple[int, int] = (46, 50),
    crops_per_passage: int = 1,
    seed: int = 0,
    on_error: Literal["stop", "skip"] = "stop",
) -> None:
    """Find passages that a retriever takes for good and that are not. Killed, it goes on when started again.

    With --teachers, what several retrievers find becomes labels instead (DRAGON), a file for each stage.

    Args:
        queries: JSON lines of examples (`sleuth convert` makes them), or crops: pieces of the passages.
        out: File for the examples; with --teachers a folder.
        retriever: Folder of an index, URL of a server, or YAML file of a retriever.
        corpus: The passages; without it those of the index.
        teacher: Scores positives and negatives: a cross-encoder's name or folder, a YAML file of a scorer, or
            a second retriever. Its scores are kept, and margins go by them.
        teachers: Retrievers, in the order in which they are added: [bm25, dense].
        first_rank: Negatives are looked for from this rank on, not counting positives.
        last_rank: ... to this one.
        per_query: How many negatives a query gets at most.
        pick: The top ones, or a random choice between the ranks.
        margin: A negative must score so much below the worst positive.
        relative_margin: The same, as a share of the positive's score.
        keep_answers: Keep passages in which a gold answer stands.
        positive_ranks: With --teachers: the ranks that become positives.
        negative_ranks: With --teachers: the ranks that become negatives.
        crops_per_passage: How many queries are cropped from a passage.
        seed: Of what is chosen at random.
        on_error: stop, or skip: leave out examples that are wrong (no positive, dangling ids).
    """
    if retriever and teachers:
        raise ConfigError("--retriever mines negatives, --teachers makes labels: give one of them")
    if not (retriever or teachers) and queries != "crops":
        raise ConfigError("--retriever or --teachers must be given, or --queries crops")
    from retriever_server.training.mining import Rules
    from retriever_server.training.teachers import Ranks

    rules = Rules(first_rank, last_rank, per_query, pick, margin, relative_margin, keep_answers, seed)
    ranks = Ranks(positive_ranks, negative_ranks)
    opened = [_open(spec) for spec in teachers or ([retriever] if retriever else [])]
    passages = _corpus(corpus, opened)
    if queries == "crops":
        queries = _write_crops(passages, Path(out), crops_per_passage, seed, bool(opened), bool(teachers))
    if teachers:
        _label(queries, opened, passages, out, ranks)
    elif opened:
        _mine(
            queries,
            opened[0],
            passages,
            out,
            rules,
            _open(teacher, scorer=True) if teacher else None,
            on_error,
        )


def _mine(
    queries: str, retriever: Any, corpus: Any, out: str, rules: Any, teacher: Any, on_error: Any
) -> None:
    from data.examples import Examples
    from retriever_server.training.mining import mine
    from scripts.console import track

    mined = mine(
        Examples(queries, corpus, on_error), retriever, corpus, out, rules, teacher, track("mining queries")
    )
    each = mined.negatives / max(1, mined.examples)
    print(f"{mined.examples:,} examples in {out}, {each:.1f} negatives each; {mined.without:,} have none")


def _label(queries: str, teachers: list[Any], corpus: Any, out: str, ranks: Any) -> None:
    from data.formats.beir import load_queries
    from retriever_server.training.teachers import label
    from scripts.console import track

    stages = label(load_queries(queries), teachers, corpus, out, ranks, track("labelling queries"))
    print(f"labels of {len(teachers)} teachers; the last stage is {stages[-1]}")


def _write_crops(corpus: Any, out: Path, per_passage: int, seed: int, go_on: bool, folder: bool) -> str:
    """Write the crops: to `out`, or beside what is made from them."""
    from itertools import chain

    from data.jsonl import write_jsonl
    from retriever_server.training.teachers import crops

    path = out if not go_on else out / "crops.jsonl" if folder else out.with_name(f"{out.name}.crops.jsonl")
    found = crops(corpus, per_passage, seed=seed)
    if (first := next(found, None)) is None:
        raise DataError(f"{corpus.path}: no passage has a sentence long enough to be a query")
    write_jsonl(path, (example.as_record() for example in chain([first], found)))
    print(f"crops of {len(corpus):,} passages in {path}")
    return str(path)


def _corpus(path: str | None, retrievers: list[Any]) -> Any:
    from data.corpus import Corpus

    if path:
        return Corpus(path)
    found = next((each.corpus for each in retrievers if hasattr(each, "corpus")), None)
    if found is None:
        raise ConfigError("--corpus: must be given, as no retriever is an index on this machine")
    return found


def _open(spec: str, scorer: bool = False) -> Any:
    """A retriever, or where one may stand the scorer that `spec` names."""
    from retriever_server.opening import open_retriever, plan_file
    from retriever_server.rerank import CrossEncoder, Scorer
    from retriever_server.retriever import Retriever

    if not scorer or spec.startswith(("http://", "https://")) or (Path(spec) / "manifest.json").exists():
        retriever = open_retriever(spec)
        retriever.probe()
        return retriever
    if not spec.endswith((".yaml", ".yml")):
        return CrossEncoder(spec)
    built = plan_file(Path(spec), (Scorer, Retriever))()
    if isinstance(built, Retriever):
        built.probe()
    return built
