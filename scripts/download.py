"""`sleuth download`: a large file over HTTP, in one or several parts, going on where it stopped."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.request import getproxies

from data.errors import ConfigError, DataError, SleuthError, StorageError, require
from data.jsonl import read_json, write_json
from data.machine.listening import why_silent
from retriever_server.client.retries import delay_seconds, may_pass
from scripts.console import bar

_log = logging.getLogger(__name__)


def main(url: str, out: str, sha256: str | None = None, attempts: int = 10) -> None:
    """Fetch a file; the same command again goes on after the last byte that arrived.

    Until it is whole it is called OUT.part, with its state in OUT.part.json.

    Args:
        url: Address of the file; of several parts, in their order, with commas between.
        out: File to write.
        sha256: Digest in hexadecimal of the whole file, checked before it gets its name.
        attempts: How often to ask again, one after the other, without a byte in between.
    """
    urls = [part.strip() for part in url.split(",") if part.strip()]
    web = bool(urls) and all(part.startswith(("http://", "https://")) for part in urls)
    require(web, "url", url, "http(s) addresses with commas between")
    hexadecimal = sha256 is None or re.fullmatch("[0-9a-fA-F]{64}", sha256) is not None
    require(hexadecimal, "sha256", sha256, "64 hexadecimal digits")
    require(attempts >= 1, "attempts", attempts, ">= 1")
    path = Path(out)
    require(not path.is_dir(), "out", out, "the file to write, not a folder")
    if path.exists():
        _check_digest(path, sha256)
        print(f"already there: {path} ({path.stat().st_size:,} bytes)")
        return
    if not getproxies() and (reason := why_silent(urls[0])):  # later on it is asked again and again
        raise DataError(f"{urls[0]}: nobody answers there ({reason})")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch_all(urls, part, attempts)
        _check_digest(part, sha256)
        os.replace(part, path)
    except SleuthError:
        raise
    except OSError as error:
        raise StorageError(f"{part}: cannot be written: {error.strerror or error}") from error
    _state_path(part).unlink()
    print(f"{path}: {path.stat().st_size:,} bytes")


def _fetch_all(urls: list[str], part: Path, attempts: int) -> None:
    """Fetch all urls one after the other into `part`; the state says where the present one begins."""
    state: dict[str, Any] = {"urls": urls, "finished": 0, "start": 0, "tag": None}
    if part.exists() and _state_path(part).exists():
        state = read_json(_state_path(part))
        if state["urls"] != urls:
            raise ConfigError(f"{part}: is of {', '.join(state['urls'])}; remove it, or give another --out")
    else:
        part.write_bytes(b"")
    for number in range(state["finished"], len(urls)):
        _fetch(urls[number], part, state, attempts)
        state |= {"finished": number + 1, "start": part.stat().st_size, "tag": None}
        write_json(_state_path(part), state)


def _fetch(url: str, part: Path, state: dict[str, Any], attempts: int) -> None:
    """One url to its end; raises DataError when `attempts` in a row brought nothing."""
    import httpx

    failures, reason = 0, ""
    shown = bar(url.rpartition("/")[2][:40] or url, done=None, unit="bytes")
    with httpx.Client(follow_redirects=True, timeout=60.0) as session, shown as move:
        while failures < attempts:
            have = part.stat().st_size
            try:
                if _fetch_rest(session, url, part, state, move):
                    return
                reason = "it ended early"
            except httpx.InvalidURL as error:
                raise ConfigError(f"url = {url}: {error}") from error
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
            failures = 0 if part.stat().st_size > have else failures + 1
            if 0 < failures < attempts:
                _log.warning("%s: %s; attempt %d of %d follows", url, reason, failures + 1, attempts)
            time.sleep(delay_seconds(failures, 30.0) if failures else 0.0)
    raise DataError(f"{url}: gave up after {attempts} attempts ({reason}); the same command goes on")


def _fetch_rest(session: Any, url: str, part: Path, state: dict[str, Any], move: Any) -> bool:
    """Ask for what is missing, and append it as it comes; whether that was all."""
    have = part.stat().st_size - state["start"]
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if state["tag"]:
            headers["If-Range"] = state["tag"]  # the file of before, or all of the new one
    with session.stream("GET", url, headers=headers) as answer:
        status, length = answer.status_code, int(answer.headers.get("content-length") or -1)
        if status == 416 and answer.headers.get("content-range", "").endswith(f"/{have}"):
            return True
        if status == 416 and have:  # the file is another, and shorter
            os.truncate(part, state["start"])
            return False
        if may_pass(status):
            return False
        if status not in (200, 206):
            raise DataError(f"{url}: answered {status} {answer.reason_phrase}")
        have = have if status == 206 else 0
        tag = answer.headers.get("etag")
        state["tag"] = tag if tag and not tag.startswith("W/") else answer.headers.get("last-modified")
        write_json(_state_path(part), state)
        with open(part, "rb+") as file:
            file.seek(state["start"] + have)
            file.truncate()
            move(have, have + length if length >= 0 else None)
            for chunk in answer.iter_raw():
                file.write(chunk)
                move(file.tell() - state["start"])
            arrived = file.tell() - state["start"] - have
    return length < 0 or arrived == length


def _check_digest(path: Path, expected: str | None) -> None:
    if expected is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise DataError(f"{path}: has SHA-256 {found}, not {expected}; remove it to fetch it again")


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")
