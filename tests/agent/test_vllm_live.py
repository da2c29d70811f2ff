"""Real vLLM, in the environment that scripts/vllm_env.sh makes: its log-probs are transformers'.

Skipped where that environment is not there. On a CPU the first completion takes half a minute.
"""

import asyncio
from pathlib import Path

import pytest
import torch

from agent.engines import vllm
from agent.engines.base import FinishReason, Sampling
from agent.engines.opening import open_vllm
from agent.packaged import smollm2_policy
from agent.policy import Policy, load_policy
from agent.protocol import get_protocol
from data.errors import ConfigError, EngineError
from data.settings import EngineConfig
from rl.config import RolloutConfig
from rl.logprobs import Scorer
from rl.weight_sync import FLOAT32_DIFFERENCE, compare
from tests.fakes import byte_tokenizer, tiny_model

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
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


def change(model, seed):
    """A step that no log-prob is blind to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("make", [tiny, smollm2])
def test_logprobs_are_those_of_transformers_before_and_after_three_syncs(make, tmp_path, monkeypatch):
    source = make(tmp_path)
    policy = load_policy(source, "cpu", "float32")
    assert policy.model.config.tie_word_embeddings
    prompts = [policy.tokenizer.encode(text) for text in ("Who wrote Hamlet?", "<search> the red fox " * 9)]
    sampling = Sampling(max_tokens=16, seed=1)
    scorer = Scorer(policy.model, RolloutConfig())

    async def probe(engine, when):
        found = await engine.complete_on_each(prompts, sampling)
        assert {c.weights_version for each in found.values() for c in each} == {engine.weights_version}
        return compare(found, prompts, scorer, FLOAT32_DIFFERENCE, when)

    async def run(engine):
        try:
            differences = [await probe(engine, "at first")]
            for version in (1, 2, 3):
                change(policy.model, version)
                await engine.update_weights(None, version)
                differences.append(await probe(engine, f"after sync {version}"))
            await stops_and_seeds(engine, policy, prompts[0])
            await in_flight(engine, policy, prompts[0])
            if not torch.cuda.is_available():  # there nothing is packed
                monkeypatch.setattr(vllm, "RELOAD", ("reload_weights", "reload_weights"))
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
    written = asyncio.ensure_future(engine.generate(prompt, Sampling(max_tokens=400, seed=3), "long"))
    await asyncio.sleep(0.5)
    assert not written.done()
    change(policy.model, 4)
    await engine.update_weights(None, 4)
    assert (await written).weights_version == 3
