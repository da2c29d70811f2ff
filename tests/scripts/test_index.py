"""`sleuth index`: what it says, what it reuses, what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from retriever_server.encoders.loading import load_encoder
from retriever_server.indexes.base import open_index
from retriever_server.indexes.generation import building
from tests.processes import sleuth
from tests.retriever_server.running import run_index
from tests.retriever_server.tiny_encoders import WORDS, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "1", "contents": "\\"Fox\\"\\nA red animal."}\n')
    return str(path)


def test_an_index_is_built_once_and_opens(tmp_path, corpus, capsys):
    out = str(tmp_path / "index")
    run_index(corpus, out)
    assert capsys.readouterr().out.startswith(f"indexed 1 passage in {out} (generation bm25-")
    run_index(corpus, out)
    assert capsys.readouterr().out.startswith(f"already there: 1 passage in {out}")
    [[hit]] = open_index(out).search(["animal"], 3)
    assert hit.passage.title == "Fox"


def test_settings_reach_the_index_and_overwrite_replaces(tmp_path, corpus):
    out = str(tmp_path / "index")
    run_index(corpus, out)
    with pytest.raises(ConfigError, match="--overwrite true"):
        run_index(corpus, out, k1=2.0)
    run_index(corpus, out, k1=2.0, b=0.1, analyzer="stopwords", title_boost=3, overwrite=True)
    settings = {"k1": 2.0, "b": 0.1, "analyzer": "stopwords", "title_boost": 3}
    assert settings.items() <= open_index(out).manifest.settings.items()


def test_a_missing_corpus_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        run_index(str(tmp_path / "none.jsonl"), str(tmp_path / "index"))


def test_ids_to_delete_stand_between_commas_or_in_a_file_of_text(tmp_path, capsys):
    write_jsonl(passages := tmp_path / "many.jsonl", [{"id": str(i), "text": "fox"} for i in range(9)])
    run_index(str(passages), out := str(tmp_path / "index"))
    run_index(out=out, delete="0, 1,0")
    assert "deleted 2; 7 passages" in capsys.readouterr().out
    (ids := tmp_path / "ids").write_bytes("\ufeff2\r\n\r\n3".encode())
    run_index(out=out, delete=str(ids))
    assert "deleted 2; 5 passages" in capsys.readouterr().out
    run_index(out=out, delete="4," * 3000)  # longer than a name of a file may be
    assert "deleted 1; 4 passages" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"has no passage 'x{80}'; nothing"):
        run_index(out=out, delete="x" * 300)
    with pytest.raises(DataError, match="null: is a pipe or device, expected a file"):
        run_index(out=out, delete="/dev/null")
    ids.write_bytes(b"\xe9\x00")
    with pytest.raises(DataError, match="ids: cannot be read"):
        run_index(out=out, delete=str(ids))


@pytest.mark.parametrize("alone", ["verify", "compact"])
@pytest.mark.parametrize("other", [{"k1": 2.0}, {"add": "more.jsonl"}, {"out": "elsewhere"}])
def test_what_would_change_nothing_is_refused(alone, other, tmp_path, corpus):
    run_index(corpus, out := str(tmp_path / "index"))
    with pytest.raises(ConfigError, match=f"--{next(iter(other))} .*only without --{alone}"):
        run_index(**{alone: out}, **other)


@pytest.mark.parametrize("device", ["gpu", "cuda:99" if not torch.cuda.is_available() else "tpu"])
def test_a_device_that_there_is_not_is_refused(device, tmp_path, corpus):
    with pytest.raises(ConfigError, match=f"device = .{device}.: must be "):
        run_index(corpus, str(tmp_path / "index"), encoder="model", device=device)


def test_a_masked_language_model_as_transformers_saves_it_makes_the_sparse_vectors_of_splade(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [{"id": word, "text": f"{word} {WORDS[0]}"} for word in WORDS[4:9]])
    served = tiny_model(tmp_path / "model", "sparse")  # lies below the plain one
    for name, model, options in (
        ("plain", str(tmp_path / "model"), {"kind": "inverted"}),
        ("served", served, {"query_prompt": "", "passage_prompt": ""}),
    ):
        run_index(str(tmp_path / "c.jsonl"), str(tmp_path / name), encoder=model, **options)
    plain, same = (open_index(tmp_path / name).search([WORDS[5]], 5)[0] for name in ("plain", "served"))
    assert [(hit.passage.id, hit.score) for hit in plain] == [(hit.passage.id, hit.score) for hit in same]
    with pytest.raises(ConfigError, match="makes dense vectors, an index of kind inverted needs sparse"):
        dense = tiny_model(tmp_path / "dense", "dense")
        run_index(str(tmp_path / "c.jsonl"), str(tmp_path / "no"), encoder=dense, kind="inverted")


def test_an_index_keeps_the_prefix_of_vectors_that_it_is_told(tmp_path):
    texts = [f"{word} {other}" for word in WORDS[:8] for other in WORDS[8:12]]
    write_jsonl(tmp_path / "c.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    model, out = tiny_model(tmp_path / "model", "dense"), str(tmp_path / "index")
    run_index(str(tmp_path / "c.jsonl"), out, encoder=model, dimension=8, dtype="float32")
    opened = open_index(out)
    whole = load_encoder(model)
    [query], passages = whole.encode(["big red fox"], "query"), whole.encode(texts, "passage")
    prefixes = passages[:, :8] / np.linalg.norm(passages[:, :8], axis=1, keepdims=True)
    scores = prefixes @ query[:8] / np.linalg.norm(query[:8])
    [hits] = opened.search(["big red fox"], len(texts))
    assert opened.manifest.dimension == opened.stored(0).shape[1] == 8
    assert [hit.score for hit in hits] == pytest.approx(np.sort(scores)[::-1].tolist(), abs=1e-5)
    assert [scores[int(hit.passage.id)] for hit in hits] == pytest.approx(np.sort(scores)[::-1].tolist())
    with pytest.raises(ConfigError, match="dimension = 33: must be from 1 to the 32 of"):
        run_index(str(tmp_path / "c.jsonl"), str(tmp_path / "j"), encoder=model, dimension=33)
    with pytest.raises(ConfigError, match="makes no dense vectors"):
        other = tiny_model(tmp_path / "sparse", "sparse")
        run_index(str(tmp_path / "c.jsonl"), str(tmp_path / "j"), encoder=other, dimension=8)
    with pytest.raises(ConfigError, match="--dimension 8: has a meaning only with --encoder"):
        run_index(str(tmp_path / "c.jsonl"), str(tmp_path / "j"), dimension=8)


def test_a_second_builder_at_the_same_place_is_one_line_and_status_2(tmp_path, corpus):
    with building(tmp_path / "index"):
        command = ("index", "--corpus", corpus, "--out", tmp_path / "index")
        done = sleuth(*command)
        assert done.wait(120) == 2
    [line] = done.stderr.read().splitlines()
    assert f"index: an index is being built there by process {os.getpid()} on " in line
    assert not (tmp_path / "index").exists()
    with building(tmp_path / "index", "2-of-2"):
        assert sleuth(*command).wait(120) == 2
    assert sleuth(*command).wait(120) == 0
