"""The parts put together: template, style, scripts and data become one self-contained file.

Nothing in a question, passage or answer can become markup: tables are escaped, the data of the scripts
lie in a JSON block without a single "<", the scripts write text nodes only, and the page's own content
security policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from agent.evaluation.report import tables
from agent.evaluation.report.choice import Choice
from agent.evaluation.report.collect import browser_payload
from agent.evaluation.report.folders import read_folders
from data.atomic import atomic_write

logger = logging.getLogger(__name__)


def write_report(
    folder: Path | str,
    choice: Choice = Choice(),  # noqa: B008 (frozen)
    more: Sequence[Path | str] = (),
    out: Path | str | None = None,
    sections: str = "",
) -> Path:
    """Write FOLDER/report.html from what a run, an evaluation or a folder of them holds so far; its path.

    more: further folders, side by side with it. out: another file. sections: HTML before the results.

    Raises DataError where it is none of these or a file in it is malformed, ConfigError where what is chosen
    is not there, StorageError where the page cannot be written.
    """
    path = Path(out) if out else Path(folder) / "report.html"
    atomic_write(path, render_report(folder, choice, more, sections))
    return path


def render_report(
    folder: Path | str,
    choice: Choice = Choice(),  # noqa: B008 (frozen)
    more: Sequence[Path | str] = (),
    sections: str = "",
) -> str:
    """The page as HTML; the log says what of the folder it leaves out."""
    run = read_folders([folder, *more], choice.evaluations)
    payload = browser_payload(run, choice)
    if payload["chosen"]:
        logger.info("report: %s", payload["chosen"])
    script = "\n".join(_asset(name) for name in ("dom.js", "curves.js", "browser.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fields = {
        "title": escape(run.name),
        "digest": digest,
        "style": _asset("style.css"),
        "heading": tables.heading(run),
        "no_runs": "" if run.metrics else " hidden",
        "results": sections + tables.results(run),
        "matrix": tables.heat_map(run),
        "phases": tables.phases(run),
        "configuration": tables.configuration(run),
        "data": embed_json(payload),
        "script": script,
    }
    # One pass: a field's text is never read as a template.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], _asset("template.html"))


def embed_json(value: Any) -> str:
    r"""JSON that is safe inside a script element: < > & line separators and lone surrogates as \u escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _asset(name: str) -> str:
    return (files("agent.evaluation.report") / name).read_text(encoding="utf-8")
