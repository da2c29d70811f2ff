"""Filters of drafts: a table of functions. Each makes, from its options, a check of one draft after another.

A check returns the reason why a draft is rejected, or the draft that is kept (with fewer negatives, maybe).
`HeldOut` keeps the questions and gold passages of evaluation sets out, whatever the filters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import wraps
from pathlib import Path
from typing import Any

import yaml

from data.corpus import Corpus
from data.errors import ConfigError, DataError, require
from data.formats.beir import load_queries
from data.formats.trec import load_qrels
from data.metrics.answers import cover_em, normalize_unicode
from data.objects.class_path import Signature
from data.records import Passage
from retriever_server.training.synthesis.config import EvaluationSet, Shared
from retriever_server.training.synthesis.drafts import Draft

Check = Callable[[Draft], Draft | str]
_WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
_STOP, _EMPTY = frozenset(_WORDS["stop"].split()), frozenset(_WORDS["empty"].split())
_ASKS = frozenset(_WORDS["asks"].split())
_FUNCTION_WORDS = {name: frozenset(words.split()) for name, words in _WORDS["function_words"].items()}
_POINTS_AT = re.compile(
    rf"\b(this|the|that|these|above|given|following)\s+(\w+\s+)?({'|'.join(_WORDS['points_at'].split())})s?\b",
    re.IGNORECASE,
)
_GIVEN = ("draft", "corpus")
SIMILARITY = 0.9
"""Share of common content words from which on two queries ask the same."""


def same_text(text: str) -> str:
    """Return a text without regard to case and blanks."""
    return " ".join(text.lower().split())


def content_words(text: str) -> frozenset[str]:
    """The words of a text that are not in every other one, in normal form, plural or not."""
    words = (word for word in normalize_unicode(text).split() if word not in _STOP)
    return frozenset(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words)


class Seen:
    """Queries, found again where nearly the same is asked: by their content words, in any order.

    Two sets of words with a Jaccard similarity of s share one of the first n - ceil(s n) + 1 in a fixed
    order, so only queries with one of these in common are compared (prefix filter, Chaudhuri et al. 2006).
    """

    def __init__(self, similarity: float = SIMILARITY) -> None:
        self.similarity = similarity
        self._by_word: dict[str, list[tuple[frozenset[str], str]]] = defaultdict(list)

    def find(self, query: str) -> str | None:
        """The name of a query that asks nearly the same."""
        words = content_words(query) or frozenset(query.lower().split())
        for word in self._prefix(words):
            for other, name in self._by_word[word]:
                if len(words & other) >= self.similarity * len(words | other):
                    return name
        return None

    def add(self, query: str, name: str) -> None:
        """Remember a query."""
        words = content_words(query) or frozenset(query.lower().split())
        for word in self._prefix(words):
            self._by_word[word].append((words, name))

    def _prefix(self, words: frozenset[str]) -> list[str]:
        ordered = sorted(words, key=lambda word: (-len(word), word))  # long words are rare ones
        return ordered[: len(words) - math.ceil(self.similarity * len(words)) + 1]


def each_draft(judge: Callable[..., Draft | str]) -> Callable[..., Check]:
    """Make a filter of a function that judges a draft by itself, given the corpus and the options."""

    @wraps(judge)
    def make(corpus: Corpus, **options: Any) -> Check:
        return lambda draft: judge(draft, corpus, **options)

    return make


@each_draft
def length(draft: Draft, corpus: Corpus, least_words: int = 3, most_words: int = 64) -> Draft | str:
    """A query has so many words."""
    words = len(normalize_unicode(draft.query).split())
    return "too short" if words < least_words else "too long" if words > most_words else draft


@each_draft
def language(draft: Draft, corpus: Corpus, of: str = "") -> Draft | str:
    """A query is in the language that was drawn, or in `of`: by its script, and by its function words."""
    due = of or str(draft.draws.get("language", ""))
    scripts = _WORDS["scripts"].get(due) or (["LATIN"] if due in _FUNCTION_WORDS else None)
    letters = [unicodedata.name(c, "").split(" ")[0].split("-")[0] for c in draft.query if c.isalpha()]
    if scripts and letters and sum(each in scripts for each in letters) < 0.5 * len(letters):
        return "another language"
    words = Counter(draft.query.lower().split())
    hits = {name: sum(words[w] for w in known) for name, known in _FUNCTION_WORDS.items()}
    other = due in hits and max(hits.values()) >= 2 + 2 * hits[due]
    return "another language" if other else draft


@each_draft
def vague(draft: Draft, corpus: Corpus, least_content_words: int = 2) -> Draft | str:
    """A query can be understood without its passage: it points at none, and names something."""
    if _POINTS_AT.search(draft.query):
        return "points at the passage"
    return "vague" if len(content_words(draft.query) - _EMPTY) < least_content_words else draft


@each_draft
def quotes(draft: Draft, corpus: Corpus, most_words: int = 8, most_share: float = 0.75) -> Draft | str:
    """A query is no quote: no run of more than `most_words`, nor of `most_share` of it, is the passage's.

    The share counts for queries of at least five words that do not begin like a question.
    """
    passage = _passage(corpus, draft.seed)
    query = normalize_unicode(draft.query).split()
    if passage is None or not query:
        return draft
    text = normalize_unicode(passage.text).split()
    run = SequenceMatcher(None, query, text, autojunk=False).find_longest_match().size
    most = len(query) >= 5 and query[0] not in _ASKS and run > most_share * len(query)
    return "quotes the passage" if run > most_words or most else draft


def duplicates(corpus: Corpus, similarity: float = SIMILARITY) -> Check:
    """No earlier draft that was not rejected before asks nearly the same. Put it behind the others."""
    require(0 < similarity <= 1, "filters.duplicates.similarity", similarity, "in (0, 1]")
    seen = Seen(similarity)

    def check(draft: Draft) -> Draft | str:
        if seen.find(draft.query) is not None:
            return "near-duplicate"
        seen.add(draft.query, draft.id)
        return draft

    return check


def round_trip(corpus: Corpus, k: int = 1, of: str = "positive") -> Check:
    """The retriever finds the positive (of: seed, the seed) among its best k (Promptagator, K = 1)."""
    require(k >= 1, "filters.round_trip.k", k, ">= 1")
    require(of in ("positive", "seed"), "filters.round_trip.of", of, "positive or seed")

    def check(draft: Draft) -> Draft | str:
        wanted = draft.seed if of == "seed" else draft.positive
        return draft if wanted in [id_ for id_, _ in draft.hits[:k]] else "not found again"

    return check


@each_draft
def answerable(
    draft: Draft, corpus: Corpus, required: bool = False, least_gain: float | None = None
) -> Draft | str:
    """The answer that was given stands in the positive, and there makes itself likelier (`answer_gain`).

    required: a draft without an answer is rejected. least_gain: in nats a token, by the AnswerGain judge.
    """
    answer = str(draft.fields.get("answer", ""))
    if not answer:
        return "no answer given" if required else draft
    passage = _passage(corpus, draft.positive)
    if passage is not None and not cover_em(f"{passage.title} {passage.text}", answer):
        # cover_em(prediction, gold): the words of the answer side by side in the passage
        return "answer not in the passage"
    gain = draft.scores.get("answer_gain", {}).get(draft.positive)
    helps = least_gain is None or gain is None or gain > least_gain
    return draft if helps else "the passage does not help to answer"


@each_draft
def score(draft: Draft, corpus: Corpus, least: float, of: str = "retriever") -> Draft | str:
    """The positive has at least this score: of the retriever (Qwen3: cosine .7), or of the judge named."""
    known = dict(draft.hits) if of == "retriever" else draft.scores.get(of, {})
    return draft if known.get(draft.positive, -math.inf) >= least else f"low score of {of}"


@each_draft
def logprob(draft: Draft, corpus: Corpus, least: float) -> Draft | str:
    """The generator was sure of its words (InPars): mean log-probability a token."""
    if draft.logprob is None:
        return "no log-probability known"
    return draft if draft.logprob >= least else "unlikely words"


@each_draft
def false_negatives(
    draft: Draft, corpus: Corpus, margin: float = 0.0, share: float | None = None
) -> Draft | str:
    """Drop negatives that score less than `margin` (or than the share of it) below the positive.

    By the labels (the judges' scores); without these by the retriever's. One without
    a score stays; a draft with none left is rejected.
    """
    known = draft.labels or dict(draft.hits)
    if not draft.negatives or draft.positive not in known:
        return draft
    top = known[draft.positive]
    limit = top - (abs(top) * share if share is not None else margin)
    kept = tuple(n for n in draft.negatives if known.get(n, -math.inf) <= limit)
    return replace(draft, negatives=kept) if kept else "all negatives may be positives"


FILTERS: Mapping[str, Callable[..., Check]] = {
    each.__name__: each
    for each in (
        length, language, vague, quotes, answerable, round_trip, score, logprob, false_negatives, duplicates
    )
}  # fmt: skip


def make_filters(given: Mapping[str, Mapping[str, Any] | None], corpus: Any) -> dict[str, Check]:
    """The checks of a recipe, in its order. Raises ConfigError for unknown names and options."""
    made = {}
    for name, options in given.items():
        if name not in FILTERS:
            raise ConfigError(f"filters: {name!r}: must be one of {', '.join(FILTERS)}")
        options = {} if options is None else options
        require(isinstance(options, Mapping), f"filters.{name}", options, "its options, such as {k: 1}")
        takes = Signature(FILTERS[name], name, f"filters.{name}", _GIVEN)
        takes.check_keys(options)
        takes.check_required({**options, **dict.fromkeys(_GIVEN, 0)})
        made[name] = FILTERS[name](**{**takes.typed(options), "corpus": corpus})
    return made


def _passage(corpus: Corpus | None, id_: str) -> Passage | None:
    return corpus.get(id_) if corpus is not None and id_ else None


class HeldOut:
    """Finds what a draft shares with evaluation sets."""

    def __init__(self, sets: Sequence[EvaluationSet], corpus: Corpus | None, shared: Shared) -> None:
        """Raises DataError where no gold passage is in the corpus: the ids are of another one."""
        self._questions, self._texts = Seen(), set[str]()
        for each in sets if shared != "all" else ():
            asked = load_queries(each.queries)
            for question in asked:
                self._questions.add(question.text, question.id)
            if each.qrels and shared == "nothing":
                there = Corpus(each.corpus) if each.corpus else corpus
                self._texts |= self._gold_texts(each, {question.id for question in asked}, there)

    @staticmethod
    def _gold_texts(given: EvaluationSet, asked: set[str], corpus: Corpus | None) -> set[str]:
        """The texts that are relevant to these questions: qrels may judge others, too."""
        judged = load_qrels(given.qrels or "").items()
        ids = {id_ for query, of in judged if query in asked for id_, grade in of.items() if grade > 0}
        found = [corpus.get(id_) for id_ in sorted(ids)] if corpus is not None else []
        texts = {same_text(passage.text) for passage in found if passage is not None}
        if not texts:
            where = corpus.path if corpus is not None else "no corpus"
            raise DataError(
                f"evaluation: {given.qrels}: none of its passages is in {where}; give their corpus"
            )
        return texts

    def holds(self, passage: Passage) -> bool:
        """Return whether a passage is gold for a question of a set."""
        return bool(self._texts) and same_text(passage.text) in self._texts

    def reason(self, draft: Draft, texts: Sequence[str]) -> str:
        """Return why a draft with positives of these texts leaks; "" if it does not."""
        if self._questions.find(draft.query) is not None:
            return "asks an evaluation question"
        return "positive is gold in an evaluation set" if self._texts & set(map(same_text, texts)) else ""
