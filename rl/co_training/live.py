"""The retriever of a loop behind a server: the new index at its place, then a reload that all can see."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import httpx

from data.atomic import new_folder
from data.errors import RetrieverError, RetrieverRefused, RetrieverUnavailable
from data.secret import read_secret
from retriever_server.indexes.manifest import MANIFEST

AGREE = 20
"""Answers in a row that must name the generation: workers and replicas swap each by itself."""
PAUSE_SECONDS = 0.02


def put_in_place(index: Path, place: Path) -> None:
    """Make the folder `place` a copy of an index, whole or not at all."""
    with new_folder(place, mark=MANIFEST) as folder:
        shutil.copytree(index, folder, dirs_exist_ok=True)


def reload(urls: str, token_file: str | None, generation: str, deadline_seconds: float = 120.0) -> None:
    """Let the server, or each of those with commas between, open what lies at its place, and wait for it.

    Raises RetrieverRefused where one will not, RetrieverUnavailable where one does not answer, or not with
    this generation before the deadline.
    """
    token = read_secret(token_file, "admin_token_file") if token_file else ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(timeout=deadline_seconds, headers=headers, trust_env=False) as client:
        for url in map(str.strip, urls.split(",")):
            _ask(client, "POST", f"{url}/admin/reload")
            _wait(client, url, generation, time.monotonic() + deadline_seconds)


def check_generation(urls: str, generation: str) -> None:
    """Raise RetrieverError where a server answers with another generation."""
    with httpx.Client(timeout=10.0, trust_env=False) as client:
        for url in map(str.strip, urls.split(",")):
            found = _ask(client, "GET", f"{url}/healthz").get("generation")
            if found != generation:
                raise RetrieverError(
                    f"{url}: serves {found}, the loop is at {generation}: "
                    "put the index of state.json at its place and reload it"
                )


def _wait(client: httpx.Client, url: str, generation: str, end: float) -> None:
    in_a_row, found = 0, None
    while in_a_row < AGREE:
        found = _ask(client, "GET", f"{url}/healthz").get("generation")
        in_a_row = in_a_row + 1 if found == generation else 0
        if time.monotonic() > end:
            raise RetrieverUnavailable(f"{url}: still serves {found}, not {generation}")
        time.sleep(PAUSE_SECONDS)


def _ask(client: httpx.Client, method: str, url: str) -> dict[str, Any]:
    try:
        answer = client.request(method, url)
    except httpx.HTTPError as error:
        raise RetrieverUnavailable(f"{url}: {type(error).__name__}: {error}") from error
    try:
        said = answer.json()
    except ValueError:
        said = None
    if answer.status_code != 200 or not isinstance(said, dict):
        raise RetrieverRefused(f"{url}: answered {answer.status_code}: {answer.text[:200]}")
    return said
