"""`sleuth mine`: hard negatives, and labels by several retrievers or by how an agent used its searches."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.questions import load_questions
from data.text import counted
from retriever_server.training.mining import Rules
from scripts.console import track

NOTHING = 3
"""Exit status where trajectories give no example."""


@dataclass(frozen=True, kw_only=True)
class MineConfig(Rules):
    """Sources, ranks and rules of mining."""

    out: str
    """File for the examples; with --teachers a folder."""
    queries: str | None = None
    """JSON lines of examples (`sleuth convert` makes them), or crops: pieces of the passages."""
    retriever: str | None = None
    """Folder of an index, URL of a server, or YAML file of a retriever."""
    corpus: str | None = None
    """JSON lines of the passages, or the folder of an index; without it those of --retriever."""
    teacher: str | None = None
    """Scores positives and negatives: a cross-encoder's name or folder, a YAML file of a scorer, or a second
    retriever. Its scores are kept, and margins go by them."""
    teachers: list[str] | None = None
    """Retrievers, in the order in which they are added: [bm25, dense]."""
    positive_ranks: tuple[int, int] = (1, 10)
    """With --teachers: the ranks that become positives."""
    negative_ranks: tuple[int, int] = (46, 50)
    """With --teachers: the ranks that become negatives."""
    crops_per_passage: int = 1
    """Queries cropped from a passage."""
    on_error: Literal["stop", "skip"] = "stop"
    """stop, or skip: leave out examples that are wrong (no positive, dangling ids)."""
    trajectories: str | None = None
    """Trajectories of a training or of `sleuth evaluate`, instead of queries."""
    labels: str | None = None
    """With --trajectories: what makes a passage positive. gold: the question names it. answer: the trajectory
    is correct and a gold answer stands in it. quote: the next turn repeats four words of it. opened: the
    agent opened its page. judge, fork, likelihood, agentic_r: by --scores. (answer)"""
    style: Literal["query", "question", "history"] | None = None
    """With --trajectories: the query alone, after its question, or with the earlier queries. (query)"""
    recipe: Literal["agentic_r", "lrat", "iter"] | None = None
    """With --trajectories: labels, style and weights as published; what else is given wins."""
    scores: str | None = None
    """With --trajectories: scores of its searches, by `sleuth score-searches`."""
    held_out: str | None = None
    """With --trajectories: questions that must not contribute, files separated by commas."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries and self.trajectories:
            raise ConfigError("--queries and --trajectories: give one of them")
        if not (self.queries or self.trajectories):
            raise ConfigError("--queries or --trajectories must be given")
        if self.trajectories:
            return
        if self.retriever and self.teachers:
            raise ConfigError("--retriever mines negatives, --teachers makes labels: give one of them")
        if not (self.retriever or self.teachers) and self.queries != "crops":
            raise ConfigError("--retriever or --teachers must be given, or --queries crops")


def main(config: MineConfig) -> int:
    """Find passages that a retriever takes for good and that are not. Killed, it goes on when started again.

    With --teachers, what several retrievers find becomes labels instead (DRAGON), a file for each stage.
    With --trajectories, the searches of an agent become examples, labelled by what the agent did with them;
    exits with 3 where there is none.
    """
    if config.trajectories:
        return _mine_trajectories(config)
    from retriever_server.training.teachers import Ranks

    rules = Rules(**{each.name: getattr(config, each.name) for each in fields(Rules)})
    ranks = Ranks(config.positive_ranks, config.negative_ranks)
    specs = config.teachers or ([config.retriever] if config.retriever else [])
    plans = [_plan(spec) for spec in specs]
    scorer = _plan(config.teacher, scorer=True) if config.teacher else None
    passages = _corpus(config.corpus, specs, plans)
    queries = config.queries or ""
    if queries == "crops":
        queries = _write_crops(passages, config)
    if config.teachers:
        _label(queries, plans, passages, config.out, ranks)
    elif config.retriever:
        _mine(queries, plans[0], passages, config.out, rules, scorer, config.on_error)
    return 0


def _mine_trajectories(config: MineConfig) -> int:
    from retriever_server.indexes.open_corpus import corpus_of
    from rl.co_training.examples import RECIPES, LabelConfig, NoExamples, mine_trajectories

    base = RECIPES[config.recipe] if config.recipe else LabelConfig()
    negatives = config.per_query if config.per_query != 15 or not config.recipe else None
    given = {"labels": config.labels, "style": config.style, "negatives": negatives}
    labels = replace(base, **{key: value for key, value in given.items() if value is not None})
    questions = load_questions(config.held_out) if config.held_out else []
    corpus = corpus_of(config.corpus) if config.corpus else None
    bar, path = track("labelling searches"), config.trajectories or ""
    try:
        tally = mine_trajectories(path, config.out, labels, questions, corpus, bar, config.scores)
    except NoExamples as none:
        print(none)
        return NOTHING
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(tally.labels.items()))
    made = f"{counted(tally.examples, 'example')} in {config.out} of {counted(tally.searches, 'search')}"
    print(f"{made}; passages: {counts or 'none'}")
    for reason, count in tally.dropped.most_common():
        print(f"left out: {reason}: {count:,}")
    return 0


def _mine(
    queries: str, retriever: Any, corpus: Any, out: str, rules: Any, teacher: Any, on_error: Any
) -> None:
    """Read the examples, then build retriever and teacher and mine."""
    from data.examples import Examples
    from retriever_server.training.mining import mine

    examples, bar = Examples(queries, corpus, on_error), track("mining queries")
    mined = mine(examples, retriever(), corpus, out, rules, teacher() if teacher else None, bar)
    each = mined.negatives / max(1, mined.examples)
    made = counted(mined.examples, "example")
    print(f"{made} in {out}, {each:.1f} negatives each; {mined.without:,} have none")


def _label(queries: str, teachers: list[Any], corpus: Any, out: str, ranks: Any) -> None:
    from data.formats.beir import load_queries
    from retriever_server.training.teachers import label

    asked = load_queries(queries)
    stages = label(asked, [each() for each in teachers], corpus, out, ranks, track("labelling queries"))
    print(f"labels of {counted(len(teachers), 'teacher')}; the last stage is {stages[-1]}")


def _write_crops(corpus: Any, config: MineConfig) -> str:
    """Write the crops: to `out`, or beside what is made from them."""
    from itertools import chain

    from retriever_server.training.teachers import crops

    path = Path(config.out)
    if config.teachers:
        path = path / "crops.jsonl"
    elif config.retriever:
        path = path.with_name(f"{path.name}.crops.jsonl")
    found = crops(corpus, config.crops_per_passage, seed=config.seed)
    if (first := next(found, None)) is None:
        raise DataError(f"{corpus.path}: no passage has a sentence long enough to be a query")
    write_jsonl(path, (example.as_record() for example in chain([first], found)))
    print(f"crops of {counted(len(corpus), 'passage')} in {path}")
    return str(path)


def _corpus(path: str | None, specs: list[str], plans: list[Any]) -> Any:
    """The passages: of a file, else of the first retriever that is, or holds, an index on this machine."""
    from retriever_server.indexes.manifest import MANIFEST
    from retriever_server.indexes.open_corpus import corpus_of

    if path:
        return corpus_of(path)
    folders = [Path(spec.removeprefix("random:")) for spec in specs]
    if folder := next((folder for folder in folders if (folder / MANIFEST).is_file()), None):
        return corpus_of(folder)
    found = next((corpus for plan in plans if (corpus := plan().corpus) is not None), None)
    if found is None:
        raise ConfigError("--corpus: must be given, as no retriever is an index on this machine")
    return found


def _plan(spec: str, scorer: bool = False) -> Any:
    """Return a builder of the retriever that `spec` names, or of the scorer where one may stand."""
    from data.models.hub import find_model
    from retriever_server.open_retriever import check_retriever, plan_file, plan_retriever
    from retriever_server.retriever import Retriever
    from retriever_server.retrievers.rerank import CrossEncoder, Scorer

    if scorer and spec.endswith((".yaml", ".yml")):
        build = plan_file(Path(spec), (Scorer, Retriever))
    elif not scorer or spec.startswith(("http://", "https://")) or (Path(spec) / "manifest.json").exists():
        check_retriever(spec)
        build = plan_retriever(spec)
    else:
        find_model(spec, "teacher")
        build = partial(CrossEncoder, spec)

    @cache
    def built() -> Any:
        made = build()
        if isinstance(made, Retriever):
            made.probe()
        return made

    return built
