"""Adapters: what is exported is what was trained, the reference is where training began."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.modeling_layers import GradientCheckpointingLayer

from data.errors import ConfigError, DataError
from data.settings import LoraConfig
from rl.learner.lora import (
    adapter_state,
    add_lora,
    load_adapter_state,
    merged_copy,
    merged_state,
    training_dropout,
    without_adapters,
)
from tests.fakes import tiny_model

CONFIG = LoraConfig(rank=4, alpha=8.0)
KINDS = ["qwen2", "qwen3", "llama", "gemma3"]  # biases, and embeddings tied to the head, among them
TOKENS = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(1))


def adapted(kind="qwen2", dtype=torch.float32, config=CONFIG, scale=0.3):
    """A model whose adapters say something: B is zero at first."""
    model = tiny_model(kind, 64).to(dtype)
    add_lora(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in adapter_state(model).items():
            if "lora_B" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model


def logprobs(model):
    with torch.no_grad():
        return torch.log_softmax(model(TOKENS).logits.float(), -1)


def loss_of(model):
    return -torch.log_softmax(model(TOKENS).logits.float(), -1)[..., 5].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_folder_has_the_log_probs_of_the_adapters(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path, state_dict=merged_state(model))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logprobs(exported), logprobs(model), atol=1e-5, rtol=0)
    assert (logprobs(exported) - logprobs(tiny_model(kind, 64))).abs().max() > 0.1
    assert exported.state_dict().keys() == tiny_model(kind, 64).state_dict().keys()


def test_layers_that_hold_their_weight_transposed_are_merged_alike():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    add_lora(model, CONFIG)
    with torch.no_grad():
        for name, tensor in adapter_state(model).items():
            if "lora_B" in name:
                tensor.normal_()
    hidden = merged_copy(model.base_model)(TOKENS).last_hidden_state
    expected = model.base_model(TOKENS).last_hidden_state
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)


def test_the_merged_folder_in_bfloat16_differs_by_rounding_alone(tmp_path):
    model = adapted(dtype=torch.bfloat16, scale=0.1)
    model.save_pretrained(tmp_path, state_dict=merged_state(model))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.dtype is torch.bfloat16
    moved = (logprobs(model) - logprobs(tiny_model("qwen2", 64).bfloat16())).abs().mean()
    assert (logprobs(exported) - logprobs(model)).abs().mean() < 0.05 < moved / 5


def test_merging_is_the_weight_plus_the_scaled_product_and_touches_nothing():
    model = adapted()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    layer = "model.layers.0.self_attn.q_proj"
    low, high = (before[f"{layer}.lora_{side}.default.weight"] for side in "AB")
    plain = tiny_model("qwen2", 64).state_dict()
    merged = merged_state(model)
    torch.testing.assert_close(merged[f"{layer}.weight"], plain[f"{layer}.weight"] + 8.0 / 4 * high @ low)
    assert merged.keys() == plain.keys()
    for name in ("model.norm.weight", f"{layer}.bias", "model.embed_tokens.weight"):
        assert torch.equal(merged[name], plain[name])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_state_gathered_elsewhere_is_merged_alike_and_an_empty_one_is_empty():
    model = adapted()
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # as on a process that holds a share
    expected = merged_state(adapted())
    assert all(torch.equal(t, expected[n]) for n, t in merged_state(model, gathered).items())
    assert merged_state(model, {}) == {}


def test_without_adapters_the_merged_state_is_the_state():
    model = tiny_model("qwen2", 64)
    assert merged_state(model).keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in merged_state(model).items())


def test_a_merged_copy_is_plain_trainable_and_apart():
    model = adapted()
    twin = merged_copy(model.base_model)
    assert all(p.requires_grad for p in twin.parameters())
    assert not any("lora" in name for name, _ in twin.named_modules())
    torch.testing.assert_close(
        twin(TOKENS).last_hidden_state, model.base_model(TOKENS).last_hidden_state, atol=1e-5, rtol=1e-5
    )
    with torch.no_grad():
        twin.norm.weight.zero_()
    assert model.base_model.norm.weight.any()


def test_a_step_moves_the_adapters_alone_and_the_reference_stays_exactly():
    start = tiny_model("qwen2", 64)
    model = tiny_model("qwen2", 64)
    add_lora(model, CONFIG)
    assert torch.equal(logprobs(model), logprobs(start))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_state(model).keys()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    for _ in range(2):  # the first moves only B, for A has no gradient while B is zero
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    assert (logprobs(model) - logprobs(start)).abs().max() > 0.1
    with without_adapters(model):
        assert torch.equal(logprobs(model), logprobs(start))
        # FSDP reads this at the first forward pass, which may be this one.
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert (logprobs(model) - logprobs(start)).abs().max() > 0.1
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_adapters_come_back_also_after_an_error():
    model = adapted()
    expected = logprobs(model)
    with pytest.raises(RuntimeError), without_adapters(model):
        raise RuntimeError
    assert torch.equal(logprobs(model), expected)


def test_a_model_without_adapters_has_no_reference_in_it():
    with pytest.raises(ValueError, match="no adapters"), without_adapters(tiny_model("qwen2", 64)):
        pass


def test_dropout_acts_only_while_training_and_as_seeded():
    model = adapted(config=LoraConfig(rank=4, dropout=0.5))
    still = logprobs(model)
    assert torch.equal(logprobs(model), still) and not any(m.training for m in model.modules())

    def drawn(seed):
        torch.manual_seed(seed)
        with training_dropout(model):
            assert not model.training and not model.model.layers[0].training
            return logprobs(model)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), still) and not torch.equal(drawn(0), drawn(1))
    assert torch.equal(logprobs(model), still)


def test_gradient_checkpointing_changes_no_gradient_of_an_adapter():
    def gradients(checkpointing):
        model = adapted(config=LoraConfig(rank=4, dropout=0.5))
        if checkpointing:
            model.gradient_checkpointing_enable()
            for layer in model.modules():
                layer.training = isinstance(layer, GradientCheckpointingLayer)
        torch.manual_seed(0)
        with training_dropout(model):
            loss_of(model).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(g.any() for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_all_linear_is_every_linear_layer_but_the_head():
    for kind in KINDS:
        model = tiny_model(kind, 64)
        add_lora(model, CONFIG)
        layers = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_state(model)}
        assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_named_layers_alone_get_adapters():
    model = tiny_model("qwen2", 64)
    add_lora(model, LoraConfig(rank=2, target_modules="q_proj, v_proj"))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_state(model)}
    assert layers == {"q_proj", "v_proj"} and len(adapter_state(model)) == 2 * 2 * 2


@pytest.mark.parametrize("names", ["query", "q_proj,lm_head", "embed_tokens", "", "all-linear,q_proj"])
def test_unknown_layers_are_refused_with_those_there_are(names):
    with pytest.raises(ConfigError, match=r"lora.target_modules = .*all-linear, or some of down_proj,gate"):
        add_lora(tiny_model("llama", 64), LoraConfig(rank=2, target_modules=names))


def test_rank_zero_leaves_the_model_as_it_is():
    model = tiny_model("qwen2", 64)
    add_lora(model, LoraConfig())
    assert not adapter_state(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_have_the_dtype_of_their_layer_and_start_by_the_seed_alone(dtype):
    elsewhere = iter(range(100, 200))

    def start(seed):
        model = tiny_model("qwen2", 64).to(dtype)
        torch.manual_seed(next(elsewhere))  # where the generator stands says nothing, and it is left there
        state = torch.get_rng_state()
        add_lora(model, CONFIG, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return adapter_state(model)

    one, other = start(0), start(1)
    assert {t.dtype for t in one.values()} == {dtype}
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert not torch.equal(one[name], other[name])
    assert all(torch.equal(t, one[n]) for n, t in start(0).items())


def test_adapters_survive_the_way_to_disk_and_back(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model, fresh = adapted(), tiny_model("qwen2", 64)
    add_lora(fresh, CONFIG, seed=9)
    save_file(adapter_state(model), tmp_path / "adapters.safetensors")
    load_adapter_state(fresh, load_file(tmp_path / "adapters.safetensors"))
    assert torch.equal(logprobs(fresh), logprobs(model))


def test_adapters_of_another_rank_are_refused_and_nothing_is_changed():
    model = adapted()
    before = logprobs(model)
    for other in (LoraConfig(rank=2), LoraConfig(rank=4, target_modules="q_proj"), LoraConfig()):
        with pytest.raises(DataError, match=r"lora.rank or lora.target_modules: model\.layers.* must be"):
            load_adapter_state(model, adapter_state(adapted(config=other)))
    assert torch.equal(logprobs(model), before)
