"""`sleuth synthesize`: passages in, training examples that a language model wrote out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import ConfigError, require
from data.jsonl import write_json
from data.machine.lock import locked
from data.text import counted
from retriever_server.training.synthesis.config import SynthesisConfig
from scripts.console import bar, going_on, show_table, waiting

if TYPE_CHECKING:
    from data.corpus import Corpus
    from retriever_server.training.synthesis.pipeline import Synthesis

_log = logging.getLogger(__name__)
_WORLD = "scripts.bench.synthesis_templates"
_GENERATORS = {"Local": "scripts.local_generator", "AtlasTemplates": _WORLD}
_JUDGES = {"AtlasOracle": _WORLD}


def main(config: SynthesisConfig) -> None:
    """Write training examples for a retriever from passages without questions.

    scripts/configs/synthesis/ holds the recipes; docs/synthesis.md explains them. Killed, the same command
    goes on. OUT/examples.jsonl is what `sleuth train-retriever` reads; OUT/summary.json counts rejections.
    """
    out = Path(config.out)
    with going_on(out):
        run = open_run(config)
        if config.dry_run:
            return _dry_run(run)
        with locked(out / ".lock", f"{out} is being written"):
            if config.measure_judges:
                _measure(run)
            else:
                _synthesize(run)


def _synthesize(run: Synthesis) -> None:
    from retriever_server.training.synthesis.judges import warnings_of
    from retriever_server.training.synthesis.results import load_measured, write_results

    for line in warnings_of(load_measured(run), run.judges, run.config.least_auc):
        _log.warning("%s", line)
    _show(write_results(run, run.run()), run.config)


def open_run(config: SynthesisConfig) -> Synthesis:
    """Check all that the configuration names, cheap things first, then open it."""
    from retriever_server.indexes.open_corpus import corpus_of
    from retriever_server.open_retriever import check_retriever
    from retriever_server.retriever import Scorer
    from retriever_server.training.synthesis.filters import make_filters
    from retriever_server.training.synthesis.generators import Generator
    from retriever_server.training.synthesis.judges import AnswerGain
    from retriever_server.training.synthesis.pipeline import Synthesis, check_corpus, load_shots
    from retriever_server.training.synthesis.recipes import load_recipe, with_sampling

    writers, reader = _readers(Path(config.out))
    make_filters(config.filters, None)
    recipe = with_sampling(load_recipe(config.recipe, config.prompts), config.sampling)
    recipe.check_choices(config.choices)
    load_shots(config, recipe)
    if config.corpus is None and not recipe.brainstorm:
        raise ConfigError(f"corpus: recipe {recipe.name} needs the passages that queries are written for")
    generator = writers.plan(config.generator, (Generator,), "generator.")
    judges = [reader.plan(each, (Scorer,), f"judges[{i}].") for i, each in enumerate(config.judges)]
    gain = reader.plan(config.answer_gain, (AnswerGain,), "answer_gain.") if config.answer_gain else None
    if config.retriever:
        check_retriever(config.retriever)
    corpus = corpus_of(config.corpus) if config.corpus else None
    check_corpus(Path(config.out), corpus)
    retriever = _retriever(config, corpus)
    _warn_of_scale(config.filters, retriever)
    with waiting("loading models"):
        lazy = config.dry_run or config.measure_judges
        made = _Unasked(generator.name) if lazy else generator()
        opened = [] if config.dry_run else [judge() for judge in judges]
        answers = gain() if gain and not lazy else None
    if not config.dry_run and (of := (config.filters.get("score") or {}).get("of")):
        known = ["retriever", *(judge.name for judge in opened), *(["answer_gain"] if gain else [])]
        require(of in known, "filters.score.of", of, f"one of {', '.join(known)}")
    return Synthesis(config, made, corpus, retriever, opened, answers, bar)


def _readers(out: Path) -> tuple[Any, Any]:
    """Return what reads generators, and what reads judges."""
    from data.objects.class_path import Reader
    from retriever_server.training.synthesis.generators import GENERATORS
    from retriever_server.training.synthesis.judges import JUDGES

    given = {"cache": str(out / "replies.jsonl"), "judgements": str(out / "judgements.jsonl")}
    tables = ({**GENERATORS, **_GENERATORS}, {**JUDGES, **_JUDGES})
    return Reader(tables[0], given=given), Reader(tables[1], given=given)


def _Unasked(name: str) -> Any:
    from retriever_server.training.synthesis.generators import Scripted

    made = Scripted(["-"])
    made.name = name
    return made


def _retriever(config: SynthesisConfig, corpus: Corpus | None) -> Any:
    """The retriever that is named, or BM25 of the corpus, made once in OUT/bm25."""
    from retriever_server.open_retriever import open_retriever

    if (
        config.retriever
        or corpus is None
        or not (config.candidates or config.measure_judges)
        or config.dry_run
    ):
        return open_retriever(config.retriever) if config.retriever and not config.dry_run else None
    folder = Path(config.out) / "bm25"
    if not folder.exists():
        from retriever_server.indexes.bm25 import BM25Index

        with waiting("indexing the corpus by BM25"):
            BM25Index.build(corpus, folder)
    return open_retriever(str(folder))


def _warn_of_scale(filters: Mapping[str, Mapping[str, Any]], retriever: Any) -> None:
    """Warn where a cosine is asked of BM25, whose scores are well above 1."""
    from retriever_server.indexes.bm25 import BM25Index

    asked = filters.get("score") or {}
    if isinstance(retriever, BM25Index) and "of" not in asked and asked.get("least", 2) <= 1:
        said = "filters.score.least = %s: a cosine, but BM25 scores nearly everything above it"
        _log.warning(f"{said}; name a dense index with --retriever", asked["least"])


def _dry_run(run: Synthesis) -> None:
    """Print three filled prompts, and the calls and tokens to expect (4 characters a token)."""
    from retriever_server.training.synthesis.recipes import fill

    config, steps = run.config, run.recipe.steps
    tasks = run.task_calls()
    prompts = [call.prompt for _, call in tasks[:1]]
    count = characters = 0
    for number, seed in enumerate(islice(run.seeds(), config.limit) if not tasks else ()):
        values, _ = run.values(seed)
        filled = [fill(step.prompt, values) for step in steps]
        if number < 3:
            prompts += filled
        characters, count = characters + sum(map(len, filled)), number + 1
    if tasks:
        drawn = [{"task": "(a task of the reply)", **run.recipe.draw({}, config.seed, i)} for i in (0, 1)]
        prompts += [fill(step.prompt, values) for values in drawn for step in steps]
        count = config.limit or len(tasks) * run.recipe.brainstorm["count"] * config.per_passage
        characters = count * sum(len(step.prompt) for step in steps)
    run.check_count(count)
    for number, prompt in enumerate(prompts[:3], start=1):
        print(f"--- prompt {number} ---\n{prompt}\n")
    calls = len(tasks) + count * len(steps)
    read = (characters + sum(len(call.prompt) for _, call in tasks)) // 4
    most = sum(int({"max_tokens": 256, **step.sampling}["max_tokens"]) for step in steps) * count
    work = f"{counted(count, 'query')}, {counted(calls, 'call')}"
    print(f"{work}: about {read:,} tokens to read, at most {most:,} to write")
    if config.judges:
        pairs = count * (config.candidates + 1)
        print(f"{counted(len(config.judges), 'judge')} read {pairs:,} pairs each")


def _measure(run: Synthesis) -> None:
    from data.formats.beir import load_queries
    from data.formats.trec import load_qrels
    from retriever_server.training.synthesis.judges import measure
    from retriever_server.training.synthesis.results import MEASURED

    config = run.config
    if not run.judges or run.corpus is None or run.retriever is None:
        raise ConfigError("measure_judges: needs --judges, --corpus and --candidates above 0")
    questions, qrels = (
        load_queries(config.queries or "")[: config.limit],
        load_qrels(config.measure_judges or ""),
    )
    found = measure(run.judges, questions, qrels, run.retriever, run.corpus, config.distractors, run.bar)
    write_json(run.folder / MEASURED, {"format_version": 1, "judges": found})
    rows = [
        (name, kind, f"{of['queries']:.0f}", f"{of['gold@1']:.3f}", f"{of['auc']:.3f}",
         "yes" if of["auc"] >= config.least_auc else "no")
        for name, kinds in found.items() for kind, of in kinds.items()
    ]  # fmt: skip
    show_table(
        f"gold among {config.distractors} others",
        ("judge", "kind", "queries", "gold@1", "AUC", "believed"),
        rows,
    )


def _show(summary: dict[str, Any], config: SynthesisConfig) -> None:
    rows = [(each["stage"], each["reason"], f"{each['count']:,}") for each in summary["rejected"]]
    rows += [("", "kept", f"{summary['examples']:,}")]
    show_table(f"{summary['texts']:,} texts", ("stage", "rejected because", "texts"), rows)
    tokens = (
        f"{summary['tokens_per_example']:,} tokens each"
        if sum(summary["tokens"].values())
        else "tokens not told"
    )
    said = f"{summary['relabelled']:,} with another positive than their seed; {tokens}"
    made = counted(summary["examples"], "example")
    print(f"{made} in {config.out}/examples.jsonl for {summary['corpus']}: {said}")
