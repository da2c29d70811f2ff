"""The bridge under the real GRPOTrainer, on the CPU: what TRL trains on is what our ledger says."""

import asyncio
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from agent.policy import Policy
from agent.protocol import COMPACT
from agent.trajectory import StopReason
from data.errors import ConfigError, RetrieverUnavailable, RunStopped
from data.records import Question
from examples.trl.search_environment import SearchEnvironment
from retriever_server.client.search_client import SearchClient
from retriever_server.retriever import Retriever
from tests.fakes import byte_tokenizer, tiny_model
from tests.toy import TAGS, bigram_policy

TOY = replace(COMPACT, max_turns=2, top_k=3)


class Watched(GRPOTrainer):
    """Keeps every generation batch: the trajectories, and the tensors made of them."""

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        made = super()._generate_and_score_completions(inputs)
        assert self.model.training == training
        self.batches.append(([row["trajectory"] for row in inputs], made))
        return made


class Down(Retriever):
    """A retriever that nobody answers for."""

    generation, waits = "down", True

    def search(self, queries, k, where=None):
        raise RetrieverUnavailable("down")

    async def ask(self, queries, k):
        """An error for each query."""
        return [RetrieverUnavailable("down")] * len(queries)


def environment(toy, **changes):
    values = {"questions": str(toy / "train.jsonl"), "retriever": str(toy / "index"), "protocol": TOY}
    return SearchEnvironment(**values | changes)


def trainer(env, folder, policy=None, eval_dataset=None, peft_config=None, rewards=("em",), **settings):
    policy = policy or bigram_policy()
    values = {
        "output_dir": str(folder),
        "max_steps": 1,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "bf16": False,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rollout_func is experimental
        made = Watched(
            model=policy.model,
            args=GRPOConfig(**values | settings),
            train_dataset=env.dataset,
            eval_dataset=eval_dataset,
            reward_funcs=env.reward_funcs(*rewards),
            rollout_func=env.rollout_func,
            processing_class=policy.tokenizer,
            peft_config=peft_config,
        )
    made.batches = []
    return made


@pytest.mark.slow
def test_the_policy_learns_in_groups_from_fresh_weights(toy, tmp_path):
    policy = bigram_policy()
    policy.model.requires_grad_(False)
    head = policy.model.get_output_embeddings().weight.requires_grad_()  # what stays a bigram policy
    run = trainer(environment(toy), tmp_path, policy, max_steps=8, learning_rate=0.05)
    run.train()
    assert len(run.batches) == 8
    for step, (trajectories, _) in enumerate(run.batches):
        groups = [[t.question.id for t in trajectories[at : at + 4]] for at in (0, 4, 8)]
        assert [len(set(group)) for group in groups] == [1, 1, 1] and len({g[0] for g in groups}) == 3
        assert {s.weights_version for t in trajectories for s in t.segments if s.logprobs} == {step}
    means = [row["rewards/em/mean"] for row in run.state.log_history if "reward" in row]
    assert sum(means[:2]) / 2 < 0.5 < 0.7 < sum(means[-2:]) / 2  # A has probability .3 at first
    assert {"rollout/searches", "rollout/valid_format", "stop/search_failed"} <= run.state.log_history[
        0
    ].keys()
    assert torch.isfinite(head).all()


def test_what_is_trained_is_what_was_sampled_and_masked_where_it_was_not(toy, tmp_path):
    tokenizer = byte_tokenizer(*TAGS)
    # Random weights, and dropout that would show in the log-probs if it were on while sampling.
    policy = Policy(tiny_model("qwen2", len(tokenizer), attention_dropout=0.5), tokenizer)
    settings = {"temperature": 0.7, "steps_per_generation": 2, "gradient_accumulation_steps": 4}
    env = environment(toy, protocol=replace(TOY, max_response_tokens=12))
    run = trainer(env, tmp_path, policy, learning_rate=1e-9, **settings)
    run.train()
    assert [len(trajectories) for trajectories, _ in run.batches] == [8, 8]
    assert run.batches[0][0] != run.batches[1][0]
    for trajectories, made in run.batches:
        for row, trajectory in enumerate(trajectories):
            real = made["prompt_mask"][row].sum() + made["completion_mask"][row].sum()
            assert real == len(trajectory.token_ids)
            start, length = len(trajectory.segments[0].token_ids), int(made["completion_mask"][row].sum())
            assert made["completion_ids"][row, :length].tolist() == trajectory.token_ids[start:]
            mask = made["tool_mask"][row, :length]
            assert mask.tolist() == trajectory.loss_mask[start:]
            assert 0 in mask and 1 in mask
            sampled = made["sampling_per_token_logps"][row, :length]
            assert sampled.tolist() == pytest.approx([each or 0.0 for each in trajectory.logprobs[start:]])
            assert not sampled[mask == 0].any()
        ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
        attention = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
        width = made["completion_ids"].shape[1]
        with torch.no_grad():
            scored, *_ = run._get_per_token_logps_and_entropies(run.model.eval(), ids, attention, width)
        trained = (made["tool_mask"] * made["completion_mask"]).bool()
        torch.testing.assert_close(
            scored[trained], made["sampling_per_token_logps"][trained], atol=1e-4, rtol=0
        )


def test_a_failed_search_is_outside_the_loss_and_outside_its_groups_mean(toy, tmp_path, caplog):
    env = environment(toy, retriever=SearchClient(Down()), max_failed_share=1.0)
    run = trainer(env, tmp_path, rewards=("em", "format"), reward_weights=[1.0, 0.5])
    run.train()
    [(trajectories, made)] = run.batches
    failed = torch.tensor([t.stop_reason is StopReason.SEARCH_FAILED for t in trajectories])
    assert 0 < failed.sum() < len(failed)
    trained = (made["tool_mask"] * made["completion_mask"]).sum(1)
    assert ((trained == 0) == failed).all()
    [em] = env.reward_funcs("em")
    rewards = em(trajectory=trajectories)
    assert [reward is None for reward in rewards] == failed.tolist()
    # advantage 0 for those that failed; TRL took the others' mean without them
    advantages = made["advantages"]
    assert not advantages[failed].any()
    for at in range(0, len(failed), 4):
        rest = advantages[at : at + 4][~failed[at : at + 4]]
        assert rest.sum().abs() < 1e-4
    assert f"{failed.sum()} of 12 trajectories lost (RetrieverUnavailable: down)" in caplog.text
    assert run.state.log_history[0]["stop/search_failed"] == pytest.approx(failed.float().mean().item())


def test_too_many_failed_searches_stop_the_training(toy, tmp_path):
    env = environment(toy, retriever=SearchClient(Down()))
    with pytest.raises(RunStopped, match=r"of 12 trajectories lost .*: down.*; allowed: 10%; go on from"):
        trainer(env, tmp_path).train()


def test_a_prompt_without_room_for_an_answer_gives_one_masked_token(toy, tmp_path):
    run = trainer(environment(toy, protocol=replace(TOY, max_context_tokens=1)), tmp_path)
    run.train()
    [(_, made)] = run.batches
    assert made["completion_ids"].shape == (12, 1) and not made["tool_mask"].any()


@pytest.mark.parametrize(
    "adapters",
    [None, pytest.param(LoraConfig(r=4, target_modules="all-linear"), marks=pytest.mark.slow)],
    ids=["full", "lora"],
)
def test_it_runs_in_a_notebook_with_the_precision_that_trl_prefers(toy, tmp_path, adapters):
    run = trainer(environment(toy), tmp_path, bf16=True, peft_config=adapters)

    async def cell():
        run.train()

    asyncio.run(cell())
    [(trajectories, _)] = run.batches
    assert all(t.segments[1].logprobs for t in trajectories)


def test_evaluation_samples_other_questions(toy, tmp_path):
    env = environment(toy)
    dev = env.add_questions([Question(f"dev{i}", f"dev {i}?", ("C",)) for i in range(2)])
    run = trainer(env, tmp_path, eval_dataset=dev, num_generations_eval=2, per_device_eval_batch_size=4)
    measured = run.evaluate()
    [(trajectories, _)] = run.batches
    assert [t.question.id for t in trajectories] == ["dev0", "dev0", "dev1", "dev1"]
    assert 0 <= measured["eval_rewards/em/mean"] <= 1
    assert len(env.dataset) == 12


def test_questions_of_one_text_are_told_apart(toy):
    twins = [Question("nq/1", "Who?", ("A",)), Question("tqa/1", "Who?", ("B",))]
    env = environment(toy, questions=twins)
    assert env.dataset["prompt"] == ["Who?", "Who? (tqa/1)"]
    assert [env._questions[prompt] for prompt in env.dataset["prompt"]] == twins


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mask_truncated_completions", True),
        ("use_vllm", True),
        ("top_p", 0.9),
        ("top_k", 5),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("generation_kwargs", {"do_sample": False}),
        ("temperature", 0.0),
    ],
)
def test_settings_that_would_falsify_the_loss_are_refused(toy, tmp_path, setting, value):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{setting: value})
    run = SimpleNamespace(args=args, is_fsdp_enabled=False, is_deepspeed_enabled=False)
    with pytest.raises(ConfigError, match=rf"GRPOConfig.{setting} = .*: must be"):
        environment(toy).rollout_func([], run)


def test_what_the_environment_does_not_know_is_refused(toy, tmp_path):
    env = environment(toy)
    with pytest.raises(ConfigError, match="must be one of"):
        env.reward_funcs("emm")
    with pytest.raises(ConfigError, match=r"prompt 'Why\?': must be of .dataset"):
        env.rollout_func(["Why?"], trainer(env, tmp_path))
    with pytest.raises(ConfigError, match=r"max_failed_share = 2: must be in"):
        environment(toy, max_failed_share=2)
