"""Text cut before it is tokenised begins with the same tokens, and no more of it is read than that takes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from data.text import counted, cut, cut_for
from tests.fakes import byte_tokenizer


def test_a_noun_stands_in_the_plural_where_there_is_not_one():
    assert [counted(n, "query") for n in (0, 1, 2)] == ["0 queries", "1 query", "2 queries"]
    assert counted(1, "step") == "1 step" and counted(1200, "step") == "1,200 steps"
    assert counted(2, "search") == "2 searches"


PIECES = ["a", " ", "\n", "word ", "x" * 200, "é", "e\u0301", "\u0301", "国", "\u200b", "<b>", "word", "𝄞"]
BYTES = byte_tokenizer()
lumpy = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from([1, 3, 40, 1000])), max_size=5)


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory) -> BertTokenizerFast:
    path: Path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "word", "##a", "e", "国", "<", ">"])
    )
    return BertTokenizerFast(vocab=str(path))


@given(lumpy, st.integers(1, 60))
def test_the_first_tokens_are_those_of_the_whole_text(word_pieces, lumps, tokens):
    text = "".join(piece * times for piece, times in lumps)
    for tokenizer in (BYTES, word_pieces):
        begun = cut_for(tokenizer, text, tokens)
        first, whole = (
            tokenizer(part, add_special_tokens=False)["input_ids"][:tokens] for part in (begun, text)
        )
        assert text.startswith(begun) and first == whole


def test_of_megabytes_little_is_read():
    read = []

    def count(part: str) -> int:
        read.append(len(part))
        return len(part) // 4

    assert len(cut("word " * 1_000_000, 160, count)) == 5120 and read == [5120]
    assert cut("short", 160, count) == "short" and len(read) == 1


def test_a_text_that_is_cut_from_the_left_or_not_at_all_stays_whole(word_pieces):
    text = "a " * 5000
    assert cut_for(word_pieces, text, None) == text
    assert len(cut_for(word_pieces, text, 9)) < len(text) / 2
    word_pieces.truncation_side = "left"
    assert cut_for(word_pieces, text, 9) == text
    word_pieces.truncation_side = "right"
