"""The client of chat endpoints, OpenAI's `/chat/completions`: retries, replies kept on disk, a budget.

A reply is kept by a hash of address and request, so that nothing is asked twice, also after a restart. A
request that fails is an error with its reason, never a reply.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx

from data.errors import DataError, SleuthError, require, require_range
from data.jsonl import append_jsonl, numbered_jsonl
from data.secret import read_secret
from data.settings import ChatConfig
from retriever_server.client.retries import (
    TryAgain,
    certificates,
    checked_url,
    delay_seconds,
    may_pass,
    retry_after,
)

TRIES = 3
_Parsed = TypeVar("_Parsed")


class ChatError(SleuthError):
    """Says why there is no reply to a request."""


class ChatRefused(ChatError):
    """The server takes no such request: that one prompt is wrong, such as too long."""


class ChatClient:
    """Asks one server; safe to share. The file `cache` (JSON lines) is this process's alone."""

    def __init__(
        self,
        url: str | None,
        name: str = "chat",
        key_file: str | None = None,
        timeout_seconds: float = 30.0,
        max_concurrent: int = 8,
        max_calls: int = 100_000,
        max_tokens: int | None = None,
        cache: Path | None = None,
    ) -> None:
        """name: begins what it says. max_calls, max_tokens: the budget; replies of before a restart count.

        Raises ConfigError where the URL or a limit is wrong, or the key cannot be read.
        """
        like = f"the {name} needs one like http://127.0.0.1:8001/v1"
        base = checked_url(url, f"{name}.url = {url!r}", like).removesuffix("/chat/completions")
        self.url = f"{base}/chat/completions"
        self.name, self.timeout_seconds = name, timeout_seconds
        self.max_concurrent, self.max_calls, self.max_tokens = max_concurrent, max_calls, max_tokens
        require_range(self, f"{name}.", "> 0", "timeout_seconds")
        require_range(self, f"{name}.", ">= 1", "max_concurrent", "max_calls")
        require(max_tokens is None or max_tokens >= 1, f"{name}.max_tokens", max_tokens, ">= 1")
        self._headers = {"Content-Type": "application/json"}
        if key_file is not None:
            key = read_secret(key_file, f"{name}.api_key_file", first_line=True)
            self._headers["Authorization"] = f"Bearer {key}"
        self._cache, self._lock, self._stopped = cache, threading.Lock(), False
        kept = _kept(cache) if cache and cache.exists() else []
        self._known: dict[str, str] = {each["key"]: each["reply"] for each in kept if "reply" in each}
        self._took = {each["key"]: _tokens(each) for each in kept if "reply" in each}
        self._calls, self._tokens = len(kept), sum(sum(_tokens(each)) for each in kept)

    def ask(
        self, requests: Sequence[Mapping[str, Any]], parse: Callable[[str], _Parsed]
    ) -> list[_Parsed | ChatError]:
        """Return what `parse` makes of the reply to each request (its JSON body), or the error it met.

        Equal requests are asked once. A reply for which `parse` raises ValueError is an error, and not kept.
        """
        bodies = [json.dumps(request).encode() for request in requests]
        # No proxy from the environment: nothing but the arguments decides where a request goes.
        client = httpx.Client(
            timeout=self.timeout_seconds, headers=self._headers, trust_env=False, verify=certificates()
        )
        different = list(dict.fromkeys(bodies))
        with client, ThreadPoolExecutor(self.max_concurrent) as pool:
            outcomes = pool.map(lambda body: self._settle(client, body, parse), different)
            known = dict(zip(different, outcomes, strict=True))
        return [known[body] for body in bodies]

    @property
    def answered(self) -> bool:
        """Return whether it has a reply to any request, those of before a restart too."""
        return bool(self._known)

    def stop(self) -> None:
        """Send nothing more, also of what another thread is about to ask; replies under way are kept."""
        self._stopped = True

    def tokens_of(self, request: Mapping[str, Any]) -> tuple[int, int]:
        """The tokens read and written that the server told; (0, 0) where it did not answer."""
        return self._took.get(self._key(json.dumps(request).encode()), (0, 0))

    def _key(self, body: bytes) -> str:
        return hashlib.sha256(self.url.encode() + b"\n" + body).hexdigest()

    def _settle(
        self, client: httpx.Client, body: bytes, parse: Callable[[str], _Parsed]
    ) -> _Parsed | ChatError:
        """Ask until there is a reply that can be parsed, and keep it."""
        key = self._key(body)
        try:
            if key in self._known:
                return parse(self._known[key])
            reply, tokens = self._ask_again(client, body)
            return self._note(key, reply, tokens, parse)
        except ValueError as error:  # asking the same again would be useless
            return ChatError(f"{self.name} {self.url}: {error}")
        except ChatError as error:
            return error

    def _note(
        self, key: str, reply: str, tokens: tuple[int, int], parse: Callable[[str], _Parsed]
    ) -> _Parsed:
        """Count what a reply took and keep it, parsed; one that cannot be parsed is paid for and not kept."""
        row: dict[str, Any] = {"key": key, **dict(zip(("read", "written"), tokens, strict=True))}
        try:
            parsed = parse(reply)
            row["reply"] = reply
        finally:
            with self._lock:
                self._tokens += sum(tokens)
                if "reply" in row:
                    self._known[key], self._took[key] = reply, tokens
                if self._cache:
                    append_jsonl(self._cache, [row])
        return parsed

    def _ask_again(self, client: httpx.Client, body: bytes) -> tuple[str, tuple[int, int]]:
        """Return the reply and its tokens, or raise ChatError; ValueError for an answer that is none."""
        failures, waited = 0, 0.0
        while True:
            self._spend()
            try:
                return self._ask_once(client, body)
            except TryAgain as error:
                failures, told = failures + 1, error.after_seconds or 0.0
                waited += told  # as long as it says when, it is asked again, within the time of one request
                if (failures >= TRIES and not told) or waited > self.timeout_seconds:
                    tries = "1 try" if failures == 1 else f"{failures} tries"
                    wait = f", to wait {told:g} s" if told else ""
                    raise ChatError(f"{self.name} {self.url}: {tries} failed ({error}{wait})") from error
            time.sleep(told or delay_seconds(failures))

    def _spend(self) -> None:
        """Count a request; raise ChatError where the budget is spent."""
        with self._lock:
            if self._stopped:
                raise ChatError(f"{self.name}: stopped")
            name, tokens = self.name, self.max_tokens
            if self._calls >= self.max_calls:
                raise ChatError(f"{name}: all {self.max_calls} requests of {name}.max_calls are spent")
            if tokens is not None and self._tokens >= tokens:
                raise ChatError(f"{name}: all {tokens} tokens of {name}.max_tokens are spent")
            self._calls += 1

    def _ask_once(self, client: httpx.Client, body: bytes) -> tuple[str, tuple[int, int]]:
        end, content = time.monotonic() + self.timeout_seconds, b""
        try:
            with client.stream("POST", self.url, content=body) as response:
                for chunk in response.iter_bytes():  # the client's own timeout is for each chunk
                    content += chunk
                    if time.monotonic() > end:
                        raise httpx.ReadTimeout("the reply does not end")
        except httpx.HTTPError as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from error
        if may_pass(response.status_code):
            raise TryAgain(f"answered {response.status_code}", retry_after(response.headers))
        said = f"answered {response.status_code}: {content[:200].decode(errors='replace')}"
        if response.status_code in (400, 413, 422):
            raise ChatRefused(f"{self.name} {self.url}: {said}")
        if response.status_code != 200:
            raise ValueError(said)
        return _parse(content)


def open_chat(config: ChatConfig, name: str, cache: Path | None) -> ChatClient:
    """Return a client of the server in a configuration. Raises ConfigError."""
    limits = (config.timeout_seconds, config.max_concurrent, config.max_calls)
    return ChatClient(config.url, name, config.api_key_file, *limits, cache=cache)


def _parse(content: bytes) -> tuple[str, tuple[int, int]]:
    """Return the text of a chat completion, and the tokens that it says were read and written."""
    try:
        completion = json.loads(content)
        text = completion["choices"][0]["message"]["content"] or ""
        if isinstance(text, list):  # parts; those of another type are thoughts
            text = "".join(part["text"] for part in text if part["type"] == "text")
        if not isinstance(text, str):
            raise TypeError
        read, written, total = (_count(completion, name) for name in ("prompt", "completion", "total"))
        return text, (max(read, total - written), written)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"not a chat completion: {content[:100]!r}") from None


def _count(completion: Mapping[str, Any], name: str) -> int:
    """Return the number of tokens that a completion tells; 0 where it tells none."""
    usage = completion.get("usage")
    told = usage.get(f"{name}_tokens") if isinstance(usage, Mapping) else None
    return int(told) if isinstance(told, int | float) and 0 < told < 1e15 else 0


def _kept(cache: Path) -> list[dict[str, Any]]:
    """Return what is kept of earlier replies. Raises DataError with the line of something else."""
    found = []
    for number, each in numbered_jsonl(cache, tolerate_cut_tail=True):
        words = isinstance(each.get("key"), str) and isinstance(each.get("reply", ""), str)
        if not (words and all(isinstance(count, int) for count in _tokens(each))):
            raise DataError(f"{cache}:{number}: not a kept reply; without this line it is asked for again")
        found.append(each)
    return found


def _tokens(kept: Mapping[str, Any]) -> tuple[int, int]:
    return kept.get("read", kept.get("tokens", 0)), kept.get("written", 0)
