"""The pipeline: seeds, texts, candidates, judgements, each a file of one line a query; then the examples.

Every stage goes on after its last whole batch. One that was made by other settings, or from another corpus,
is refused; without its file it is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.errors import ConfigError, DataError, RunStopped
from data.jsonl import append_in_batches, read_json, read_jsonl, write_json, write_jsonl
from data.progress import Bar, no_bar
from data.records import FORMAT_VERSION, Example, Passage
from retriever_server.retriever import Retriever, Scorer
from retriever_server.training.mining import corpus_passage, search_checked
from retriever_server.training.synthesis.config import SynthesisConfig
from retriever_server.training.synthesis.drafts import Call, Written, draw_seed
from retriever_server.training.synthesis.filters import HeldOut
from retriever_server.training.synthesis.generators import Generator
from retriever_server.training.synthesis.judges import AnswerGain
from retriever_server.training.synthesis.parsing import Unparsable, parse_list
from retriever_server.training.synthesis.recipes import Recipe, fill, load_recipe, with_sampling

_log = logging.getLogger(__name__)
STAGES = "stages.json"
Rows = Callable[[range], Iterable[Mapping[str, Any]]]


@dataclass
class Synthesis:
    """One run in its folder. Retriever and judges may be absent, the corpus where a recipe needs none."""

    config: SynthesisConfig
    generator: Generator
    corpus: Corpus | None = None
    retriever: Retriever | None = None
    judges: Sequence[Scorer] = ()
    answer_gain: AnswerGain | None = None
    bar: Bar = no_bar

    def __post_init__(self) -> None:
        self.folder = Path(self.config.out)
        self.recipe = with_sampling(
            load_recipe(self.config.recipe, self.config.prompts), self.config.sampling
        )
        self.shots = load_shots(self.config, self.recipe)
        self._usable, self._reasons, self._tokens = set[str](), Counter[str](), 0

    @cached_property
    def held_out(self) -> HeldOut:
        """The evaluation sets. Raises DataError."""
        return HeldOut(self.config.evaluation, self.corpus, self.config.shared)

    def run(self) -> int:
        """Make all stages; return the number of drafts."""
        self._check_stages()
        count = self._seeds()
        self.check_count(count)
        self._stage("generated", "writing queries", count, self._generate)
        self._check_usable()
        if self.retriever is not None and self.config.candidates:
            self._stage("candidates", "finding candidates", count, self._candidates)
        if self.judges or self.answer_gain:
            self._stage("judged", "judging candidates", count, self._judge)
        return count

    def path(self, stage: str) -> Path:
        """The file of a stage."""
        return self.folder / f"{stage}.jsonl"

    def rows(self, stage: str) -> Iterator[dict[str, Any]]:
        """The rows of a stage, {} for ever where it was not made."""
        return read_jsonl(self.path(stage)) if self.path(stage).exists() else iter(dict, None)

    def seeds(self) -> Iterator[dict[str, Any]]:
        """Draw what each query is written from: a passage or a task, and more, in random order."""
        return self._tasks() if self.recipe.brainstorm else self._passages()

    def _passages(self) -> Iterator[dict[str, Any]]:
        assert self.corpus is not None
        pattern = re.compile(self.config.pattern or "")
        for position in np.random.default_rng(self.config.seed).permutation(len(self.corpus)).tolist():
            passage = self.corpus[position]
            long_enough = len(passage.text) >= self.config.least_characters
            if long_enough and pattern.search(passage.text) and not self.held_out.holds(passage):
                for number in range(self.config.per_passage):
                    drawn = self.recipe.draw(self.config.choices, self.config.seed, passage.id, number)
                    yield {"id": f"{passage.id}-{number}", "seed": passage.id, "draws": drawn}

    def _tasks(self) -> Iterator[dict[str, Any]]:
        by_kind: dict[str, list[str]] = {}
        for row in self.rows("tasks"):
            known = by_kind.setdefault(row["kind"], [])
            known += [task for task in row.get("tasks", ()) if task not in known]
        longest = max(map(len, by_kind.values()), default=0)
        for number in range(longest * self.config.per_passage):
            for kind, tasks in by_kind.items():
                if number < len(tasks) * self.config.per_passage:
                    choices = {**self.config.choices, "family": {kind: self.recipe.draws["family"][kind]}}
                    drawn = self.recipe.draw(choices, self.config.seed, kind, number)
                    drawn["task"] = tasks[number % len(tasks)]
                    yield {"id": f"{kind}-{number}", "seed": "", "draws": drawn}

    def _seeds(self) -> int:
        if self.recipe.brainstorm:
            self._stage("tasks", "brainstorming tasks", len(self.task_calls()), self._brainstorm)
        seeds = list(islice(self.seeds(), self.config.limit))
        write_jsonl(self.path("seeds"), seeds)
        return len(seeds)

    def task_calls(self) -> list[tuple[str, Call]]:
        """The calls that brainstorm tasks, with the kind of each."""
        of, found = self.recipe.brainstorm, []
        for kind, said in of["kinds"].items() if of else ():
            prompt = fill(of["prompt"], {"count": of["count"], "kind": said})
            for number in range(self.config.tasks):
                seed = draw_seed(self.config.seed, "tasks", kind, number)
                found.append((kind, Call(prompt, seed, **of.get("sampling", {}))))
        return found

    def _brainstorm(self, batch: range) -> Iterator[dict[str, Any]]:
        calls = [self.task_calls()[i] for i in batch]
        for (kind, _), reply in zip(calls, self._write([call for _, call in calls]), strict=True):
            try:
                found: dict[str, Any] = {"tasks": parse_list(reply.text)}
            except Unparsable as error:
                found = {"rejected": reply.refused or str(error)}
            yield {"kind": kind, "raw": reply.text, **found}

    def values(self, seed: Mapping[str, Any]) -> tuple[dict[str, str], Passage | None]:
        """Return the values of a prompt's fields for a seed, and its passage."""
        passage = corpus_passage(self.corpus, seed["seed"]) if self.corpus and seed["seed"] else None
        values = {"shots": self.shots, **seed["draws"]}
        if passage is not None:
            values |= {"title": passage.title, "passage": passage.text[: self.config.most_characters]}
        return values, passage

    def _generate(self, batch: range) -> Iterator[dict[str, Any]]:
        self._check_usable()
        seeds = self._take_rows("seeds", batch)
        filled = [self.values(seed) for seed in seeds]
        rows = [{**seed, "raw": [], "fields": {}, "prompt": "", "tokens": [0, 0]} for seed in seeds]
        for number, step in enumerate(self.recipe.steps):
            alive = [i for i, row in enumerate(rows) if "rejected" not in row]
            told = [({**filled[i][0], **rows[i]["fields"]}, filled[i][1]) for i in alive]
            seeds_of = [draw_seed(self.config.seed, rows[i]["id"], number) for i in alive]
            calls = [step.call(*each, seed) for each, seed in zip(told, seeds_of, strict=True)]
            for i, call, reply in zip(alive, calls, self._write(calls) if calls else (), strict=True):
                _take(rows[i], call, reply, step.parse)
        self._reasons.update(row.get("rejected", "the same query again") for row in rows)
        self._usable |= {row["fields"]["query"] for row in rows if "rejected" not in row}
        return iter(rows)

    def _write(self, calls: Sequence[Call]) -> list[Written]:
        replies = self.generator.write(calls)
        if len(replies) != len(calls):
            raise DataError(f"{self.generator.name}: gave {len(replies)} texts for {len(calls)} prompts")
        self._tokens += sum(each.prompt_tokens + each.new_tokens for each in replies)
        return replies

    def _check_usable(self) -> None:
        """Raise RunStopped where the generator gives nothing, or the same again and again."""
        written, usable = self._reasons.total(), len(self._usable)
        if written >= 200 and usable < self.config.least_usable * written:
            raise RunStopped(
                f"generator {self.generator.name}: of {written} texts {usable} can be used (mostly: "
                f"{self._reasons.most_common(1)[0][0]}); what is there is kept in {self.folder}"
            )

    def _candidates(self, batch: range) -> Iterator[dict[str, Any]]:
        assert self.retriever is not None and self.corpus is not None
        rows = self._take_rows("generated", batch)
        asked = [row for row in rows if "rejected" not in row]
        examples = [Example(row["fields"]["query"], ()) for row in asked]
        generation = self.retriever.generation
        found = search_checked(self.retriever, examples, self.config.candidates, self.corpus, generation)
        pairs = zip(asked, found, strict=True)
        hits = {row["id"]: [[h.passage.id, round(float(h.score), 6)] for h in of] for row, of in pairs}
        return ({"id": row["id"], "hits": hits.get(row["id"], [])} for row in rows)

    def _judge(self, batch: range) -> Iterator[dict[str, Any]]:
        rows = self._take_rows("generated", batch)
        hits = [row["hits"] for row in self._take_rows("candidates", batch)]
        found: list[dict[str, dict[str, float]]] = [{} for _ in rows]
        pairs = [
            (i, (row["fields"]["query"], passage))
            for i, row in enumerate(rows)
            if "rejected" not in row
            for passage in self._judged_passages(row, hits[i])
        ]
        for judge in self.judges:
            for (i, (_, passage)), value in zip(pairs, judge.score([pair for _, pair in pairs]), strict=True):
                if math.isfinite(value):
                    found[i].setdefault(judge.name, {})[passage.id] = round(float(value), 6)
        if self.answer_gain:
            self._gains(rows, found)
        return ({"id": row["id"], "scores": scores} for row, scores in zip(rows, found, strict=True))

    def _judged_passages(self, row: Mapping[str, Any], hits: Sequence[Sequence[Any]]) -> list[Passage]:
        assert self.corpus is not None
        ids: dict[str, None] = dict.fromkeys([*filter(None, [row["seed"]]), *(str(id_) for id_, _ in hits)])
        return [corpus_passage(self.corpus, id_) for id_ in ids]

    def _gains(self, rows: Sequence[Mapping[str, Any]], found: list[dict[str, dict[str, float]]]) -> None:
        """Note how much the seed passage helps to give the answer, where one was given."""
        assert self.corpus is not None and self.answer_gain is not None
        told = [i for i, row in enumerate(rows) if row.get("fields", {}).get("answer") and row["seed"]]
        asked = [(rows[i]["fields"], corpus_passage(self.corpus, rows[i]["seed"])) for i in told]
        given = [(each["query"], passage, each["answer"]) for each, passage in asked]
        gains = self.answer_gain.gains(given) if given else []
        for i, gain in zip(told, gains, strict=True):
            found[i]["answer_gain"] = {rows[i]["seed"]: round(gain, 6)}

    def _stage(self, name: str, title: str, count: int, rows: Rows) -> None:
        """Make the file of a stage, or make it longer, batch by batch."""
        path = self.path(name)
        if path.exists():
            with open(path, "rb") as file:
                if sum(1 for _ in file) >= count:
                    return
            os.replace(path, path.with_name(f"{path.name}.part"))
        self._readers: dict[str, tuple[Iterator[dict[str, Any]], int]] = {}
        tokens = self.bar("tokens read and written") if name == "generated" else no_bar("")
        with self.bar(title, count, None) as move, tokens as told:

            def shown(batch: range) -> Iterable[Mapping[str, Any]]:
                move(batch.start)
                made = list(rows(batch))
                move(batch.stop)
                told(self._tokens)
                return made

            append_in_batches(path, count, self.config.batch, shown)

    def _take_rows(self, stage: str, batch: range) -> list[dict[str, Any]]:
        """The rows of a finished stage at these positions; batches come in their order."""
        stream, at = self._readers.get(stage) or (self.rows(stage), 0)
        found = list(islice(stream, batch.start - at, batch.stop - at))
        self._readers[stage] = stream, batch.stop
        return found

    def check_count(self, seeds: int) -> None:
        """Raise DataError where there is nothing to write for."""
        if not seeds and self.recipe.brainstorm:
            why = Counter(row.get("rejected", "an empty list") for row in self.rows("tasks")).most_common(1)
            raise RunStopped(
                f"no reply has tasks (mostly: {why[0][0]}); remove {self.path('tasks')} to ask anew"
            )
        if not seeds:
            least = f"least_characters = {self.config.least_characters}"
            raise DataError(f"{least}, pattern and evaluation leave no passage to write queries for")

    def _check_stages(self) -> None:
        """Raise ConfigError where a stage was made otherwise, DataError where the corpus has changed."""
        known = check_corpus(self.folder, self.corpus)
        prints = self._fingerprints()
        for stage, of in prints.items():
            files = (self.path(stage), self.path(stage).with_name(f"{stage}.jsonl.part"))
            if (made := [file for file in files if file.exists()]) and known.get(stage, of) != of:
                raise ConfigError(
                    f"{made[0]}: was made by other settings; give another --out, or remove it to make it anew"
                )
        asked = (self.generator, *self.judges)
        urls = {each.name: url for each in asked if (url := getattr(each, "url", ""))}
        for name, url in urls.items():
            if (before := known.get("urls", {}).get(name, url)) != url:
                _log.warning("%s: is asked at %s; what %s wrote before stays", name, url, before)
        noted = {"format_version": FORMAT_VERSION, "corpus": _hash(self.corpus), "urls": urls, **prints}
        write_json(self.folder / STAGES, noted)

    def _fingerprints(self) -> dict[str, str]:
        """Stage -> a hash of all that decides its rows, the stages before included."""
        of, recipe, name = self.config, self.recipe, self.generator.name
        drawn = (of.seed, of.per_passage, of.least_characters, of.pattern, of.choices, of.shared)
        sets = [asdict(each) for each in of.evaluation]
        judges = [*self.judges, *([self.answer_gain] if self.answer_gain else [])]
        settings: dict[str, Any] = {
            "tasks": [recipe.brainstorm, of.tasks, name] if recipe.brainstorm else [],
            "seeds": [drawn, sets, recipe.name, recipe.draws],
            "generated": [list(map(asdict, recipe.steps)), name, of.most_characters, of.batch, self.shots],
            "candidates": [self.retriever.generation if self.retriever else "", of.candidates],
            "judged": [judge.name for judge in judges],
        }
        found, before = {}, ""
        for stage, value in settings.items():
            before = hashlib.sha256(json.dumps([before, value], sort_keys=True).encode()).hexdigest()[:16]
            found[stage] = before
        return found


def check_corpus(folder: Path, corpus: Corpus | None) -> dict[str, Any]:
    """Read the notes of the stages in a folder. Raises DataError where they began with another corpus."""
    known = read_json(folder / STAGES) if (folder / STAGES).exists() else {}
    if known.get("corpus", _hash(corpus)) != _hash(corpus):
        raise DataError(
            f"{folder}: was begun with a corpus of hash {known['corpus']}, but this one has "
            f"{_hash(corpus)}: it changed since, or is another; give another --out"
        )
    return known


def _hash(corpus: Corpus | None) -> str:
    return corpus.content_hash if corpus else ""


def _take(row: dict[str, Any], call: Call, reply: Written, parse: Callable[[str], dict[str, str]]) -> None:
    """Put a reply into the row of its draft: its fields, or the reason why it has none."""
    row["raw"].append(reply.text)
    row["tokens"] = [row["tokens"][0] + reply.prompt_tokens, row["tokens"][1] + reply.new_tokens]
    row["prompt"] = hashlib.sha256(f"{row['prompt']}{call.prompt}".encode()).hexdigest()[:16]
    if reply.logprob is not None:
        row["logprob"] = round(reply.logprob, 6)
    try:
        if reply.refused:
            raise Unparsable(reply.refused)
        row["fields"] = {**row["fields"], **parse(reply.text)}
    except Unparsable as error:
        row["rejected"] = str(error)


def load_shots(config: SynthesisConfig, recipe: Recipe) -> str:
    """The examples of the target task as a prompt shows them. Raises ConfigError where they are missing."""
    if not any("{shots}" in step.prompt for step in recipe.steps):
        return ""
    if config.shots is None:
        raise ConfigError(
            f"shots: recipe {recipe.name} needs JSON lines of {{query, passage}}: 2 to 8 examples"
        )
    rows = list(islice(read_jsonl(config.shots), 8))
    if not all(isinstance(row.get(key), str) for row in rows for key in ("query", "passage")) or not rows:
        raise DataError(f"{config.shots}: each line must have the texts query and passage")
    return "\n".join(f"Passage: {row['passage']}\nQuery: {row['query']}\n" for row in rows)
