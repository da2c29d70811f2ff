"""`sleuth index`: what it says, what it reuses, what it refuses."""

import pytest
import torch

from data.errors import ConfigError, DataError
from retriever_server.indexes.base import open_index
from scripts import index


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "1", "contents": "\\"Fox\\"\\nA red animal."}\n')
    return str(path)


def test_an_index_is_built_once_and_opens(tmp_path, corpus, capsys):
    out = str(tmp_path / "index")
    index.main(corpus, out)
    assert capsys.readouterr().out.startswith(f"indexed 1 passages in {out} (generation bm25-")
    index.main(corpus, out)
    assert capsys.readouterr().out.startswith(f"already there: 1 passages in {out}")
    [[hit]] = open_index(out).search(["animal"], 3)
    assert hit.passage.title == "Fox"


def test_settings_reach_the_index_and_overwrite_replaces(tmp_path, corpus):
    out = str(tmp_path / "index")
    index.main(corpus, out)
    with pytest.raises(ConfigError, match="--overwrite true"):
        index.main(corpus, out, k1=2.0)
    index.main(corpus, out, k1=2.0, b=0.1, analyzer="stopwords", title_boost=3, overwrite=True)
    settings = {"k1": 2.0, "b": 0.1, "analyzer": "stopwords", "title_boost": 3}
    assert settings.items() <= open_index(out).manifest.settings.items()


def test_a_missing_corpus_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        index.main(str(tmp_path / "none.jsonl"), str(tmp_path / "index"))


def test_the_bar_can_be_drawn_before_there_is_a_speed(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take it for a terminal
    assert list(index._Bar("reading passages")(["a", "b"], 2)) == ["a", "b"]
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:99" if not torch.cuda.is_available() else "tpu"])
def test_a_device_that_there_is_not_is_refused(device, tmp_path, corpus):
    with pytest.raises(ConfigError, match=f"device = {device}: must be auto, cpu"):
        index.main(corpus, str(tmp_path / "index"), encoder="model", device=device)
