"""The questions of a run: every one once an epoch, or kinds by the weights that they are given."""

from collections import Counter
from typing import Any

import pytest

from data.records import Question
from rl.config import RolloutConfig, TrainConfig
from rl.question_mix import QuestionMix, draw_question
from scripts import __main__ as sleuth

KINDS = {"easy": 60, "hard": 30, "never": 10}
QUESTIONS = [
    Question(f"{kind}-{n}", f"{kind} {n}?", ("a",), {"kind": kind})
    for kind, count in KINDS.items()
    for n in range(count)
]


def mix(seed=0, steps=100, **weights: Any) -> QuestionMix:
    rollout = RolloutConfig(questions_per_step=10, **weights)
    return QuestionMix(QUESTIONS, TrainConfig("p", "q", "r", "o", rollout=rollout, steps=steps, seed=seed))


def shares(drawn: list[Question]) -> dict[str, float]:
    return {kind: count / len(drawn) for kind, count in Counter(q.metadata["kind"] for q in drawn).items()}


def test_every_question_comes_once_an_epoch():
    asked: list[Any] = [draw_question(range(6), number, seed=1) for number in range(12)]  # type: ignore[arg-type]
    assert sorted(asked[:6]) == sorted(asked[6:]) == list(range(6)) and asked[:6] != asked[6:]
    assert asked[:6] != [draw_question(range(6), number, seed=2) for number in range(6)]  # type: ignore[arg-type]


def test_without_weights_kinds_come_as_often_as_there_are_questions_of_them():
    drawn = [mix().draw(number) for number in range(100)]
    assert sorted(q.id for q in drawn) == sorted(q.id for q in QUESTIONS)


def test_weights_are_the_shares_of_the_kinds_and_what_has_none_is_left_out():
    weighted = mix(kind_weights={"easy": 1.0, "hard": 3.0})
    drawn = [weighted.draw(number) for number in range(2000)]
    assert shares(drawn) == pytest.approx({"easy": 0.25, "hard": 0.75}, abs=0.03)
    hard = [q.id for q in drawn[:40] if q.metadata["kind"] == "hard"]
    assert len(set(hard)) > len(hard) * 0.8 and len({q.id for q in drawn}) == 90


def test_weights_turn_into_the_last_ones_by_the_last_step():
    weighted = mix(kind_weights={"easy": 1.0}, last_kind_weights={"hard": 1.0, "never": 1.0}, steps=200)
    parts = [[weighted.draw(n) for n in range(at, at + 100)] for at in (0, 950, 1900, 5000)]
    assert shares(parts[0])["easy"] > 0.85 and 0.35 < shares(parts[1])["easy"] < 0.65
    assert shares(parts[2]).get("easy", 0) < 0.15 and shares(parts[3]).keys() == {"hard", "never"}


def test_a_draw_depends_on_its_number_and_the_seed_alone():
    weights = {"easy": 1.0, "hard": 1.0}
    forwards = [mix(kind_weights=weights).draw(number).id for number in range(50)]
    assert [mix(kind_weights=weights).draw(number).id for number in reversed(range(50))][::-1] == forwards
    assert [mix(seed=1, kind_weights=weights).draw(number).id for number in range(50)] != forwards


@pytest.mark.parametrize(
    ("row", "there"), [('"metadata": {"kind": "two_hop"}', "two_hop"), ('"metadata": {}', "nowhere given")]
)
def test_a_weight_of_a_kind_that_no_question_has_is_refused_before_anything_is_loaded(
    tmp_path, capsys, row, there
):
    (tmp_path / "q.jsonl").write_text(f'{{"id": "1", "question": "Who?", "golden_answers": ["I"], {row}}}\n')
    argv = ["--policy", "atlas", "--retriever", "http://127.0.0.1:9", "--out", str(tmp_path / "out")]
    argv += ["--questions", str(tmp_path / "q.jsonl"), "--rollout.kind_weights", "{two_hops: 1}"]
    assert sleuth.main(["train", *argv]) == 2
    said = "rollout.kind_weights = {'two_hops': 1.0}: no question is of kind two_hops; their metadata.kind is"
    assert f"{said} {there}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
