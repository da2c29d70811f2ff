"""Slerp of tensors and of checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.errors import ConfigError, DataError
from retriever_server.encoders.read_spec import read_spec
from retriever_server.training.builders.dense import decoder
from retriever_server.training.export import save_encoder
from retriever_server.training.merge import merge, slerp
from scripts.__main__ import main
from tests.retriever_server.training.decoder_models import tiny_decoder


def naive(a, b, t):
    a, b = a.double().numpy().ravel(), b.double().numpy().ravel()
    angle = math.acos(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def test_slerp_is_the_formula_and_goes_along_the_circle():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    for t in (0.1, 0.5, 0.9):
        assert slerp(a, b, t).shape == a.shape
        np.testing.assert_allclose(slerp(a, b, t).numpy().ravel(), naive(a, b, t), atol=1e-6)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-6)
    of = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert of.tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert torch.allclose(slerp(a, b, 0.3), slerp(b, a, 0.7), atol=1e-6)
    zero = torch.zeros(4)
    assert torch.equal(slerp(zero, zero, 0.5), zero)
    assert slerp(a.bfloat16(), b.bfloat16(), 0.5).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        base = folder / f"base{seed}"
        tiny_decoder(base, "llama", seed=seed)
        decoder(str(base), max_tokens=32).save(str(folder / str(seed)))
    return folder


def test_merged_checkpoints_are_a_model(checkpoints, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    models = [str(checkpoints / str(i)) for i in range(3)]
    out = tmp_path / "merged"
    assert main(["merge", "--models", json.dumps(models), "--weights", "[2, 1, 1]", "--out", str(out)]) == 0
    assert "merged 3 models" in capsys.readouterr().out
    a, b, c = (load_file(f"{model}/model.safetensors") for model in models)
    merged = load_file(out / "model.safetensors")
    assert set(merged) == set(a)
    for name in a:
        expected = slerp(slerp(a[name], b[name], 1 / 3), c[name], 1 / 4)
        assert torch.equal(merged[name], expected)
    assert json.loads((out / "merged.json").read_text())["weights"] == [2.0, 1.0, 1.0]
    model = SentenceTransformer(str(out), device="cpu")
    assert model.max_seq_length == 32 and np.linalg.norm(model.encode("a text")) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_merged_is_refused(checkpoints, tmp_path):
    one, two = (str(checkpoints / str(i)) for i in range(2))
    with pytest.raises(ConfigError, match="1 models, weights = None: must be two or more"):
        merge([one], str(tmp_path / "a"))
    for weights in ([1.0], [0.0, 1.0], [math.nan, 1.0], [math.inf, 1.0]):
        with pytest.raises(
            ConfigError, match=r"weights = \[.*: must be two or more, each with a weight above 0"
        ):
            merge([one, two], str(tmp_path / "a"), weights)
    with pytest.raises(ConfigError, match=r"config\.json': must be a folder, not a file"):
        merge([one, two], f"{one}/config.json")
    with pytest.raises(ConfigError, match="is there, and not empty"):
        merge([one, two], one)
    with pytest.raises(ConfigError, match="no such folder"):
        merge([one, "absent"], str(tmp_path / "a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \*.safetensors"):
        merge([str(tmp_path / "empty"), two], str(tmp_path / "a"))
    base = tmp_path / "base"
    decoder(tiny_decoder(base, "llama", num_hidden_layers=1), max_tokens=32).save(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="has weights of other names or shapes than"):
        merge([one, str(tmp_path / "other")], str(tmp_path / "a"))
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        merge([one, str(tmp_path / "other")], str(tmp_path / "a"))


def test_models_of_other_prompts_pooling_or_specs_are_not_merged(checkpoints, tmp_path):
    one = str(checkpoints / "0")
    for options, says in (
        ({"query_prompt": "q: "}, r"has another config_sentence_transformers.json than .*: not the same"),
        ({"pooling": "mean"}, r"has another (1_Pooling/config|tokenizer).json than"),
    ):
        other = tmp_path / next(iter(options))
        decoder(str(checkpoints / "base1"), max_tokens=32, **options).save(str(other))
        with pytest.raises(ConfigError, match=says):
            merge([one, str(other)], str(tmp_path / "a"))
    specs = [tmp_path / name for name in ("plain", "titled")]
    for folder, template in zip(specs, ("{text}", "{title}\n{text}"), strict=True):
        model = decoder(str(checkpoints / "base0"), max_tokens=32)
        save_encoder(model, read_spec("model", model, template), folder)
    with pytest.raises(ConfigError, match=r"trained under another spec than .*passage_template"):
        merge([*map(str, specs)], str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"only one of them has encoding_spec.json"):
        merge([one, str(specs[0])], str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
