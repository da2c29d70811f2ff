"""A model on this machine as a generator, by the hf engine."""

import signal

import pytest

from retriever_server.training.synthesis.drafts import Call
from scripts.local_generator import Local


def test_texts_depend_on_their_own_call_alone_and_long_prompts_are_refused():
    local = Local("atlas", device="cpu", most_prompt_tokens=60)
    calls = [
        Call(f"Where is Chad {i}?", seed=i, temperature=1.0, max_tokens=12, stop=("\n",)) for i in range(4)
    ]
    together = local.write(calls)
    assert [local.write([call])[0].text for call in calls] == [each.text for each in together]
    assert len({each.text for each in together}) > 1
    assert all(
        0 < each.new_tokens <= 12 and each.prompt_tokens > 0 and (each.logprob or 0) <= 0 for each in together
    )
    assert not any("\n" in each.text for each in together)
    [refused] = local.write([Call("word " * 200)])
    assert refused.refused == "prompt too long"


def test_interrupted_it_is_silent_and_writes_the_same_afterwards(capfd, monkeypatch):
    local = Local("atlas", device="cpu")
    calls = [Call(f"Where is Chad {i}?", seed=i, temperature=1.0, max_tokens=12) for i in range(3)]
    whole, generate = local.write(calls), local._engine.generate

    async def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return await generate(*given)

    monkeypatch.setattr(local._engine, "generate", interrupted)
    capfd.readouterr()
    with pytest.raises(KeyboardInterrupt):
        local.write(calls)
    monkeypatch.undo()
    assert local.write(calls) == whole
    assert "Traceback" not in capfd.readouterr().err
