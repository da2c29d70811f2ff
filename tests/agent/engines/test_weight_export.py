"""A policy whose heads vLLM cannot serve is handed over as a Llama that computes the same."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from agent.engines.weight_export import export_for_vllm
from agent.policy import Policy
from data.errors import ConfigError
from tests.fakes import byte_tokenizer, tiny_model

IDS = torch.arange(120).reshape(2, 60) % 97
TOKENIZER = byte_tokenizer()


def logprobs(model):
    with torch.no_grad():
        return model(IDS).logits.log_softmax(-1)


def policy(kind="qwen2", **changes):
    model = tiny_model(kind, len(TOKENIZER), **changes)
    with torch.no_grad():  # a fresh Qwen2's biases are zeros
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return Policy(model, TOKENIZER)


@pytest.mark.parametrize(
    ("given", "served"),
    [
        (policy(head_dim=12), 32),
        (policy(hidden_size=192), 64),  # heads of 48
        (policy("llama"), 32),
        (policy("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True), 32),
        (policy("llama", head_dim=72, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), 80),
    ],
    ids=["qwen2-12", "qwen2-48", "llama-8", "llama-biased", "llama-72"],
)
def test_an_exported_policy_has_the_log_probs_of_the_policy(given, served, tmp_path):
    export = export_for_vllm(given, cpu=True)
    assert export.served == served
    export.save_policy(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    twin, info = loaded
    assert not any(info.values()) and twin.config.head_dim == served
    torch.testing.assert_close(logprobs(twin), logprobs(given.model), atol=1e-5, rtol=0)
    with torch.no_grad():  # and after a step
        changed = {name: 1.1 * tensor for name, tensor in given.model.state_dict().items()}
    export.save(tmp_path / "step", changed)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "step")
    given.model.load_state_dict(changed)
    torch.testing.assert_close(logprobs(after), logprobs(given.model), atol=1e-5, rtol=0)
    assert (logprobs(after) - logprobs(twin)).abs().max() > 0.1


def test_only_what_vllm_cannot_serve_is_changed():
    assert export_for_vllm(policy(), cpu=False).served is None  # heads of 8: a GPU's attention is asked first
    assert export_for_vllm(policy(hidden_size=128), cpu=True).served is None
    assert export_for_vllm(policy("llama", head_dim=12), cpu=False).served is None
    # 16 wide, normalised by head: vLLM refuses it itself
    assert export_for_vllm(policy("qwen3"), cpu=True).served is None
    assert export_for_vllm(policy(head_dim=12), cpu=False).served == 32


def test_what_would_be_loaded_wrongly_and_cannot_be_exported_is_refused():
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    for given in (policy(head_dim=12, rope_parameters=scaled), policy(head_dim=12, **windows)):
        with pytest.raises(ConfigError, match=r"heads = 8 wide, this policy's are 12, with a window or"):
            export_for_vllm(given, cpu=True)
