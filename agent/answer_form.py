"""Parts of an answer besides the answer: a confidence, citations, leave to say none."""

from __future__ import annotations

import re
from typing import Literal

ABSTENTION = "I don't know"
AnswerForm = Literal["short", "confidence", "cited"]
ASKED: dict[str, str] = {
    "short": "",
    "confidence": (
        "After the answer, inside <{tag}>, write on a line of its own how sure you are: "
        "Confidence: a number from 0 to 100%. "
    ),
    "cited": (
        "Inside <{tag}> write three lines. Explanation: why it is so, with the ids of the passages that show "
        "it in square brackets, such as [20]. Exact Answer: the short answer alone. Confidence: how sure you "
        "are, from 0 to 100%. "
    ),
}
"""By form; "cited" is that of BrowseComp-Plus (Chen et al. 2025)."""
MAY_ABSTAIN = f"If you cannot find out, write <{{tag}}> {ABSTENTION} </{{tag}}> instead of a guess. "

_CONFIDENCE = re.compile(r"\**confidence\**\W*?(\d+(?:\.\d+)?)\s*%?", re.IGNORECASE)
_EXACT = re.compile(r"\**exact answer\**:\**(.*?)(?=\n|$)", re.IGNORECASE)


def read_answer(inside: str) -> tuple[str, float | None]:
    """The exact answer and the confidence in [0, 1] of what stands inside the tags; None where none is said.

    "Rome\\nConfidence: 80%" -> ("Rome", .8);   "Explanation: [1].\\nExact Answer: Rome" -> ("Rome", None)
    """
    stated = list(_CONFIDENCE.finditer(inside))
    exact = _EXACT.search(inside)
    text = exact[1] if exact else inside[: stated[-1].start()] if stated else inside
    confidence = min(float(stated[-1][1]), 100.0) / 100 if stated else None
    return text.strip(), confidence


def write_answer(text: str, confidence: float | None) -> str:
    """Its inverse, for demonstrations."""
    return text if confidence is None else f"{text}\nConfidence: {100 * confidence:.0f}%"
