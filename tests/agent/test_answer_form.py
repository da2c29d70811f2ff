"""Answers with a confidence, citations, or none: asked for, read, written, and "I don't know"."""

from dataclasses import replace

import pytest

from agent.answer_form import read_answer
from agent.protocol import HERMES, SEARCH_R1, Answer
from data.errors import ConfigError
from data.metrics.answers import is_abstention
from rl.config import ProtocolConfig
from scripts.wiring import make_protocol


@pytest.mark.parametrize(
    ("inside", "answer", "confidence"),
    [
        (" Rome\nConfidence: 80% ", "Rome", 0.8),
        ("Rome\n**Confidence:** 7.5", "Rome", 0.075),
        ("Rome. Confidence: 900%", "Rome.", 1.0),
        ("Explanation: as [12] says.\nExact Answer: Rome\nConfidence: 95%", "Rome", 0.95),
        ("**Exact Answer:** The Eternal City\n", "The Eternal City", None),
        ("Confidence", "Confidence", None),
        ("Confidence: 50%\nExact Answer: Rome", "Rome", 0.5),
        ("Rome", "Rome", None),
    ],
)
def test_the_exact_answer_and_the_confidence_are_read(inside, answer, confidence):
    assert read_answer(inside) == (answer, confidence)


@pytest.mark.parametrize("protocol", [SEARCH_R1, HERMES])
def test_the_prompt_asks_for_what_is_read(protocol):
    asked = replace(protocol, answer_form="confidence", may_abstain=True)
    said = asked.prompt("Who")
    assert "Confidence: a number" in said and "I don't know" in said
    assert protocol.prompt("Who") == said.replace(
        said[said.index("After the answer, ") : said.index("guess. ") + 7], ""
    )
    turn = asked.render_turn("so", Answer("Rome", 0.8))
    assert asked.parse(turn) == Answer("Rome", 0.8) and asked.is_well_formed(turn)
    assert protocol.parse(turn) == Answer("Rome\nConfidence: 80%")  # who does not ask takes it as it is


def test_a_policy_folder_keeps_what_it_was_trained_to_answer(tmp_path):
    from data.jsonl import write_json

    asked = replace(SEARCH_R1, answer_form="cited", may_abstain=True)
    write_json(tmp_path / "sleuth.json", asked.record)
    assert make_protocol(ProtocolConfig(), str(tmp_path)) == asked
    assert make_protocol(ProtocolConfig(answer_form="short", may_abstain=False), str(tmp_path)) == SEARCH_R1
    with pytest.raises(ConfigError, match="answer_form = 'long'"):
        replace(SEARCH_R1, answer_form="long")


@pytest.mark.parametrize(
    ("answer", "abstains"),
    [
        ("I don't know", True), ("I don\u2019t know.", True), ("I do not know the answer", True),
        ("Unknown", True), ("Not enough information", True), ("Insufficient evidence to tell", True),
        ("N/A", True), ("n/a", True), ("N. A.", True), ("Na", False), ("NA", False),
        ("Unknown Pleasures", False), ("Nadal", False), ("None", False), (None, False), ("", False),
        ("The Know", False), ("I know it: Rome", False),
    ],
)  # fmt: skip
def test_abstentions_are_told_from_answers(answer, abstains):
    assert is_abstention(answer) is abstains
