"""Real vLLM, in the environment that scripts/vllm_env.sh makes: its log-probs are transformers'.

Skipped where that environment is not there. On a CPU the first completion takes half a minute.
"""

import asyncio
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from agent.engines import transport
from agent.engines.base import FinishReason, Sampling
from agent.engines.config import EngineConfig
from agent.engines.device_transport import IPCTransport, NCCLTransport
from agent.engines.open_vllm import open_vllm
from agent.policy import Policy, load_policy
from agent.protocol import get_protocol
from data.errors import ConfigError, EngineError
from data.models.packaged import smollm2_policy
from data.settings import LoraConfig
from rl.config import RolloutConfig
from rl.learner.logprobs import Scorer
from rl.learner.lora import add_lora, scaled_adapter_state
from rl.weight_sync import compare
from tests.fakes import byte_tokenizer, tiny_model

PYTHON = Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-vllm: bash scripts/vllm_env.sh"),
]
CONFIG = EngineConfig(
    name="vllm",
    python=str(PYTHON),
    deadline_seconds=900,
    arguments="--max-model-len 1024 --kv-cache-memory-bytes 400000000",
)


def tiny(folder):
    """A random Qwen2 with tied embeddings; vLLM's attention on a CPU wants heads of 32."""
    tokenizer = byte_tokenizer("</search>")
    model = tiny_model("qwen2", len(tokenizer), hidden_size=128, eos_token_id=tokenizer.eos_token_id)
    Policy(model, tokenizer).save(folder / "policy", "compact")
    return str(folder / "policy")


def smollm2(folder):
    """SmolLM2-135M, as a package ships it."""
    try:
        return str(smollm2_policy())
    except ConfigError as missing:
        pytest.skip(str(missing))


def atlas(folder):
    """A Qwen2 whose heads vLLM does not have, served as a Llama of wider ones."""
    return "atlas"


def change(model, seed, names=""):
    """A step that no log-prob is blind to, of the parameters with that in their names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if names in name):
            parameter.add_(0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("make", [tiny, smollm2, atlas])
def test_logprobs_are_those_of_transformers_before_and_after_three_syncs(make, tmp_path, monkeypatch):
    source = make(tmp_path)
    policy = load_policy(source, "cpu", "float32")
    tied = policy.model.config.tie_word_embeddings
    assert tied == (make is not atlas)
    prompts = [policy.tokenizer.encode(text) for text in ("Who wrote Hamlet?", "<search> the red fox " * 9)]
    sampling = Sampling(max_tokens=16, seed=1)
    scorer = Scorer(policy.model, RolloutConfig())

    async def probe(engine, when):
        found = await engine.probe(prompts, sampling)
        assert {c.weights_version for each in found.values() for c in each} == {engine.weights_version}
        return compare(found, prompts, scorer, EngineConfig(), False, when)

    async def run(engine):
        try:
            differences = [await probe(engine, "at first")]
            for version in (1, 2, 3):
                change(policy.model, version)
                await engine.update_weights(None, version)
                differences.append(await probe(engine, f"after sync {version}"))
            await stops_and_seeds(engine, policy, prompts[0])
            await in_flight(engine, policy, prompts[0])
            if tied and not torch.cuda.is_available():  # there nothing is packed
                monkeypatch.setattr(transport, "RELOAD", ("reload_weights", "reload_weights"))
                change(policy.model, 5)
                await engine.update_weights(None, 5)
                with pytest.raises(EngineError, match="does not have the policy's weights") as stale:
                    await probe(engine, "with a stale head")
                print(stale.value)
            return differences
        finally:
            await engine.close()

    engine = open_vllm(CONFIG, policy, source, get_protocol("search_r1"), 32, tmp_path)
    differences = asyncio.run(run(engine))
    print(source, differences)
    assert max(each["sync/probe_largest_difference"] for each in differences) < 1e-3


@pytest.mark.parametrize("make", [smollm2, atlas])
def test_adapters_loaded_as_adapters_give_the_log_probs_of_the_policy(make, tmp_path):
    source = make(tmp_path)
    policy = load_policy(source, "cpu", "float32")
    prompts = [policy.tokenizer.encode(text) for text in ("Who wrote Hamlet?", "<search> the red fox " * 9)]
    scorer = Scorer(policy.model, RolloutConfig())
    engine = open_vllm(
        replace(CONFIG, lora="adapter"), policy, source, get_protocol("search_r1"), 32, tmp_path
    )
    add_lora(policy.model, LoraConfig(rank=8, alpha=16.0))

    async def run():
        try:
            found, differences = [], []
            for version in range(4):
                if version:
                    with torch.no_grad():
                        for name, parameter in policy.model.named_parameters():
                            if ".lora_B." in name:
                                parameter.normal_(std=0.02)
                    await engine.update_weights(scaled_adapter_state(policy.model), version)
                found.append(await engine.probe(prompts, Sampling(max_tokens=16, seed=1)))
                differences.append(
                    compare(found[-1], prompts, scorer, EngineConfig(), False, f"sync {version}")
                )
            return found, differences
        finally:
            await engine.close()

    found, differences = asyncio.run(run())
    print(source, differences)
    assert max(each["sync/probe_largest_difference"] for each in differences) < 1e-3
    firsts = [next(iter(each.values()))[1].logprobs[0] for each in found]
    assert len({round(first, 2) for first in firsts}) > 2  # the adapters did something


WIRE = """
import json, sys
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
join, update, ipc_join, ipc_update = json.load(sys.stdin)
assert NCCLWeightTransferInitInfo(**join).nccl_unique_id_bytes == bytes(range(128))
NCCLWeightTransferUpdateInfo(**update)
IPCWeightTransferInitInfo(**ipc_join)
assert IPCWeightTransferUpdateInfo(**ipc_update).ipc_handles == [{"GPU-1": ("how", 1)}, {"GPU-1": ("how", 1)}]
print("understood")
"""


def test_vllms_own_parsers_read_what_is_sent_for_nccl_and_ipc():
    said: list[Any] = []

    class Server:
        lives = 1

        async def get(self, path):
            return {"world_size": 1}

        async def ask(self, path, body=None):
            said.append(next(iter(body.values())) if body else None)

    class Group:
        def broadcast(self, tensors):
            pass

    def state_of(state):
        return dict(state or {})

    async def send(transport: Any):
        await transport.stage({"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}, 1)
        await transport.load(Server(), transport.staged)

    asyncio.run(send(NCCLTransport(state_of, "cpu", lambda *_: Group(), lambda: bytes(range(128)))))
    asyncio.run(send(IPCTransport(state_of, "cpu", lambda tensor: {"GPU-1": ("how", 1)})))
    read = subprocess.run(
        [PYTHON, "-c", WIRE],
        input=json.dumps([each for each in said if each]),
        env=os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        capture_output=True,
        text=True,
    )
    assert read.stdout.endswith("understood\n"), read.stderr


async def stops_and_seeds(engine, policy, prompt):
    """The same seed writes the same; a stop string ends there, its ids kept."""
    whole, again, other = [
        await engine.generate(prompt, Sampling(max_tokens=16, seed=seed), f"t{n}")
        for n, seed in enumerate((3, 3, 4))
    ]
    assert whole.token_ids == again.token_ids != other.token_ids
    texts = [policy.tokenizer.decode([token]) for token in whole.token_ids]
    stop = next(text.strip() for text in texts[1:] if text.strip() and "\ufffd" not in text)
    stopped = await engine.generate(prompt, Sampling(max_tokens=16, seed=3, stop=(stop,)), "stop")
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert stop in policy.tokenizer.decode(stopped.token_ids)


async def in_flight(engine, policy, prompt):
    """A completion under way goes on with the new weights, and says how old its oldest token is."""
    parameters = engine._parameters

    def endless(sampling, room):
        return parameters(sampling, room) | {"ignore_eos": True, "stop_token_ids": []}

    with patch.object(engine, "_parameters", endless):
        written = asyncio.ensure_future(engine.generate(prompt, Sampling(max_tokens=400, seed=3), "long"))
        await asyncio.sleep(0.5)
    assert not written.done()
    change(policy.model, 4)
    await engine.update_weights(None, 4)
    assert (await written).weights_version == 3
