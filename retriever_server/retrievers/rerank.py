"""A second look at the first hits: `Rerank` orders them anew by a model that reads both texts together.

Two such models: `CrossEncoder` (sentence-transformers) and `YesNo` (a language model's yes or no).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from data.errors import ConfigError, require
from data.models.hub import find_model
from data.records import Hit, Passage
from data.text import cut_for, replace_halves
from retriever_server.retriever import Filter, Query, Retriever, Scorer, Scores, Wrapper, texts_of
from retriever_server.retrievers.causal import CausalJudge, load_or_refuse

Pair = tuple[str, Passage]


class Rerank(Wrapper):
    """The first `depth` hits of another retriever, ordered by what a scorer says of them."""

    scorer: Scorer

    def __init__(self, retriever: Retriever, scorer: Scorer, depth: int = 50) -> None:
        require(depth >= 1, "depth", depth, ">= 1")
        super().__init__(retriever)
        self.retriever, self.scorer, self.depth = retriever, scorer, depth
        self._one_at_a_time = threading.Lock()  # tokenizers refuse two threads at once

    @property
    def generation(self) -> str:
        """The retriever behind, the scorer, and how deep it looks."""
        return self.name_of(self.retriever.generation)

    def name_of(self, generation: str, depth: int | None = None) -> str:
        """Return the generation of hits that it orders anew, where this one found them."""
        return f"rerank({generation}, {self.scorer.name}, {depth or self.depth})"

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return the `k` best of the first `depth` hits, or k if that is more; ties in their first order."""
        return self.reorder(queries, self.retriever.search(queries, max(k, self.depth), where), k)

    def reorder(
        self, queries: Sequence[Query], rankings: list[list[Hit]], k: int, depth: int | None = None
    ) -> list[list[Hit]]:
        """Return the `k` best of these hits; `depth`: how many there were to be, where another found them."""
        scores = self.score(queries, [[hit.passage for hit in ranking] for ranking in rankings])
        scored = [
            [Hit(hit.passage, of[hit.passage.id], self.name_of(hit.generation, depth)) for hit in ranking]
            for ranking, of in zip(rankings, scores, strict=True)
        ]
        return [sorted(ranking, key=lambda hit: -hit.score)[:k] for ranking in scored]

    def score(self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]) -> Scores:
        asked = texts_of(queries, self.scorer.name)
        with self._one_at_a_time:
            return self.scorer.score_each(asked, passages)

    def describe(self) -> dict[str, Any]:
        behind = {"scorer": self.scorer.name, "retriever": self.retriever.describe()}
        return {**super().describe(), **behind}

    def takes_images(self) -> bool:
        """Scorers read texts."""
        return False


class CrossEncoder(Scorer):
    """A cross-encoder of sentence-transformers; reads title and text."""

    def __init__(
        self, model: Any, max_length: int | None = None, batch_size: int = 32, device: str | None = None,
        name: str = "",
    ) -> None:  # fmt: skip
        """`model`: folder or hub name, or one that is loaded, which `name` names; `max_length`: tokens of a
        pair, the model's own without."""
        if not isinstance(model, str):
            self.name, self.batch_size, self._model = name, batch_size, model
            return
        found = find_model(model, "model")
        from sentence_transformers import CrossEncoder as Model

        self.name, self.batch_size = f"cross-encoder {model}", batch_size
        self._model = load_or_refuse(
            model, lambda: Model(found, max_length=max_length, device=device, trust_remote_code=False)
        )
        answers = [getattr(self._model[-1], f"{word}_token_id", None) for word in ("true", "false")]
        if (unknown := self._model.tokenizer.unk_token_id) is not None and unknown in answers:
            raise ConfigError(
                f"model = {model!r}: no reranker: a language model without the tokens yes and no"
            )

    def score(self, pairs: list[Pair]) -> list[float]:
        """Return the model's own number for each pair."""
        tokenizer, longest = self._model.tokenizer, self._model.max_seq_length
        texts = [
            (replace_halves(query), cut_for(tokenizer, passage.contents, longest)) for query, passage in pairs
        ]
        return self._model.predict(texts, batch_size=self.batch_size, show_progress_bar=False).tolist()

    def tokens_of(self, query: str, passage: Passage) -> tuple[int, int]:
        text = cut_for(self._model.tokenizer, passage.contents, self._model.max_seq_length)
        whole = len(self._model.tokenizer(replace_halves(query), text, verbose=False).input_ids)
        return whole, min(whole, self._model.max_seq_length or whole)


def parts_of_prompt(tokenizer: Any, prompt: str, chat: bool | None = None) -> tuple[str, str, str]:
    """Split a prompt before and after {query} and {passage}, in the chat template if it has one."""
    if chat or (chat is None and tokenizer.chat_template):
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, found, rest = prompt.partition("{query}")
    between, found_too, after = rest.partition("{passage}")
    if not (found and found_too):
        raise ConfigError("prompt: must hold {query} and, after it, {passage}")
    return before, between, after


def first_tokens(tokenizer: Any, yes: str, no: str) -> list[int]:
    """Return the first tokens of the two answers; ConfigError where they are the same."""
    found = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (yes, no)]
    if found[0] == found[1]:
        raise ConfigError(f"yes = {yes!r}, no = {no!r}: begin with the same token")
    return found


QUESTION = "Query: {query}\nPassage: {passage}\nIs the passage relevant to the query? Answer yes or no."


class YesNo(Scorer):
    """Scores by a causal language model: log p(yes) - log p(no)."""

    def __init__(
        self,
        model: str,
        prompt: str = QUESTION,
        yes: str = "yes",
        no: str = "no",
        chat: bool | None = None,
        max_length: int = 512,
        batch_size: int = 16,
        device: str = "cpu",
        dtype: str = "auto",
    ) -> None:
        """`prompt` holds {query} and {passage}; `yes`, `no`: what follows it (their first token counts).

        chat: wrap the prompt in the model's chat template; None: where it has one. max_length: tokens of
        the whole prompt; the passage is cut to fit.
        """
        self.name, self.max_length = f"yes-no {model}", max_length
        self._lm = CausalJudge(model, "", batch_size, device, dtype)
        self._tokenizer, self._tokens = self._lm.tokenizer, self._lm.tokens
        self._before, self._between, self._after = parts_of_prompt(self._tokenizer, prompt, chat)
        self._yes, self._no = first_tokens(self._tokenizer, yes, no)

    def score(self, pairs: list[Pair]) -> list[float]:
        """Return the difference of the two logits after each prompt, in batches of similar length."""
        return self._lm.differences([self._prompt(*pair) for pair in pairs], self._yes, self._no)

    def tokens_of(self, query: str, passage: Passage) -> tuple[int, int]:
        whole = len(self._whole(query, passage))
        return whole, min(whole, self.max_length)

    def _whole(self, query: Query, passage: Passage) -> list[int]:
        contents = cut_for(self._tokenizer, passage.contents, self.max_length)
        return self._tokens(f"{self._before}{query}{self._between}{contents}{self._after}")

    def _prompt(self, query: Query, passage: Passage) -> list[int]:
        whole = self._whole(query, passage)
        if len(whole) <= self.max_length:
            return whole
        tail = self._tokens(self._after)
        return [*whole[: max(0, self.max_length - len(tail))], *tail]  # what is cut is the passage
