"""Side `trl` of `scripts.bench.rollout --passages`: the rollout that a step of TRL's `GRPOTrainer` calls."""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import LogitsProcessor, LogitsProcessorList
from trl.chat_template_utils import qwen2_5_chat_template
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from agent.search_tool import TagSanitizer, render_hits
from data.records import Question
from scripts.bench.rollout_engines import PROTOCOL, Clock, Outcome, Turn, Work


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


class PlannedTrainer(GRPOTrainer):
    """TRL's own, which is told how long each row writes in each turn, and what it then calls."""

    plans: list[list[Turn]]
    turn: int
    called: Any
    """The turns of the live rows, in their order."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        live = [plan[self.turn] for plan in self.plans if len(plan) > self.turn]
        assert len(live) == len(prompt_ids), "the lengths of the sides must agree"
        self.turn += 1
        self.called = iter(live)
        width = max(map(len, prompt_ids))
        forced = LogitsProcessorList([Lengths([turn.tokens for turn in live], width, self.eos_token_ids)])
        model: Any = self.model
        with patch.object(model, "generate", partial(model.generate, logits_processor=forced)):
            written, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        assert [len(ids) for ids in written] == [turn.tokens for turn in live]
        return written, logprobs

    def parse(self, tokenizer: Any, ids: Any, **_: Any) -> dict[str, Any]:
        """Return what a row said, and the call that is planned for it."""
        turn = next(self.called)
        said = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": turn.query}}}
        return said if turn.query is None else said | {"tool_calls": [call]}


class TRLSide:
    """A trainer over the policy; its `_generate` is what a training step calls."""

    def __init__(self, work: Work) -> None:
        self.retriever, self.tokenizer = work.retriever, work.policy.tokenizer
        self.sanitize = TagSanitizer(PROTOCOL)
        self.searches = 0
        tokenizer: Any = copy.deepcopy(work.policy.tokenizer)
        tokenizer.chat_template = qwen2_5_chat_template  # SmolLM2 writes ChatML, too; its own knows no tools
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                folder,
                use_cpu=work.policy.model.device.type == "cpu",
                bf16=False,
                per_device_train_batch_size=len(work.questions),
                num_generations=2,
                max_completion_length=PROTOCOL.max_context_tokens,
                max_tool_calling_iterations=PROTOCOL.max_turns,
                report_to="none",
                save_strategy="no",
            )
            self.trainer = PlannedTrainer(
                work.policy.model,
                lambda prompts, completions, **columns: [0.0] * len(prompts),
                config,
                Dataset.from_dict({"prompt": _prompts(work.questions)}),
                processing_class=tokenizer,
                tools=[self.search],
            )

    def search(self, query: str) -> str:
        """Search the passages.

        Args:
            query: What to look for.

        Returns:
            The passages found.
        """
        self.searches += 1
        hits = self.retriever.search([query], PROTOCOL.top_k)[0]
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        return query + render_hits(hits, PROTOCOL, self.sanitize, encode, PROTOCOL.max_observation_tokens)

    def __call__(self, work: Work, seed: int) -> Outcome:
        """One rollout of all questions."""
        torch.manual_seed(seed)
        trainer, self.searches = self.trainer, 0
        trainer.plans, trainer.turn = [work.plans[question.id] for question in work.questions], 0
        trainer._sync_tool_dicts = [{"search": self.search} for _ in work.questions]
        trainer._async_tool_dicts = [{} for _ in work.questions]
        clock = Clock()
        with patch("trl.trainer.grpo_trainer.parse_response", trainer.parse):
            prompts, completions, *_ = trainer._generate(_prompts(work.questions))
        seconds = clock.read()
        sampled = sum(turn.tokens for plan in trainer.plans for turn in plan)
        read = sum(map(len, prompts)) + sum(map(len, completions)) - sampled
        return Outcome(*seconds, sampled, read, self.searches)


def _prompts(questions: list[Question]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question.text}] for question in questions]
