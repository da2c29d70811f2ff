"""A run keeps the prompt that it began with."""

from dataclasses import replace

import pytest

from agent.prompt import encode_prompt
from rl.config import ProtocolConfig
from scripts.train import train
from tests.rl.test_trainer import Killed, kill_at
from tests.toy import bigram_policy, toy_config

TODAY = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"


@pytest.mark.slow
def test_a_run_asks_as_on_the_day_it_began(toy, tmp_path, day, monkeypatch):
    """A chat template that says what day it is: in training and on dev, and after it was interrupted."""
    policy = bigram_policy()
    policy.tokenizer.chat_template = TODAY
    policy.save(tmp_path / "policy", "search_r1")
    prompts = []

    def spy(*given):
        prompt, ids = encode_prompt(*given)
        prompts.append(prompt)
        return prompt, ids

    monkeypatch.setattr("agent.environment.encode_prompt", spy)
    spoken = ProtocolConfig(max_turns=1, max_response_tokens=20)
    config = toy_config(toy, tmp_path / "run", policy=str(tmp_path / "policy"), protocol=spoken,
                        save_every=1, eval_every=2, eval_limit=2)  # fmt: skip
    day(2026, 11, 29)
    with pytest.raises(Killed):
        train(config, on_step=kill_at(1))
    day(2026, 12, 1)
    train(config)
    assert len(prompts) == 26 and all(prompt.startswith("29 Nov 2026: Answer the") for prompt in prompts)
    train(replace(config, out=str(tmp_path / "another"), steps=1, eval_every=0))
    assert prompts[-1].startswith("01 Dec 2026: Answer the")
