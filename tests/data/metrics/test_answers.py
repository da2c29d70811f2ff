"""Answers judged by gold: against SQuAD's definition written out again, and case by case."""

import math
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import ConfigError
from data.metrics.answers import NORMALIZERS, cover_em, exact_match, f1, normalize_answer, normalize_unicode

PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
METRICS = [exact_match, f1, cover_em]
words = st.sampled_from(
    ["the", "A", "an", "art", "party", "Paris", "paris.", "U.S.", "café", "-", "10", "東京"]
)
texts = st.lists(words, max_size=6).map(" ".join) | st.text(max_size=12)


def squad_normal_form(text):
    """The definition step by step: lower, strip punctuation, strip articles, squeeze white space."""
    kept = [character for character in text.lower() if character not in PUNCTUATION]
    without_articles = re.split(r"\b(?:a|an|the)\b", "".join(kept))
    return " ".join(" ".join(without_articles).split())


def squad_f1(prediction, gold):
    ours, theirs = squad_normal_form(prediction).split(), squad_normal_form(gold).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


@given(texts)
def test_normal_form_is_squads(text):
    assert normalize_answer(text) == squad_normal_form(text)


@given(texts, st.lists(texts, max_size=3))
def test_em_and_f1_are_squads_best_over_gold(prediction, golds):
    golds = [gold for gold in golds if squad_normal_form(gold)]
    normal = squad_normal_form(prediction)
    if not normal:
        return
    assert exact_match(prediction, golds) == float(normal in map(squad_normal_form, golds))
    best = max((squad_f1(prediction, gold) for gold in golds), default=0.0)
    assert math.isclose(f1(prediction, golds), best)


@given(texts, texts, st.sampled_from(list(NORMALIZERS)))
def test_metrics_are_ordered_and_bounded(prediction, gold, normalizer):
    em, cover, overlap = (m(prediction, [gold], normalizer) for m in (exact_match, cover_em, f1))
    assert em <= cover <= 1 and em <= overlap <= 1
    assert not cover or overlap > 0


@given(texts, texts)
def test_cover_em_implies_search_r1s_substring(prediction, gold):
    if squad_normal_form(prediction) and squad_normal_form(gold) and cover_em(prediction, [gold]):
        assert squad_normal_form(gold) in squad_normal_form(prediction)


@given(texts, st.sampled_from(list(NORMALIZERS)))
def test_normal_form_is_its_own_normal_form(text, normalizer):
    normalize = NORMALIZERS[normalizer]
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("naïve-Café", "naïvecafé"),
        ("A", ""),
        ("«le chat»", "«le chat»"),
        ("a–b", "–b"),
    ],
)
def test_squad_cases_as_search_r1_has_them(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prediction", [None, "", " \n"])
@pytest.mark.parametrize("gold", ["", "The", "A", "!", "x"])
def test_empty_prediction_never_matches(metric, prediction, gold):
    assert metric(prediction, [gold]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold", "matches"),
    [("a", "A", True), ("The", "A", False), (".", "A", False), ("C", "C++", True), ("++", "+", False)],
)
def test_text_that_normalizes_to_nothing_stands_for_itself(prediction, gold, matches):
    assert exact_match(prediction, [gold]) == float(matches)


@pytest.mark.parametrize("metric", METRICS)
def test_one_gold_answer_may_stand_bare_and_none_match_nothing(metric):
    assert metric("the Paris", "Paris") == 1.0  # not judged letter by letter
    assert metric("Paris", []) == 0.0
    assert metric("Paris", iter(["Rome", "Paris"])) == 1.0


@pytest.mark.parametrize(
    ("prediction", "gold", "covered"),
    [
        ("It is in Paris, France.", "paris", True),
        ("the party", "art", False),
        ("New South York", "New York", False),
        ("in New York City", "the New York", True),
        ("York", "New York", False),
        ("It was 1988", "198", False),
    ],
)
def test_cover_em_wants_whole_words_side_by_side(prediction, gold, covered):
    assert cover_em(prediction, [gold]) == float(covered)


def test_f1_by_hand():
    assert f1("big red big dog", ["big big cat", "fish"]) == pytest.approx(2 * 2 / (4 + 3))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("「東京都」", "東 京 都"),
        ("東京 タワー 2012年", "東 京 タ ワ ー 2012 年"),
        ("ﾄｳｷｮｳ", "ト ウ キ ョ ウ"),
        ("Ｔｈｅ Ｃａｆé！", "café"),
        ("กรุงเทพ", "ก รุ ง เ ท พ"),
        ("ភ្នំ", "ភ្ នំ"),
        ("ວຽງ", "ວ ຽ ງ"),
        ("မြန်", "မြ န်"),
        ("서울 특별시", "서울 특별시"),
        ("¿Qué? «le chat»—1914–18…", "qué le chat191418"),
        ("Straße", "strasse"),
        ("co\u00adop\u200b", "coop"),
        ("cafe\u200d\u0301", "café"),
        ("दिल्ली।", "दिल्ली"),
        ("$5 €6", "5 €6"),
        ("İSTANBUL ISPARTA ısparta", "istanbul isparta isparta"),
    ],
)
def test_unicode_cases(text, normal):
    assert normalize_unicode(text) == normal


@pytest.mark.parametrize(
    ("text", "normal"),
    [("Čáslav Ångström", "caslav angstrom"), ("Ёлка ή", "елка η"), ("が", "が"), ("กำ", "กํ า"), ("ø", "ø")],
)
def test_folding_drops_accents_and_leaves_other_scripts(text, normal):
    assert normalize_unicode(text, fold_accents=True) == normal


def test_normalizer_is_chosen_by_name():
    assert exact_match("東京", ["東 京。"], "unicode") == 1.0
    assert exact_match("東京", ["東 京。"]) == 0.0
    assert cover_em("首都は東京都です", ["東京"], "unicode") == 1.0
    assert f1("東京都", ["東京"], "unicode") == pytest.approx(0.8)
    assert [exact_match("Malaga", ["Málaga"], name) for name in NORMALIZERS] == [0.0, 0.0, 1.0, 0.0]
    with pytest.raises(ConfigError, match="'nfc': must be one of squad, unicode, unicode_folded"):
        f1("x", ["x"], "nfc")
