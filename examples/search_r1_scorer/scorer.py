"""The published scorers of Search-R1, bug by bug, to compare with results that they were trained on.

Never train on them for their own sake. They read the text of the whole trajectory, so that
- a prompt that names <answer> twice answers for the policy (theirs: "Beijing");
- what the policy is told after an invalid action answers for it ("and");
- an answer inside a passage is the policy's (our agent defuses such tags; theirs does not);
- a prompt that names <answer> less than once makes the only answer count as none;
- with format, gibberish is paid as a wrong answer;
- a gold answer such as "A" normalises to nothing and equals an empty answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from agent.trajectory import Trajectory
from data.metrics.answers import normalize_answer

_INSIDE = r"(?:(?!</?(?:think|search|information|answer)>).)*"
_THINK, _SEARCH, _INFORMATION, _ANSWER = (
    rf"<{tag}>{_INSIDE}</{tag}>\s*" for tag in ("think", "search", "information", "answer")
)
_VALID = re.compile(rf"\s*{_THINK}(?:{_SEARCH}{_INFORMATION}{_THINK})*{_ANSWER}", re.DOTALL)
_ASSISTANT = "<|im_start|>assistant"


def search_r1_em(text: str, gold_answers: Sequence[str]) -> float:
    """1.0 if the last of two or more <answer>s anywhere in `text` is a gold answer, else 0.0.

    Equals compute_score_em of Search-R1's qa_em.py.
    """
    return float(_matches(_last_answer(text), gold_answers))


def search_r1_em_format(
    text: str,
    gold_answers: Sequence[str],
    structure_score: float = 0.2,
    final_score: float = 0.1,
    retrieval_score: float = 0.0,
) -> float:
    """1.0 for a right and well-formed answer, 1 - structure_score for one that is only right, ...

    Otherwise structure_score for form (and retrieval_score if an <information> holds a gold answer), or
    final_score for any answer. Equals compute_score_em of Search-R1's qa_em_format.py (Jin et al. 2025,
    arXiv 2505.15117); the defaults are those of its v0.3 scripts.
    """
    answer, valid = _last_answer(text), _is_valid(text)
    if _matches(answer, gold_answers):
        return 1.0 if valid else 1.0 - structure_score
    if valid:
        return structure_score + (retrieval_score if _retrieved(text, gold_answers) else 0.0)
    return 0.0 if answer is None else final_score


def search_r1_legacy(trajectory: Trajectory) -> float:
    """`search_r1_em` of all that the trajectory says, prompt and passages included."""
    return search_r1_em(_whole_text(trajectory), trajectory.question.gold_answers)


def search_r1_legacy_format(trajectory: Trajectory) -> float:
    """`search_r1_em_format` of all that the trajectory says; needs a ChatML template to see any form."""
    return search_r1_em_format(_whole_text(trajectory), trajectory.question.gold_answers)


def _whole_text(trajectory: Trajectory) -> str:
    return "".join(segment.text for segment in trajectory.segments)


def _last_answer(text: str) -> str | None:
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return answers[-1].strip() if len(answers) > 1 else None  # the first is taken for the prompt's


def _matches(answer: str | None, gold_answers: Sequence[str]) -> bool:
    return answer is not None and normalize_answer(answer) in map(normalize_answer, gold_answers)


def _is_valid(text: str) -> bool:
    _, found, response = text.partition(_ASSISTANT)
    return bool(found) and _VALID.fullmatch(response) is not None


def _retrieved(text: str, gold_answers: Sequence[str]) -> bool:
    blocks = re.findall(r"<information>(.*?)</information>", text, re.DOTALL)
    golds = [normalize_answer(gold) for gold in gold_answers]
    return any(gold in normalize_answer(block) for block in blocks for gold in golds)
