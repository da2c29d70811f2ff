"""Trajectories a second of our engine against Search-R1's procedure, on the same policy and questions.

    python -m scripts.bench.rollout [--questions 16] [--policy DIR_OR_NAME] [--profile_ours true]

ours       the hf engine under `Agent.rollout`: rows keep their cache, and go on one by one
no_stop    Search-R1's procedure (its generation.py): each turn a fresh `generate` over the whole
           text, all live rows in lockstep, left-padded, 500 tokens a turn without a stop at the tags,
           cut after the first tag, encoded again
stop       the same, with `stop_strings` at the tags

Without --policy a random Qwen2 is forced to write a fixed plan: 1 to 4 searches and an answer, 20 to 60
tokens a turn, different for each question, the same plan for all three; each reads three passages of 100
words a search. So they differ in procedure alone, and the policy text is checked to be equal. Without a
stop, the forced model writes on after a search up to the limit, as a model that was never taught to end
its turn there; after an answer it ends the sequence. With --policy nothing is forced, decoding is greedy.
"""

from __future__ import annotations

import asyncio
import cProfile
import os
import platform
import pstats
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM

from agent.engines.base import Sampling
from agent.engines.config import EngineConfig
from agent.engines.hf import HFEngine
from agent.policy import Policy, load_policy
from agent.protocol import SEARCH_R1, Answer
from agent.rollout import Agent
from agent.tools import Call, Search
from data.atlas.passages import render_passages
from data.atlas.world import load_world
from data.objects.plugins import find_plugin
from data.records import Hit, Passage, Question
from retriever_server.client.search_client import SearchClient
from retriever_server.retriever import Query, Retriever

PROTOCOL = replace(SEARCH_R1, chat=False)  # the procedure of Search-R1 on a base model
PASSAGE_WORDS = 100
FORCED = 1e4

Plans = dict[str, list[list[int]]]
"""Question id -> the token ids of each turn."""


@dataclass(frozen=True)
class Task:
    """The input of all procedures."""

    policy: Policy
    questions: list[Question]
    retriever: Retriever
    plans: Plans = field(default_factory=dict)
    """Empty: nothing is forced."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a procedure: the policy's text of each question, and the tokens it sampled for it."""

    texts: list[str]
    searches: int
    sampled_tokens: int
    """Including those that are thrown away."""


class CannedPassages(Retriever):
    """Passages of 100 words of the embedded world, chosen by the query's hash: no time is spent here."""

    generation = "canned"

    def __init__(self, words: Sequence[str], count: int = 500) -> None:
        chunks = [" ".join(words[i * PASSAGE_WORDS : (i + 1) * PASSAGE_WORDS]) for i in range(count)]
        self.passages = [Passage(str(i), text, text.split(" ", 2)[1]) for i, text in enumerate(chunks)]

    def search(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """Any `k` passages; the same for the same query."""
        return [
            [
                Hit(passage, 1.0, self.generation)
                for passage in random.Random(str(query)).sample(self.passages, k)
            ]
            for query in queries
        ]


# ---- the task --------------------------------------------------------------------------------------


def make_task(count: int, policy: str | None, device: str, dtype: str, hidden: int, layers: int) -> Task:
    """The policy, `count` questions, their plans (none with a policy of the caller's) and passages."""
    passages = render_passages(load_world(), 0)
    words = [word for passage in passages for word in passage.text.split()]
    retriever = CannedPassages(words)
    draw = random.Random(0)
    questions = [Question(f"q{i}", f"Which {' '.join(draw.sample(words, 9))}?", ("x",)) for i in range(count)]
    if policy is not None:
        return Task(load_policy(policy, device, dtype), questions, retriever)
    train_tokenizer = find_plugin("examples.seed_policy.seed_policy.train_tokenizer", "bench")
    tokenizer = train_tokenizer([p.text for p in passages], PROTOCOL, 8192)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        eos_token_id=tokenizer.convert_tokens_to_ids("<eos>"),
        pad_token_id=0,  # <pad>, which the tokenizer has first
    )
    model = Qwen2ForCausalLM(config).eval().to(device, getattr(torch, dtype))  # type: ignore[arg-type]
    plans = {
        question.id: [
            tokenizer.encode(turn, add_special_tokens=False)
            for turn in make_turns(words, draw, searches=1 + number % PROTOCOL.max_turns)
        ]
        for number, question in enumerate(questions)
    }
    return Task(Policy(model, tokenizer), questions, retriever, plans)


def make_turns(words: Sequence[str], draw: random.Random, searches: int) -> list[str]:
    """Searches and an answer, each after a thought; 20 to 60 tokens a turn with the bench's tokenizer."""
    turns = [
        PROTOCOL.render_turn(
            " ".join(draw.sample(words, draw.randint(6, 26))), Search(" ".join(draw.sample(words, 4)))
        )
        for _ in range(searches)
    ]
    return [*turns, PROTOCOL.render_turn(" ".join(draw.sample(words, draw.randint(6, 26))), Answer("x"))]


# ---- ours ------------------------------------------------------------------------------------------


class ForcedEngine(HFEngine):
    """The hf engine, its logits overridden to follow the plans where there are any."""

    plans: Plans
    sampled = 0

    async def generate(self, prompt_ids, sampling, trajectory_id, pictures=()):
        self._turns = getattr(self, "_turns", Counter())
        self._turns[trajectory_id] += 1
        return await super().generate(prompt_ids, sampling, trajectory_id, pictures)

    def _sample(self, requests, logits):
        if self.plans:
            wanted = []
            for request in requests:
                turns = self.plans[request.trajectory_id.rsplit("/", 2)[0]]
                wanted.append(turns[self._turns[request.trajectory_id] - 1][len(request.new_ids)])
            logits[torch.arange(len(wanted)), torch.tensor(wanted)] = FORCED
        self.sampled += len(requests)
        super()._sample(requests, logits)


def ours(task: Task) -> Outcome:
    """All questions as coroutines over the hf engine."""
    engine = ForcedEngine(task.policy.model, task.policy.tokenizer, max_rows=len(task.questions))
    engine.plans = task.plans
    client = SearchClient(task.retriever)
    agent = Agent(engine, task.policy.tokenizer, client, PROTOCOL, Sampling(temperature=0))
    done = asyncio.run(agent.rollout(task.questions))
    texts = [trajectory.policy_text for trajectory in done]
    return Outcome(texts, sum(len(t.searches) for t in done), engine.sampled)


# ---- Search-R1's procedure -------------------------------------------------------------------------


class Forcing(LogitsProcessor):
    """Makes each row write its turn; after a search it writes on, after an answer it ends."""

    def __init__(self, turns: list[list[int]], prompt_tokens: int, eos: int, answer_end: int) -> None:
        self.turns, self.prompt_tokens, self.eos, self.answer_end = turns, prompt_tokens, eos, answer_end

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_tokens
        wanted = [self._token(turn, step) for turn in self.turns]
        scores[torch.arange(len(wanted)), torch.tensor(wanted)] = FORCED
        return scores

    def _token(self, turn: list[int], step: int) -> int:
        if step < len(turn):
            return turn[step]
        return self.eos if turn[-1] == self.answer_end else turn[1 + step % 8]  # words of the thought


def lockstep(task: Task, stop: bool) -> Outcome:
    """The rollout loop of Search-R1 over transformers' `generate`."""
    tokenizer = task.policy.tokenizer
    ids = [tokenizer.encode(PROTOCOL.prompt(question.text)) for question in task.questions]
    texts, live, searches, sampled = [""] * len(ids), list(range(len(ids))), 0, 0
    for turn in range(PROTOCOL.max_turns + 1):
        if not live:
            break
        plans = [task.plans[task.questions[i].id][turn] for i in live] if task.plans else []
        written, width = generate(task.policy, [ids[i] for i in live], plans, stop)
        sampled += width * len(live)
        turns = [cut_after_tag(text) for text in tokenizer.batch_decode(written)]
        actions = [PROTOCOL.parse(text) for text in turns]
        queries = [action.argument for action in actions if isinstance(action, Call)]
        found = iter(task.retriever.search(queries, PROTOCOL.top_k) if turn < PROTOCOL.max_turns else [])
        searches += len(queries) if turn < PROTOCOL.max_turns else 0
        for i, text, action in zip(live, turns, actions, strict=True):
            texts[i] += text
            observation = ""
            if isinstance(action, Call):
                passages = [hit.passage for hit in next(found, [])]
                observation = PROTOCOL.render_observation(PROTOCOL.render_passages(passages))
            elif not isinstance(action, Answer):
                observation = PROTOCOL.invalid
            ids[i] += tokenizer.encode(text, add_special_tokens=False)
            ids[i] += tokenizer.encode(observation, add_special_tokens=False)[
                : PROTOCOL.max_observation_tokens
            ]
        live = [i for i, action in zip(live, actions, strict=True) if not isinstance(action, Answer)]
    return Outcome(texts, searches, sampled)


def generate(
    policy: Policy, prompts: list[list[int]], plans: list[list[int]], stop: bool
) -> tuple[list[list[int]], int]:
    """Return what each row wrote, without padding, and how many steps the longest took."""
    tokenizer, device = policy.tokenizer, policy.model.device
    prompts = [ids[-PROTOCOL.max_context_tokens :] for ids in prompts]
    width = max(map(len, prompts))
    pad, eos = _special_ids(policy)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    forcing = [Forcing(plans, width, eos, tokenizer.encode("</answer>")[-1])] if plans else []
    stopping = {"stop_strings": list(PROTOCOL.stop), "tokenizer": tokenizer} if stop else {}
    output = policy.model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=PROTOCOL.max_response_tokens,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList(forcing),
        **stopping,
    )
    new = output[:, width:].tolist()
    return [[token for token in row if token not in (pad, eos)] for row in new], output.shape[1] - width


def _special_ids(policy: Policy) -> tuple[int, int]:
    pad, eos = policy.tokenizer.pad_token_id, policy.tokenizer.eos_token_id
    assert isinstance(eos, int) and isinstance(pad, int), "the procedure pads on the left"
    return pad, eos


def cut_after_tag(text: str) -> str:
    """The text up to the first </search>, else up to the first </answer>, else all of it."""
    for tag in PROTOCOL.stop:
        if tag in text:
            return text.split(tag)[0] + tag
    return text


PROCEDURES: dict[str, Callable[[Task], Outcome]] = {
    "ours": ours,
    "no_stop": lambda task: lockstep(task, stop=False),
    "stop": lambda task: lockstep(task, stop=True),
}

# ---- measuring -------------------------------------------------------------------------------------


def measure(task: Task, repeats: int) -> dict[str, list[float]]:
    """Seconds of each procedure in each repeat; they alternate, after a short warm-up of each."""
    warm = replace(task, questions=task.questions[:2])
    for run in PROCEDURES.values():
        run(warm)
    seconds: dict[str, list[float]] = {name: [] for name in PROCEDURES}
    for repeat in range(repeats):
        outcomes = {}
        for name, run in PROCEDURES.items():
            started = time.perf_counter()
            outcomes[name] = run(task)
            seconds[name].append(time.perf_counter() - started)
            print(f"  repeat {repeat + 1}: {name:<8} {seconds[name][-1]:7.2f} s", file=sys.stderr)
        if task.plans:
            assert outcomes["ours"].texts == outcomes["no_stop"].texts == outcomes["stop"].texts
        if not repeat:
            show_work(outcomes)
    return seconds


def show_work(outcomes: dict[str, Outcome]) -> None:
    """Print what each procedure did."""
    for name, outcome in outcomes.items():
        print(f"{name:<8} {outcome.searches} searches, {outcome.sampled_tokens:,} tokens sampled")


def profile(task: Task) -> None:
    """Print where our procedure spends its time."""
    ours(replace(task, questions=task.questions[:2]))
    profiler = cProfile.Profile()
    profiler.runcall(ours, task)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def hardware() -> str:
    """The machine in a line."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    return f"{os.cpu_count()} CPU cores ({name}), {torch.get_num_threads()} thread(s)"


def main(
    questions: int = 16,
    repeats: int = 3,
    policy: str | None = None,
    hidden: int = 256,
    layers: int = 6,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    profile_ours: bool = False,
    passages: str | None = None,
    sides: tuple[str, ...] = ("hf", "vllm", "trl"),
    trajectories: tuple[int, ...] = (8, 32),
    engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
) -> None:
    """Compare the rollout procedures.

    Args:
        questions: Trajectories a run; all are alive at once in all procedures.
        repeats: Runs of each.
        policy: Folder, hub name or short name; none: a random forced Qwen2.
        hidden: Width of the random policy.
        layers: Of the random policy.
        threads: That torch may use.
        device: cpu or cuda.
        dtype: float32 or bfloat16.
        profile_ours: Print a profile of our procedure instead.
        passages: Folder with corpus.jsonl and dev.jsonl: compare engines over them instead.
        sides: Of hf, vllm and trl: '[hf, vllm]'.
        trajectories: How many at once: '[8, 32]'.
        engine: Of side vllm: where its environment is, or the server that runs already.
    """
    torch.set_num_threads(threads)
    if passages is not None:
        from scripts.bench.rollout_compared import compare

        source = policy or "smollm2"
        print(f"{hardware()}; torch {torch.__version__}; {source}, {dtype}")
        opened = load_policy(source, device, dtype)
        compare(opened, source, Path(passages), trajectories, repeats, sides, engine)
        return
    task = make_task(questions, policy, device, dtype, hidden, layers)
    size = sum(p.numel() for p in task.policy.model.parameters())
    name = f"{policy or 'random Qwen2'}, {size / 1e6:.1f} M parameters, {dtype}"
    print(f"{hardware()}; torch {torch.__version__}; {name}; {questions} questions")
    if profile_ours:
        profile(task)
        return
    rates = {name: questions / statistics.median(s) for name, s in measure(task, repeats).items()}
    for name, rate in rates.items():
        ratio = "" if name == "ours" else f"   ours is {rates['ours'] / rate:.2f} times as fast"
        print(f"{name:<8} {rate:7.3f} trajectories/s{ratio}")


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
