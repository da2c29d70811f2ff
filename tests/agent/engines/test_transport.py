"""New weights for servers: LoRA adapters by files, and vLLM's own wire for GPUs, against a fake server."""

import asyncio
import base64
import copy
import json
import pickle

import pytest
import torch

from agent.engines.base import Sampling
from agent.engines.config import EngineConfig
from agent.engines.device_transport import IPCTransport, NCCLTransport, device_arguments
from agent.engines.hf import HFEngine
from agent.engines.open_vllm import open_vllm
from agent.engines.transport import AdapterTransport
from agent.engines.vllm import VLLMEngine
from agent.engines.weight_export import export_for_vllm
from agent.policy import Policy
from agent.protocol import COMPACT
from data.errors import ConfigError, EngineError
from data.settings import LoraConfig
from retriever_server.client.pool import servers_at
from rl.learner.lora import add_lora, scaled_adapter_state
from tests.fake_vllm import FakeVLLM
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.running import serving

TOKENIZER = byte_tokenizer()
PROMPT = list(range(10, 30))


def policy(kind="qwen2", **changes):
    return Policy(tiny_model(kind, len(TOKENIZER), **changes), TOKENIZER)


def with_server(model, act, transport):
    """Return what `act(engine, fake)` gives with a fake server of a copy of the model."""
    fake = FakeVLLM(copy.deepcopy(model), TOKENIZER)

    async def run(url):
        engine = VLLMEngine(servers_at([url], "urls"), [], transport(fake), deadline_seconds=20)
        try:
            return await act(engine, fake)
        finally:
            await engine.close()

    with serving(fake.app) as url:
        return asyncio.run(run(url))


async def complete(engine):
    return await engine.generate(PROMPT, Sampling(max_tokens=12, seed=0), "t")


def here(model):
    return asyncio.run(complete(HFEngine(model, TOKENIZER)))


def shake(model, names, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_adapters_are_loaded_once_and_then_replaced_while_paused(tmp_path):
    learned = policy()
    base = copy.deepcopy(learned.model)
    add_lora(learned.model, LoraConfig(rank=2, alpha=6.0))
    expected = []

    async def act(engine, fake):
        completions, requests = [await complete(engine)], []
        for version in (1, 2, 3):
            shake(learned.model, "lora_", version)
            expected.append(learned.model.state_dict())
            expected[-1] = {name: tensor.clone() for name, tensor in expected[-1].items()}
            await engine.update_weights(scaled_adapter_state(learned.model), version)
            completions.append(await complete(engine))
            requests.append(fake.requests[-1].get("model"))
        return completions, requests, fake.calls, [path.name for path in tmp_path.iterdir()]

    export = export_for_vllm(learned, cpu=False)
    completions, requests, calls, kept = with_server(
        base, act, lambda _: AdapterTransport(export.save_adapter, tmp_path)
    )
    assert [c.weights_version for c in completions] == [0, 1, 2, 3]
    assert requests == ["policy"] * 3 and kept == ["weights-000003"]
    assert [call for call in calls if "adapter" in call] == ["load_lora_adapter"] + 2 * ["sleuth_adapter"]
    assert calls[:4] == ["pause keep", "load_lora_adapter", "reset True", "resume"]
    for completion, state in zip(completions[1:], expected, strict=True):
        learned.model.load_state_dict(state)
        there = here(learned.model)
        assert completion.token_ids == there.token_ids
        assert completion.logprobs == pytest.approx(there.logprobs, abs=1e-4)
    assert completions[0].token_ids != completions[1].token_ids != completions[2].token_ids
    assert not list(tmp_path.iterdir())


def test_adapters_of_an_exported_policy_change_its_llama_as_they_change_the_policy(tmp_path):
    learned = policy(head_dim=12)
    base = export_for_vllm(learned, cpu=True)
    base.save(tmp_path / "base")
    llama = Policy(type(tiny_model("llama", 8)).from_pretrained(tmp_path / "base"), TOKENIZER)
    add_lora(learned.model, LoraConfig(rank=2, alpha=6.0))
    shake(learned.model, "lora_", 1)

    async def act(engine, fake):
        await engine.update_weights(scaled_adapter_state(learned.model), 1)
        return await complete(engine)

    transport = AdapterTransport(export_for_vllm(learned, cpu=True).save_adapter, tmp_path / "sync")
    completion = with_server(llama.model, act, lambda _: transport)
    there = here(learned.model)
    assert completion.token_ids == there.token_ids
    assert completion.logprobs == pytest.approx(there.logprobs, abs=1e-4)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["head_dim"] == 32


def changed(learned):
    """An update of a policy with tied embeddings, and the tensors that a checkpoint has of it."""
    shake(learned.model, "", 5)
    state = learned.model.state_dict()
    return state, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


class LocalGroup:
    """A broadcast that ends in the fake server."""

    def __init__(self, fake, unique_id, size):
        self.fake, self.joined = fake, (unique_id, size)

    def broadcast(self, tensors):
        for tensor in tensors.values():
            self.fake.arriving.put(tensor)


def test_nccl_describes_what_it_broadcasts_and_joins_a_server_once():
    learned, groups = policy(), []

    def transport(fake):
        def connect(unique_id, size):
            groups.append(LocalGroup(fake, unique_id, size))
            return groups[-1]

        tensors = export_for_vllm(learned, cpu=False).weights
        return NCCLTransport(
            lambda state: tensors(state or learned.model.state_dict()), "cpu", connect, lambda: b"u" * 128
        )

    async def act(engine, fake):
        await engine.update_weights(None, 1)
        await engine.update_weights(changed(learned)[0], 2)
        completion, calls = await complete(engine), list(fake.calls)
        engine.pool.servers[0].open()  # it was away
        await engine.update_weights(None, 3)
        return completion, calls, fake.transfers

    completion, calls, (joined, first, _, again, _) = with_server(policy().model, act, transport)
    assert joined == {
        "nccl_unique_id_b64": base64.b64encode(b"u" * 128).decode(),
        "rank_offset": 1,
        "world_size": 2,
        "packed": False,
    }
    assert again == joined and [group.joined for group in groups] == [(b"u" * 128, 2)] * 2
    state = changed(policy())[1]
    assert first["names"] == list(state) and set(first["dtype_names"]) == {"float32"}
    assert first["shapes"] == [list(tensor.shape) for tensor in state.values()]
    assert calls == ["pause keep", "transferred", "reset True", "resume"] * 2
    assert completion.weights_version == 2 and completion.token_ids == here(learned.model).token_ids


def test_ipc_sends_what_maps_each_tensor():
    learned = policy()

    def transport(fake):
        def share(tensor):
            fake.arriving.put(tensor)
            return {"GPU-1": ("rebuild", tuple(tensor.shape))}

        return IPCTransport(lambda state: dict(state or {}), "cpu", share)

    async def act(engine, fake):
        await engine.update_weights(changed(learned)[0], 1)
        return await complete(engine), fake.transfers

    completion, (joined, sent) = with_server(policy().model, act, transport)
    assert joined == {"packed": False} and completion.token_ids == here(learned.model).token_ids
    handles = pickle.loads(base64.b64decode(sent["ipc_handles_pickled"]))
    assert [each["GPU-1"][1] for each in handles] == [tuple(shape) for shape in sent["shapes"]]


def test_a_group_that_never_forms_takes_its_server_out():
    def transport(fake):
        def connect(unique_id, size):
            raise RuntimeError("NCCL error: unhandled system error")

        return NCCLTransport(lambda state: dict(state or {}), "cpu", connect, lambda: b"u" * 128)

    async def act(engine, fake):
        await engine.update_weights({"a": torch.zeros(2)}, 1)

    with pytest.raises(EngineError, match=r"none of 1 servers is left: .*NCCL error: unhandled system error"):
        with_server(policy().model, act, transport)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_has_no_gpu_or_no_adapters_is_refused(tmp_path):
    for name in ("nccl", "ipc"):
        with pytest.raises(ConfigError, match=f"engine.transport = '{name}': torch sees no CUDA device here"):
            open_vllm(EngineConfig("vllm", transport=name), policy(), "", COMPACT, 1, tmp_path)
        with pytest.raises(ConfigError, match="no CUDA device"):
            device_arguments(name)
    with pytest.raises(ValueError, match=r"engine.transport = 'nccl': must be folder with engine.lora"):
        EngineConfig("vllm", transport="nccl", lora="adapter")
    with pytest.raises(EngineError, match="has no adapters to hand over"):
        export_for_vllm(policy(), cpu=False).save_adapter(tmp_path, None)
