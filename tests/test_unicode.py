"""Half a surrogate pair, wherever text enters, becomes U+FFFD, and nothing else changes."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.corpus import Corpus
from data.jsonl import parse_line, read_json
from data.records import Passage
from data.text import replace_halves
from retriever_server.encoders.loading import load_encoder
from retriever_server.retrievers.rerank import CrossEncoder
from scripts import __main__ as sleuth
from tests.retriever_server.tiny_encoders import tiny_model

ANY_TEXT = st.text(st.characters(codec=None, categories=None))


@given(ANY_TEXT)
def test_what_comes_out_is_utf_8_and_whole_text_is_kept(text):
    replaced = replace_halves(text)
    assert replaced.encode().decode() == replaced
    if text.encode(errors="replace").decode() == text:
        assert replaced == text


@given(
    st.recursive(ANY_TEXT | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner))
)
def test_every_string_of_a_line_is_mended(value):
    line = json.dumps({"value": value}).encode()
    json.dumps(parse_line(line), ensure_ascii=False).encode()


def test_pairs_and_backslashes_that_only_look_like_halves_are_kept(tmp_path):
    content = rb'{"emoji": "\ud83d\ude00", "shown": "\\ud83d", "half": "a\ud83db", "low": "\ude00"}'
    expected = {"emoji": "😀", "shown": "\\ud83d", "half": "a\ufffdb", "low": "\ufffd"}
    assert parse_line(content) == expected
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") == expected


def test_a_corpus_with_half_a_pair_is_indexed_and_searched(tmp_path, capsys):
    row = r'{"id": "\ud83d1", "title": "Lo\udc00ire", "text": "The Loire is \ud83d the longest river."}'
    (tmp_path / "corpus.jsonl").write_text(row)
    assert Corpus(tmp_path / "corpus.jsonl")[0].id == "\ufffd1"
    options = ["--corpus", str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path / "index")]
    assert sleuth.main(["index", *options]) == 0
    capsys.readouterr()
    assert sleuth.main(["search", "river \udcff\ud83d", "--retriever", str(tmp_path / "index")]) == 0
    assert "Lo\ufffdire" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi"])
def test_one_text_with_half_a_pair_is_encoded_as_with_a_replacement_character(tmp_path, kind):
    encoder = load_encoder(tiny_model(tmp_path / kind, kind), device="cpu")
    for role in ("query", "passage"):
        halves, whole = (encoder.encode(["red fox", f"blue {c} sea"], role) for c in ("\ud83d", "\ufffd"))
        if kind == "sparse":
            assert (halves != whole).nnz == 0
        else:
            values = [each.values if kind == "multi" else each for each in (halves, whole)]
            np.testing.assert_array_equal(*values)


def test_a_reranker_reads_half_a_pair_as_a_replacement_character(tmp_path):
    scorer = CrossEncoder(tiny_model(tmp_path / "cross", "cross"), device="cpu")
    halves, whole = (scorer.score([(f"red {c}", Passage("1", f"fox {c}"))]) for c in ("\udc00", "\ufffd"))
    assert halves == whole


def test_a_file_name_that_is_not_utf_8_gives_ids_that_are(tmp_path):
    folder, out = tmp_path / "docs", tmp_path / "corpus.jsonl"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("Foxes are red.")
    assert sleuth.main(["corpus", str(folder), "--out", str(out)]) == 0
    assert Corpus(out)[0].id == r"caf\udce9.txt#0"
