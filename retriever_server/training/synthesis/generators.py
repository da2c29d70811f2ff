"""Generators: what writes the texts. One interface; the adapter over the agent's engines lies above."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from data.errors import ConfigError
from data.jsonl import read_jsonl
from data.records import Passage
from retriever_server.client.chat import ChatClient, ChatError, ChatRefused
from retriever_server.training.expansion import Seq2SeqQueries
from retriever_server.training.synthesis.drafts import Call, Written


class Generator(ABC):
    """Calls in, a text for each out."""

    name: str
    """The model and its settings, kept in the provenance."""
    url = ""
    """The address of the endpoint, if it is one."""

    @abstractmethod
    def write(self, calls: Sequence[Call]) -> list[Written]:
        """Answer each call, in their order; the same calls together give the same texts.

        Raises a SleuthError where it cannot go on: asked again later, it does.
        """


class Chat(Generator):
    """A model behind an OpenAI-compatible endpoint. Replies are kept in `cache`: nothing is paid twice."""

    def __init__(
        self,
        url: str,
        model: str = "default",
        api_key_file: str | None = None,
        system: str = "",
        max_concurrent: int = 8,
        max_calls: int = 100_000,
        max_tokens: int | None = None,
        timeout_seconds: float = 120.0,
        cache: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """max_calls, max_tokens: the budget of all requests. options: more of each request's body."""
        self._model, self._system, self._options = model, system, options or {}
        told = json.dumps([system, self._options], sort_keys=True).encode()
        self.name = f"chat {model}" + (f" {sha256(told).hexdigest()[:8]}" if system or options else "")
        kept = Path(cache) if cache else None
        self.url = url
        self._client = ChatClient(
            url, "generator", api_key_file, timeout_seconds, max_concurrent, max_calls, max_tokens, kept
        )

    def write(self, calls: Sequence[Call]) -> list[Written]:
        """As `Generator.write`; a prompt that is refused is no reason to stop, any other error is."""
        bodies = [self._body(call) for call in calls]
        outcomes = self._client.ask(bodies, str)
        errors = [each for each in outcomes if isinstance(each, ChatError)]
        broken = [each for each in errors if not isinstance(each, ChatRefused)]
        if broken or len(errors) == len(outcomes):
            raise (broken or errors)[0]
        return [
            Written("", refused="refused by the endpoint")
            if isinstance(each, ChatError)
            else Written(each, *self._client.tokens_of(body))
            for body, each in zip(bodies, outcomes, strict=True)
        ]

    def _body(self, call: Call) -> dict[str, Any]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return {
            "model": self._model,
            "messages": [*system, {"role": "user", "content": call.prompt}],
            "temperature": call.temperature,
            "top_p": call.top_p,
            "max_tokens": call.max_tokens,
            "seed": call.seed,
            **({"stop": list(call.stop)} if call.stop else {}),
            **self._options,
        }


class Seq2Seq(Generator):
    """A sequence-to-sequence model that was trained to write queries, such as a docT5query: no prompt."""

    def __init__(self, model: str, top: int = 10, max_tokens: int = 64, device: str = "cpu") -> None:
        """top: each word is drawn among so many."""
        self.name = f"seq2seq {model} {top} {max_tokens}"
        self._model = Seq2SeqQueries(model, 1, top, max_tokens, device=device)

    def write(self, calls: Sequence[Call]) -> list[Written]:
        """As `Generator.write`, from title and text of the seed passages."""
        self._model.seed = calls[0].seed  # the calls of a batch draw one after the other
        texts = self._model([call.passage or Passage("", call.prompt) for call in calls])
        return [Written(text) for text in texts]


class Scripted(Generator):
    """Fixed replies in turn, for tests and trials: of a list, or of the "text" of JSON lines."""

    def __init__(self, replies: list[str] | None = None, path: str | None = None) -> None:
        self.replies = replies or [str(row["text"]) for row in read_jsonl(path or "")]
        if not self.replies:
            raise ConfigError("replies: must hold at least one text")
        self.name = "scripted"

    def write(self, calls: Sequence[Call]) -> list[Written]:
        """The reply of each call: by its seed, so that it does not depend on what was asked before."""
        texts = [self.replies[call.seed % len(self.replies)] for call in calls]
        pairs = zip(calls, texts, strict=True)
        return [Written(text, len(call.prompt.split()), len(text.split())) for call, text in pairs]


GENERATORS: Mapping[str, str] = dict.fromkeys(("Chat", "Seq2Seq", "Scripted"), __name__)
"""Short names of generators."""
