"""Tiny random bases: each kind of model runs, the same arguments give the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.errors import ConfigError
from data.jsonl import write_jsonl
from retriever_server.training.builders import tiny
from retriever_server.training.builders.dense import decoder, dense
from retriever_server.training.builders.tiny import tiny_base

BUILDERS = {"mistral": decoder, "qwen3": decoder, "qwen2": decoder, "gemma2": decoder, "llama": decoder}
BUILDERS |= {"bert": dense, "modernbert": dense, "roberta": dense}


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    write_jsonl(tmp_path / "c.jsonl", [{"id": str(i), "text": f"river number {i}"} for i in range(9)])
    return str(tmp_path / "c.jsonl")


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_base_of_every_kind_runs_with_two_heads(kind: str, corpus: str, tmp_path: Path) -> None:
    model = BUILDERS[kind](tiny_base({"model_type": kind}, corpus, 300, folder=tmp_path / "base"))
    assert model.encode(["river", "a river of many more words"]).shape == (2, 64)
    config = model.transformers_model.config
    assert config.num_attention_heads == 2 and getattr(config, "num_key_value_heads", 2) == 2


def test_key_value_heads_that_are_given_are_kept(corpus: str, tmp_path: Path) -> None:
    config = {"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 1}
    model = decoder(tiny_base(config, corpus, 300, folder=tmp_path / "base"))
    assert model.transformers_model.config.num_key_value_heads == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "qwen3", "num_key_value_heads": 3}, r"no qwen3 runs with this \("),
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}, r"no bert runs with this \("),
        pytest.param({"model_type": "t5"}, r"no t5 runs with this \(", marks=pytest.mark.slow),
        ({"model_type": "bort"}, "model_type 'bort': must be bert, llama"),
    ],
)
def test_a_configuration_that_does_not_run_is_one_line(
    config: dict[str, Any], says: str, corpus: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        tiny_base(config, corpus, 300, folder=tmp_path / "base")
    assert "\n" not in str(raised.value) and not (tmp_path / "base").exists()
    with pytest.raises(ConfigError, match="corpus: missing"):
        tiny_base(config)


def test_every_argument_decides_what_is_made(corpus: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny, "CACHE", tmp_path / "cache")
    config = {"model_type": "bert", "num_hidden_layers": 1}
    first = tiny_base(config, corpus, 300, 0)
    assert tiny_base(config, corpus, 300, 0) == first
    again = tiny_base(config, corpus, 300, 0, folder=tmp_path / "again")
    of = {name: load_file(f"{folder}/model.safetensors") for name, folder in (("a", first), ("b", again))}
    assert all(torch.equal(of["a"][name], of["b"][name]) for name in of["a"])
    write_jsonl(tmp_path / "d.jsonl", [{"id": "1", "text": "rivers"}])
    others = [
        tiny_base({**config, "num_hidden_layers": 2}, corpus, 300, 0),
        tiny_base(config, str(tmp_path / "d.jsonl"), 300, 0),
        tiny_base(config, corpus, 40, 0),
        tiny_base(config, corpus, 300, 1),
    ]
    assert len({first, *others}) == 5
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(load_file(f"{others[3]}/model.safetensors")[weight], of["a"][weight])
