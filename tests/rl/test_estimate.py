"""Estimates of a dry run of a tiny model are what the real one then takes."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config

from agent.engines.config import EngineConfig
from agent.engines.hf import RowCache
from agent.protocol import SEARCH_R1
from data.errors import ConfigError
from data.run_dir import RunDir
from data.settings import LoraConfig
from rl.config import AlgorithmConfig, RolloutConfig, TrainConfig
from rl.estimate import ResourceEstimate, estimate_text, peak, recent_steps
from rl.learner.critic import Critic
from rl.learner.logprobs import packed_arguments
from rl.learner.lora import add_lora
from rl.learner.optimizer import Optimizer
from scripts.command_line import call
from scripts.wiring import make_protocol
from tests.fakes import tiny_model

VOCABULARY = 300
CONFIGS = Path(__file__).parents[2] / "scripts" / "configs"
RATES = (1e9, 1e8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    tiny_model("qwen2", VOCABULARY).save_pretrained(path)
    return path


def configure(folder, **changes):
    config = TrainConfig(policy=str(folder), questions="q", retriever="r", out=str(folder / "out"))
    return replace(config, **{"device": "cpu", "rollout": RolloutConfig(1, 8)} | changes)


def memory(config, world_size=1, longest=100):
    phases = ResourceEstimate(config, world_size).memory(longest)
    return {name: size for parts in phases.values() for name, size in parts.items()}


def seconds(config, fed=1.0, written=40):
    return ResourceEstimate(config).seconds((written, 100, fed), RATES)


def kept_by_autograd(model, forward):
    """Bytes of the storages, other than weights, that a forward saves for its backward."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_weights_optimiser_and_checkpoint_are_of_the_size_of_the_real_ones(folder, dtype, rank):
    config = configure(folder, lora=LoraConfig(rank=rank), dtype=dtype)
    model = tiny_model("qwen2", VOCABULARY).to(getattr(torch, dtype))
    plain = sum(p.nbytes for p in model.parameters())
    add_lora(model, config.lora)
    adapters = sum(p.nbytes for p in model.parameters()) - plain
    optimizer = Optimizer(model, config.algorithm, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.update()
    state = sum(tensor.nbytes for tensor in optimizer.state().values() if tensor.ndim)
    parts = memory(config)
    assert (parts["policy weights"], parts.get("adapters", 0)) == (plain, adapters)
    assert parts["AdamW moments"] + parts.get("float32 copies of trained weights", 0) == state
    one = plain + adapters + state
    assert ResourceEstimate(config).disk() == {"2 checkpoints": 2 * one, "another while it is written": one}


def test_a_critic_is_of_the_size_of_the_real_one_and_only_gae_has_it(folder):
    critic = Critic.from_policy(tiny_model("qwen2", VOCABULARY))
    with_critic = memory(configure(folder, algorithm=AlgorithmConfig(advantage="gae")))
    weights = sum(p.nbytes for p in critic.parameters())
    assert with_critic["critic, its copies and moments"] == 3 * weights
    assert "critic, its copies and moments" not in memory(configure(folder))


def test_a_reference_is_one_more_policy_unless_adapters_can_be_switched_off(folder):
    near = configure(folder, algorithm=AlgorithmConfig(kl_coefficient=0.001))
    assert memory(near)["reference policy"] == memory(near)["policy weights"]
    assert "reference policy" not in memory(replace(near, lora=LoraConfig(rank=4)))
    assert "reference policy" not in memory(configure(folder))


def test_the_cache_is_of_the_size_of_the_engines_at_its_fullest(folder):
    cache = RowCache(tiny_model("qwen2", VOCABULARY), max_rows=6)
    cache.reserve(6, 300)
    config = configure(folder, rollout=RolloutConfig(1, 8, max_rows=6))
    assert memory(config, longest=300)["KV cache of 6 rows of 513"] == cache.storage.nbytes


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_activations_are_what_autograd_keeps_of_a_packed_micro_batch(tmp_path, kind):
    model = tiny_model(kind, VOCABULARY)
    model.save_pretrained(tmp_path)
    trunk: Any = model.base_model
    ids = torch.zeros(1, 400, dtype=torch.long)

    def forward():
        trunk(input_ids=ids, use_cache=False, **packed_arguments(trunk, [100, 300]))

    with_gradients = kept_by_autograd(model, forward) * 3 / 2  # of one of its two layers
    assert ResourceEstimate(configure(tmp_path)).activation_bytes() * 400 == pytest.approx(
        with_gradients, rel=0.1
    )


def test_checkpointed_activations_are_the_inputs_of_the_layers_and_two_layers_of_activations(folder):
    once, again = (
        ResourceEstimate(configure(folder, gradient_checkpointing=on)).activation_bytes()
        for on in (False, True)
    )
    assert again == pytest.approx(2 * 32 * 4 + once * 2 / 3)


def test_fsdp_divides_what_is_trained_but_gives_the_engine_a_whole_copy(folder):
    config = configure(folder, sharding="fsdp", dtype="bfloat16")
    alone, shared = memory(config), memory(config, world_size=4)
    assert shared["policy weights"] == alone["policy weights"] * 2 / 4  # float32 in place of bfloat16
    assert shared["AdamW moments"] == alone["AdamW moments"] / 4
    assert shared["the engine's own weights"] == alone["policy weights"]
    assert "the engine's own weights" not in memory(replace(config, sharding="none"), world_size=4)


def test_servers_hold_the_cache_and_a_copy_that_the_trainer_then_has_not(folder):
    config = configure(folder, sharding="fsdp", rollout=RolloutConfig(1, 8, max_rows=6))
    served = replace(config, engine=EngineConfig(name="vllm"))
    own, apart = memory(config, 4, 300), memory(served, 4, 300)
    handed_over = "all weights in float32 for the engine"
    gone = {"the engine's own weights", "KV cache of 6 rows of 513", handed_over}
    assert set(own) - set(apart) == gone
    by_nccl = replace(served, engine=EngineConfig(name="vllm", transport="nccl"))
    assert memory(by_nccl, 4, 300)[handed_over] == own[handed_over]
    cache = RowCache(tiny_model("qwen2", VOCABULARY), max_rows=6)
    cache.reserve(6, 512)
    server = ResourceEstimate(served, 4).server_memory(513)
    assert list(server.values()) == [own["the engine's own weights"], cache.storage.nbytes]
    text = estimate_text(served, SEARCH_R1, world_size=4)
    assert "Memory of each vLLM server" in text and "KV cache of 6 rows of 4,096" in text


def test_the_peak_counts_phases_that_exclude_each_other_once():
    assert peak({"always": {"a": 1, "b": 2}, "update": {"c": 5, "d": 1}, "AdamW": {"e": 4}}) == 9


@pytest.mark.parametrize(
    ("limits", "written", "total"),
    [
        ({}, 2500, 4096),  # the model's positions
        ({"max_context_tokens": 3000}, 2500, 3500),
        ({"max_turns": 0, "max_response_tokens": 100}, 100, 356),
        ({"max_turns": 1, "max_response_tokens": 90, "max_observation_tokens": 50}, 180, 486),
    ],
)
def test_a_trajectory_is_as_long_as_its_tightest_limit_allows(folder, limits, written, total):
    assert ResourceEstimate(configure(folder)).longest(replace(SEARCH_R1, **limits)) == (written, total, 1.0)


def test_seconds_are_the_flops_that_torch_counts_over_the_rate(folder):
    model, tokens = tiny_model("qwen2", VOCABULARY), 48
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(2, tokens, dtype=torch.long)
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    config = configure(folder, rollout=RolloutConfig(1, 2))
    parts = ResourceEstimate(config).seconds((tokens, tokens, 1.0), RATES)  # all of them written
    assert parts["update of the policy"] * 1e9 == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert parts["writing"] * 1e8 == pytest.approx(counter.get_total_flops() / 3, rel=0.15)


def test_every_pass_over_the_batch_takes_the_time_of_a_forward(folder):
    def with_(**algorithm):
        return seconds(configure(folder, algorithm=AlgorithmConfig(**algorithm)))

    forward = with_()["update of the policy"] / 3
    before = "log-probs before the update"
    assert before not in with_()
    assert with_(updates_per_rollout=2)[before] == pytest.approx(forward)
    assert with_(kl_coefficient=0.1)[before] == pytest.approx(forward)  # the reference's
    assert with_(kl_coefficient=0.1, kl_in="reward")[before] == pytest.approx(2 * forward)
    values = with_(advantage="gae")["values, and update of the critic"]
    head = 8 * 2 * 32 * VOCABULARY * 40 / RATES[0]  # which the critic lacks
    assert values == pytest.approx(4 * (forward - head))


def test_only_what_has_something_to_learn_from_is_fed_unless_a_kl_term_wants_all(folder):
    near = configure(folder, algorithm=AlgorithmConfig(kl_coefficient=0.001))
    update = "update of the policy"
    assert seconds(configure(folder), 0.25)[update] == seconds(configure(folder))[update] / 4
    assert seconds(near, 0.25)[update] == seconds(near)[update]


def test_a_run_that_has_begun_tells_its_lengths_and_seconds(folder, tmp_path):
    config = configure(folder, out=str(tmp_path / "run"))
    assert recent_steps(config.out) is None
    text = estimate_text(config, SEARCH_R1)
    assert "a step, if so long, at least" in text and "(at most, by the limits of protocol search_r1)" in text
    with RunDir(config.out, {}) as run:
        for step, flat, taken in ((1, 0.5, 7), (2, 0.7, 8), (3, 0.6, 30)):
            lengths = {"rollout/policy_tokens": 40 + step, "rollout/total_tokens": 200}
            run.log(step, {**lengths, "rollout/zero_variance_groups": flat, "time/step_seconds": taken})
            run.log(step, {"dev/em": 0.1})
    assert recent_steps(config.out) == ((42, 200, pytest.approx(0.4)), 8, "as in steps 1 to 3")
    text = estimate_text(config, SEARCH_R1)
    assert re.search(r"a step, measured +8\.00 s\n  all 100 steps +0\.22 h", text)


def test_a_policy_of_seven_billion_is_estimated_without_its_weights(tmp_path):
    Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ).save_pretrained(tmp_path)
    config = configure(tmp_path, dtype="bfloat16")
    assert memory(config)["policy weights"] == 2 * 7_615_616_512


@pytest.mark.slow
def test_the_recipe_for_24_gb_fits_into_them(tmp_path):
    shape = {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    }
    shape |= {"vocab_size": 151_936, "intermediate_size": 11_008, "tie_word_embeddings": True}
    Qwen2Config(**shape, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)  # Qwen2.5-3B
    read = []

    def keep(config: TrainConfig) -> None:
        read.append(config)

    recipe = CONFIGS / "one_gpu_24gb.yaml"
    call(keep, ["--config", str(recipe), f"--policy={tmp_path}", "--device=cpu"], prog="sleuth train")
    needs = ResourceEstimate(read[0])
    longest = needs.longest(make_protocol(read[0].protocol, read[0].policy))
    assert needs.whole == pytest.approx(3.09e9, rel=0.01)
    assert 14e9 < peak(needs.memory(int(longest[1]))) < 20e9  # CUDA itself and fragments take some more


def test_the_table_names_every_part_and_nothing_is_written(folder):
    config = configure(folder, algorithm=AlgorithmConfig(advantage="gae", kl_coefficient=0.1), steps=7)
    text, needs = estimate_text(config, SEARCH_R1, world_size=2), ResourceEstimate(config, 2)
    for name in [*memory(config, 2, 4096), *needs.disk(), *seconds(config)]:
        assert name in text
    assert "Memory of each of 2 (torch.float32, cpu)" in text and "all 7 steps" in text
    assert not (folder / "out").exists()


def test_more_than_there_is_is_marked(folder):
    assert "TOO MUCH" not in estimate_text(configure(folder), SEARCH_R1)
    many = configure(folder, keep_checkpoints=10**12)
    assert estimate_text(many, SEARCH_R1).count("TOO MUCH") == 1


def test_a_policy_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^policy = '.*': its config.json cannot be read: "):
        ResourceEstimate(configure(tmp_path))
