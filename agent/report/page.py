"""The parts put together: template, style, scripts and data become one self-contained file.

Nothing in a question, passage or answer can become markup: tables are escaped, the data of the scripts
lie in a JSON block without a single "<", the scripts write text nodes only, and the page's own content
security policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from agent.report import tables
from agent.report.collect import browser_payload, read_run_folder
from data.jsonl import atomic_write

LIMIT_BYTES = 5_500_000
"""Of the data; the rest of the page is about 30 kB."""


def write_report(run_path: Path | str) -> Path:
    """Write RUN/report.html from what the folder holds so far; returns its path.

    Raises DataError where the folder is no run or a file in it is malformed, StorageError where the
    page cannot be written.
    """
    path = Path(run_path) / "report.html"
    atomic_write(path, render_report(run_path))
    return path


def render_report(run_path: Path | str, limit_bytes: int = LIMIT_BYTES) -> str:
    """The page of a run folder as HTML."""
    run = read_run_folder(run_path)
    script = "\n".join(_asset(name) for name in ("dom.js", "curves.js", "browser.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fields = {
        "title": escape(run.name),
        "digest": digest,
        "style": _asset("style.css"),
        "heading": tables.heading(run),
        "results": tables.results(run),
        "phases": tables.phases(run),
        "configuration": tables.configuration(run),
        "data": embed_json(browser_payload(run, limit_bytes)),
        "script": script,
    }
    # One pass: a field's text is never read as a template.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], _asset("template.html"))


def embed_json(value: Any) -> str:
    r"""JSON that is safe inside a script element: < > & line separators and lone surrogates as \u escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _asset(name: str) -> str:
    return (files("agent.report") / name).read_text(encoding="utf-8")
