"""Side `trl` of `scripts.bench.rollout --passages`: the rollout that a step of TRL's `GRPOTrainer` calls."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from agent.search_tool import Neutraliser, render_hits
from data.records import Question
from scripts.bench.rollout_engines import PROTOCOL, Clock, Outcome, Work


class Lengths(LogitsProcessor):
    """No end before a row's last planned token, and an end then."""

    def __init__(self, tokens: list[int], prompt_tokens: int, ends: list[int]) -> None:
        self.tokens, self.prompt_tokens, self.ends = torch.tensor(tokens), prompt_tokens, ends

    def __call__(self, input_ids, scores):
        last = self.tokens <= input_ids.shape[1] - self.prompt_tokens + 1
        scores[:, self.ends] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.ends[0]] = 0.0
        return scores


def make_trl(work: Work) -> Callable[[Work, int], Outcome]:
    """TRL's side: a trainer over the policy; its `_generate` is what a training step calls."""
    from datasets import Dataset
    from trl.chat_template_utils import qwen2_5_chat_template
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    tokenizer: Any = work.policy.tokenizer
    neutralise = Neutraliser(PROTOCOL)
    state: dict[str, Any] = {}

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def search(query: str) -> str:
        """Search the passages.

        Args:
            query: What to look for.

        Returns:
            The passages found.
        """
        state["searches"] += 1
        hits = work.retriever.search([query], PROTOCOL.top_k)[0]
        return query + render_hits(hits, PROTOCOL, neutralise, encode, PROTOCOL.max_observation_tokens)

    class Trainer(GRPOTrainer):
        """TRL's own, which is told how long each row writes, and what it then calls."""

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            plans = [state["plans"][row] for row in range(len(state["plans"]))]
            live = [plan[state["turn"]] for plan in plans if len(plan) > state["turn"]]
            assert len(live) == len(prompt_ids), "the lengths of the sides must agree"
            state["turn"] += 1
            state["called"] = iter(live)
            width = max(map(len, prompt_ids))
            forced = Lengths([turn.tokens for turn in live], width, self.eos_token_ids)
            model: Any = self.model
            generate = model.generate

            def laid(*given: Any, **named: Any) -> Any:
                return generate(*given, logits_processor=LogitsProcessorList([forced]), **named)

            with patch.object(model, "generate", laid):
                written, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            assert [len(ids) for ids in written] == [turn.tokens for turn in live]
            return written, logprobs

    def parse(tokenizer: Any, ids: Any, **_: Any) -> dict[str, Any]:
        turn = next(state["called"])
        said = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": turn.query}}}
        return said if turn.query is None else said | {"tool_calls": [call]}

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = qwen2_5_chat_template  # SmolLM2 writes ChatML, too; its own knows no tools
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            work.policy.model,
            lambda prompts, completions, **columns: [0.0] * len(prompts),
            GRPOConfig(
                folder,
                use_cpu=work.policy.model.device.type == "cpu",
                bf16=False,
                per_device_train_batch_size=len(work.questions),
                num_generations=2,
                max_completion_length=PROTOCOL.max_context_tokens,
                max_tool_calling_iterations=PROTOCOL.max_turns,
                report_to="none",
                save_strategy="no",
            ),
            Dataset.from_dict({"prompt": [_messages(q) for q in work.questions]}),
            processing_class=tokenizer,
            tools=[search],
        )

    def run(work: Work, seed: int) -> Outcome:
        torch.manual_seed(seed)
        state.update(plans=[work.plans[q.id] for q in work.questions], turn=0, searches=0)
        trainer._sync_tool_dicts = [{"search": search} for _ in work.questions]
        trainer._async_tool_dicts = [{} for _ in work.questions]
        clock = Clock()
        with patch("trl.trainer.grpo_trainer.parse_response", parse):
            prompts, completions, *_ = trainer._generate([_messages(q) for q in work.questions])
        seconds = clock.read()
        sampled = sum(turn.tokens for plan in state["plans"] for turn in plan)
        read = sum(map(len, prompts)) + sum(map(len, completions)) - sampled
        return Outcome(*seconds, sampled, read, state["searches"])

    return run


def _messages(question: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}]
