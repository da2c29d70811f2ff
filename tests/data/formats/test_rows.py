"""Values of every type that JSON, parquet, numpy and CSV hold them in, in one form."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from data.formats.rows import answers_of, id_of, ids_of, list_of, number_of, object_of, text_of

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "id_"),
    [
        (0, "0"), ("0", "0"), (7.0, "7"), (2**70, str(2**70)), (np.int64(0), "0"), (np.float32(3.0), "3"),
        (np.str_("x"), "x"), (pa.scalar(0), "0"), (pa.scalar("a"), "a"), (Decimal("12"), "12"),
        ("Grey heron", "Grey heron"), (" a\tb\n", " a\tb\n"), ("鷺", "鷺"), ("007", "007"), ("1.0", "1.0"),
        (None, ""), ("", ""), (" \t", ""),
    ],
)  # fmt: skip
def test_an_id_is_the_text_of_what_stands_there_and_0_is_one(value, id_):
    assert id_of(value) == id_


@pytest.mark.parametrize(
    "value",
    [False, True, np.bool_(False), 1.5, NAN, INFINITY, -INFINITY, np.float64("nan"), Decimal("NaN"),
     [], ["a"], {}, {"id": 1}, b"a", Fraction(1, 2)],
)  # fmt: skip
def test_what_is_no_id_is_refused(value):
    with pytest.raises(ValueError, match=r'"id" (must be a string, found|holds -?(nan|inf|NaN), which)'):
        id_of(value)


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        ("13", ("13",)), (13, ("13",)), ([1, "b", 2.0], ("1", "b", "2")), (np.array([0, 1]), ("0", "1")),
        ('["1", "2"]', ("1", "2")), ("[1, 2]", ("1", "2")), (pa.array(["a"]), ("a",)), (None, ()), ([], ()),
    ],
)  # fmt: skip
def test_a_list_of_ids_may_be_one_and_is_never_its_letters(value, ids):
    assert ids_of(value, "positives") == ids


@pytest.mark.parametrize("value", [[None], [""], [False], [["a"]], [{"id": "a"}], [NAN], "[NaN]"])
def test_a_list_with_what_is_no_id_is_refused(value):
    with pytest.raises(ValueError, match='"positives"'):
        ids_of(value, "positives")


@pytest.mark.parametrize(
    ("value", "golds"),
    [
        ("Rome", ("Rome",)), (["Rome", " Rome", "", "Roma"], ("Rome", "Roma")), (("a", "b"), ("a", "b")),
        ('["Lyon", "Lugdunum"]', ("Lyon", "Lugdunum")), ("['red', \"crims'on\"]", ("red", "crims'on")),
        (['["Lyon", "Lugdunum"]'], ("Lyon", "Lugdunum")), ("[1912, 1913.0]", ("1912", "1913")),
        ('["\\ud83d\\ude00"]', ("😀",)), (" [\"a\"] ", ("a",)),
        (1912.0, ("1912",)), ([1912.0, 2.5], ("1912", "2.5")), ("1912.0", ("1912.0",)),
        (["1912.0"], ("1912.0",)),
        (0, ("0",)), (1e22, ("1" + 22 * "0",)), (12345678901234567890, ("12345678901234567890",)),
        (Decimal("1912"), ("1912",)), (Decimal("2.50"), ("2.5",)),
        (np.array(["a", "b"], dtype=object), ("a", "b")), (np.array([1912.0]), ("1912",)),
        (np.float32(3), ("3",)), (pa.array(["a"]), ("a",)), (pa.scalar(3.0), ("3",)),
        ({"target": ["Rome"]}, ("Rome",)), ({"text": ["Rome"], "answer_start": [0]}, ("Rome",)),
        ({"target": np.array(["Rome"], dtype=object)}, ("Rome",)), ('{"target": ["Rome"]}', ("Rome",)),
        ({"target": '["Rome"]'}, ("Rome",)), ('{"a": 1}', ('{"a": 1}',)),
        (None, ()), ("", ()), ([], ()), ("[]", ()), ({}, ()), ({"target": None}, ()), ([" ", ""], ()),
        ("[Rome]", ("[Rome]",)), ("[1] and [2]", ("[1] and [2]",)), (["[0, 1]"], ("[0, 1]",)),
        ("[[1], [2]]", ("[[1], [2]]",)), ("['a' 'b']", ("['a' 'b']",)), ("[" * 5000, ("[" * 5000,)),
        ("NaN", ("NaN",)), ("nan", ("nan",)),
    ],
)  # fmt: skip
def test_gold_answers_are_whole_texts(value, golds):
    assert answers_of(value) == golds


@pytest.mark.parametrize(
    "value",
    [NAN, [NAN], [INFINITY], np.array([np.nan]), "[NaN]", "[Infinity]", {"target": NAN}, Decimal("Infinity"),
     [None], ["a", None], True, [False], [["a"]], [{"text": "a"}], pa.scalar(NAN)],
)  # fmt: skip
def test_what_is_no_gold_answer_is_refused(value):
    with pytest.raises(ValueError, match=r"which is no value|must be a string, found"):
        answers_of(value)


def test_lists_texts_numbers_and_objects():
    assert list_of("text", "x") == ["text"] and list_of(0, "x") == [0] and list_of(("a",), "x") == ["a"]
    assert text_of(None, "x") == "" and text_of(np.str_("a"), "x") == "a"
    assert number_of("1.5", "x") == 1.5 and number_of(np.float32(2), "x") == 2.0
    assert object_of({"a": np.array([1])}, "x") == {"a": [1]} and object_of(None, "x") == {}
    assert object_of('{"kind": "x"}', "x") == {"kind": "x"}


@pytest.mark.parametrize(
    ("read", "value"),
    [(text_of, 7), (text_of, NAN), (text_of, ["a"]), (text_of, False), (number_of, "nan"), (number_of, NAN),
     (number_of, None), (number_of, "high"), (number_of, 10**400), (object_of, "m"), (object_of, [1]),
     (object_of, {"a": [{"b": NAN}]})],
)  # fmt: skip
def test_wrong_texts_numbers_and_objects_are_named(read, value):
    with pytest.raises(ValueError, match=r'^"field" '):
        read(value, "field")
