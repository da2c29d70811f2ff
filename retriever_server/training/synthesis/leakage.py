"""Held-out evaluation sets: neither their questions nor their gold passages may get into training."""

from __future__ import annotations

from collections.abc import Sequence

from data.corpus import Corpus
from data.errors import DataError
from data.records import Passage
from retriever_server.training.synthesis.config import EvaluationSet, Shared
from retriever_server.training.synthesis.drafts import Draft
from retriever_server.training.synthesis.filters import Seen


class HeldOut:
    """Finds what a draft shares with evaluation sets."""

    def __init__(self, sets: Sequence[EvaluationSet], corpus: Corpus | None, shared: Shared) -> None:
        """Raises DataError where no gold passage is in the corpus: the ids are of another one."""
        from data.formats.beir import load_queries

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
        from data.formats.trec import load_qrels

        judged = load_qrels(given.qrels or "").items()
        ids = {id_ for query, of in judged if query in asked for id_, grade in of.items() if grade > 0}
        found = [corpus.get(id_) for id_ in sorted(ids)] if corpus is not None else []
        texts = {_shown(passage.text) for passage in found if passage is not None}
        if not texts:
            where = corpus.path if corpus is not None else "no corpus"
            raise DataError(
                f"evaluation: {given.qrels}: none of its passages is in {where}; give their corpus"
            )
        return texts

    def holds(self, passage: Passage) -> bool:
        """Return whether a passage is gold for a question of a set."""
        return bool(self._texts) and _shown(passage.text) in self._texts

    def reason(self, draft: Draft, texts: Sequence[str]) -> str:
        """Return why a draft with positives of these texts leaks; "" if it does not."""
        if self._questions.find(draft.query) is not None:
            return "asks an evaluation question"
        return "positive is gold in an evaluation set" if self._texts & set(map(_shown, texts)) else ""


def _shown(text: str) -> str:
    return " ".join(text.lower().split())
