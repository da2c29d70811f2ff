"""The trainer on a policy small enough to watch: it learns, resumes bit for bit, and trains on no failure."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from agent.trajectory import StopReason
from data.checkpoint import best_checkpoint, latest_checkpoint, list_checkpoints
from data.errors import RetrieverUnavailable, RunStopped
from data.jsonl import write_jsonl
from data.run_dir import read_metrics, read_run
from data.settings import LoraConfig
from rl import trainer
from rl.algorithm.losses import SURROGATES, value_loss
from rl.algorithm.presets import AlgorithmConfig, preset_fields
from rl.config import ProtocolConfig, RolloutConfig, SentinelConfig
from rl.learner.learner import Learner
from rl.sentinel import Sentinel, Verdict
from scripts.train import train
from scripts.wiring import open_client
from tests.toy import toy_config


class Killed(BaseException):
    """Ends a run as a kill does: nothing of it is caught, nothing is saved."""


def kill_at(step):
    def on_step(now):
        if now == step:
            raise Killed

    return on_step


def weights(out, step):
    return AutoModelForCausalLM.from_pretrained(out / "checkpoints" / f"step-{step:06d}").state_dict()


def assert_same_weights(out, other, step):
    one, two = weights(out, step), weights(other, step)
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()


def training_rows(out):
    return [row for row in read_metrics(out) if "reward/mean" in row]


def test_reward_rises_to_where_the_answer_is_known(toy, tmp_path):
    brief = ProtocolConfig(max_turns=2, top_k=3, max_response_tokens=12)
    rollout = RolloutConfig(questions_per_step=4, group_size=16)
    learning = {"steps": 9, "algorithm": AlgorithmConfig(learning_rate=1e-2)}
    train(toy_config(toy, tmp_path, protocol=brief, rollout=rollout, **learning))
    rewards = [row["reward/mean"] for row in training_rows(tmp_path)]
    assert rewards[0] < 0.5  # the policy says A with probability .3
    assert sum(rewards[-3:]) / 3 > 0.6


def test_every_number_that_is_promised_is_logged(toy, tmp_path):
    algorithm = AlgorithmConfig(kl_coefficient=0.1, updates_per_rollout=3)
    train(toy_config(toy, tmp_path, steps=1, eval_every=1, algorithm=algorithm))
    first, dev = read_metrics(tmp_path)
    promised = {
        "reward": "mean em group_std",
        "rollout": "em searches valid_format invalid_actions policy_tokens total_tokens groups",
        "policy": "loss entropy clip_fraction kl grad_norm sampler_difference",
        "time": "rollout_seconds update_seconds step_seconds tokens_per_second trajectories_per_second",
    }
    for group, names in promised.items():
        assert not {f"{group}/{name}" for name in names.split()} - first.keys()
    assert 0 <= first["rollout/zero_variance_groups"] <= 1
    assert sum(first[f"stop/{reason}"] for reason in StopReason) == pytest.approx(1)
    assert first["policy/sampler_difference"] < 1e-4
    assert dev.keys() == {"step", "dev/em", "dev/searches", "time/evaluate_seconds"}


def test_a_checkpoint_loads_as_it_is(toy, tmp_path):
    train(toy_config(toy, tmp_path, steps=1))
    folder = best_checkpoint(tmp_path / "checkpoints")[0].path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(toy / "policy").state_dict()
    assert any(not torch.equal(start[name], value) for name, value in model.state_dict().items())
    assert tokenizer.encode("<think>") == AutoTokenizer.from_pretrained(toy / "policy").encode("<think>")
    assert json.loads((folder / "sleuth.json").read_text()) == {"protocol": "compact"}


@pytest.mark.parametrize(
    ("preset", "lora"),
    [
        pytest.param("grpo", 0, marks=pytest.mark.slow),
        pytest.param("search_r1_ppo", 0, marks=pytest.mark.slow),
        pytest.param("dapo", 0, marks=pytest.mark.slow),
        ("search_r1_ppo", 4),
    ],
    ids=str,
)
def test_a_step_and_one_more_are_two(toy, tmp_path, preset, lora):
    """Policy, reference, critic, adapters with dropout, optimisers, warm-up, the place in the questions."""
    algorithm = AlgorithmConfig(
        learning_rate=4e-3, critic_learning_rate=1e-2, warmup_steps=3, **preset_fields(preset)
    )
    adapters = LoraConfig(rank=lora, dropout=0.1)
    config = toy_config(toy, tmp_path / "whole", algorithm=algorithm, lora=adapters)
    train(config)
    train(replace(config, out=str(tmp_path / "halves"), steps=1))
    torch.manual_seed(99)
    random.seed(99)  # another process has other global generators
    train(replace(config, out=str(tmp_path / "halves"), resume=True))
    assert_same_weights(tmp_path / "whole", tmp_path / "halves", 2)
    for one, two in zip(*(training_rows(tmp_path / run) for run in ("whole", "halves")), strict=True):
        assert {k: v for k, v in one.items() if "time/" not in k}.items() <= two.items()


@pytest.mark.slow
def test_steps_after_the_last_checkpoint_are_done_again_and_logged_once(toy, tmp_path):
    config = toy_config(toy, tmp_path / "whole", steps=4, save_every=2)
    train(config)
    killed = replace(config, out=str(tmp_path / "killed"))
    with pytest.raises(Killed):
        train(killed, on_step=kill_at(3))
    assert latest_checkpoint(tmp_path / "killed" / "checkpoints").step == 2
    train(killed)
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == [1, 2, 3, 4]
    assert_same_weights(tmp_path / "whole", tmp_path / "killed", 4)
    assert read_run(tmp_path / "killed")["status"] == "finished"


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_anew(toy, tmp_path):
    config = toy_config(toy, tmp_path, steps=3, save_every=3)
    with pytest.raises(Killed):
        train(config, on_step=kill_at(2))
    train(config)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_the_best_checkpoint_on_dev_outlives_newer_ones(toy, tmp_path, monkeypatch):
    scripted = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.1, 5: 0.3}

    async def evaluate(questions, rollout, folder, settings):
        assert len(questions) == 12
        write_jsonl(folder / "trajectories.jsonl", [])
        return {"em": {"mean": scripted[int(folder.name[-1])]}, "searches_per_question": 1.0}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    train(toy_config(toy, tmp_path, steps=5, eval_every=1, keep_checkpoints=1))
    best = best_checkpoint(tmp_path / "checkpoints")
    assert best and (best[0].step, best[1]) == (2, 0.5)  # of two as good, the earlier
    assert [found.step for found in list_checkpoints(tmp_path / "checkpoints")] == [2, 5]


def test_without_evaluation_no_dev_question_is_asked_and_the_last_step_is_the_best(toy, tmp_path):
    train(toy_config(toy, tmp_path, dev_questions=None))
    assert best_checkpoint(tmp_path / "checkpoints")[0].step == 2
    train(toy_config(toy, tmp_path / "unused"))  # dev questions there are, but no evaluation
    assert not (tmp_path / "unused" / "evaluations").exists()


def test_an_evaluation_that_was_cut_short_is_made_up_for(toy, tmp_path, monkeypatch):
    config = toy_config(toy, tmp_path, steps=2, eval_every=2)
    evaluate = trainer.evaluate

    async def stopped(*_):
        raise RunStopped("the retriever is gone")

    monkeypatch.setattr(trainer, "evaluate", stopped)
    with pytest.raises(RunStopped):
        train(config)
    assert latest_checkpoint(tmp_path / "checkpoints").step == 2
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    for _ in range(2):  # and only once
        train(config)
        assert [row["step"] for row in read_metrics(tmp_path) if "dev/em" in row] == [2]
        assert best_checkpoint(tmp_path / "checkpoints")[0].step == 2


class Unreliable:
    """A client whose searches fail where `fails` says so, by their number."""

    def __init__(self, toy, fails):
        self.inner, self.fails, self.asked = open_client(str(toy / "index")), fails, -1

    async def search(self, query, k):
        self.asked += 1
        if self.fails(self.asked):
            raise RetrieverUnavailable("nobody answers")
        return await self.inner.search(query, k)

    def query_style(self):
        return self.inner.query_style()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.inner.close()


@pytest.fixture
def trained(monkeypatch):
    """The batches that reach the learner."""
    batches, update = [], Learner.learn

    def spy(self, collected, step):
        if collected.count:
            batches.append([trajectory for group in collected.groups for trajectory in group.trajectories])
        return update(self, collected, step)

    monkeypatch.setattr(Learner, "learn", spy)
    return batches


def test_a_group_with_a_failed_search_is_left_out(toy, tmp_path, trained, caplog):
    config = toy_config(toy, tmp_path, steps=3)
    train(config, Unreliable(toy, lambda number: number == 1))
    assert [len(batch) for batch in trained] == [8, 12, 12]
    assert all(t.stop_reason is not StopReason.SEARCH_FAILED for batch in trained for t in batch)
    assert all(search.hits for batch in trained for t in batch for search in t.searches)
    rows = training_rows(tmp_path)
    assert [row["stop/search_failed"] for row in rows] == [pytest.approx(1 / 12), 0, 0]
    assert [row["rollout/groups"] for row in rows] == [2, 3, 3]
    assert "1 of 12 trajectories lost to RetrieverUnavailable: nobody answers" in caplog.text


def test_a_step_whose_every_group_lost_a_search_changes_nothing(toy, tmp_path, trained):
    rollout = RolloutConfig(questions_per_step=1, group_size=4, max_failed_share=1.0)
    train(toy_config(toy, tmp_path, steps=1, rollout=rollout), Unreliable(toy, lambda number: True))
    assert trained == []
    (row,) = read_metrics(tmp_path)
    assert row["rollout/groups"] == 0 and row["stop/search_failed"] > 0
    start = AutoModelForCausalLM.from_pretrained(toy / "policy").state_dict()
    assert all(torch.equal(start[name], value) for name, value in weights(tmp_path, 1).items())


@pytest.mark.slow
def test_too_many_failures_stop_the_run_which_goes_on_as_if_nothing_had_been(toy, tmp_path, trained):
    train(toy_config(toy, tmp_path / "whole", steps=4))
    config = toy_config(toy, tmp_path / "stopped", steps=4)
    trained.clear()
    client = Unreliable(toy, lambda number: len(trained) == 2)
    said = (
        r"searches or rewards failed in \d+ of 12 trajectories \(allowed: 10%; RetrieverUnavailable: nobody "
        r"answers\); the state before this step is saved in .*: start the same command again to go on"
    )
    with pytest.raises(RunStopped, match=said):
        train(config, client)
    assert read_run(tmp_path / "stopped")["status"] == "stopped" and len(trained) == 2
    train(config)
    assert [batch[0].segments[1].weights_version for batch in trained] == [0, 1, 2, 3]
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped", 4)


def test_gradient_checkpointing_recomputes_and_changes_no_weight(toy, tmp_path, monkeypatch):
    passes = []
    forward = Qwen2DecoderLayer.forward

    def counted(self, *args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", counted)
    with_gradient = []
    for checkpointing in (False, True):
        passes.clear()
        out = tmp_path / str(checkpointing)
        train(toy_config(toy, out, steps=2, gradient_checkpointing=checkpointing))
        with_gradient.append(sum(passes))
    assert with_gradient[1] == 2 * with_gradient[0] > 0
    assert_same_weights(tmp_path / "False", tmp_path / "True", 2)


@pytest.mark.slow
def test_observations_can_be_put_into_the_loss(toy, tmp_path):
    for masked in (True, False):
        train(toy_config(toy, tmp_path / str(masked), steps=1, mask_observations=masked))
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "True", tmp_path / "False", 1)


@pytest.mark.parametrize(
    "spoil",
    [lambda loss: loss * math.nan, pytest.param(lambda loss: loss + math.inf, marks=pytest.mark.slow)],
    ids=["nan", "inf"],
)
def test_a_loss_that_is_not_finite_never_reaches_the_weights(toy, tmp_path, monkeypatch, caplog, spoil):
    """The loss of policy or critic, also where its gradient would be finite; the next step learns again."""
    steps, update = [], Learner.learn

    def spy(self, collected, step):
        steps.append(step)
        return update(self, collected, step)

    def spoiled(loss_of):
        return lambda *given: spoil(loss_of(*given)) if steps[-1] == 1 else loss_of(*given)

    monkeypatch.setattr(Learner, "learn", spy)
    monkeypatch.setitem(SURROGATES, "ppo", spoiled(SURROGATES["ppo"]))
    monkeypatch.setattr("rl.learner.learner.value_loss", spoiled(value_loss))
    algorithm = AlgorithmConfig(learning_rate=1e-2, critic_learning_rate=1e-2, **preset_fields("ppo"))
    train(toy_config(toy, tmp_path, steps=3, save_every=1, keep_checkpoints=3, algorithm=algorithm))
    folders = [tmp_path / "checkpoints" / f"step-{step:06d}" for step in (1, 2, 3)]
    for file in ("model.safetensors", "critic/model.safetensors"):
        first, second, third = (load_file(folder / file) for folder in folders)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(second[name], third[name]) for name in first)
        assert all(torch.isfinite(value).all() for value in third.values())
    assert [row["policy/loss"] is None for row in read_metrics(tmp_path)] == [False, True, False]
    assert "sentinel: step 2: policy/loss is" in caplog.text


COLLAPSE = AlgorithmConfig(learning_rate=50.0)
"""One update of this size, and the policy writes noise."""


def healthy_then_collapsing(toy, out, **sentinel):
    """The configuration of a run whose first three steps went well, and whose next update is a disaster."""
    settings = {
        "algorithm": AlgorithmConfig(learning_rate=1e-3),
        "sentinel": SentinelConfig(baseline_steps=3, **sentinel),
        "protocol": ProtocolConfig(max_turns=2, top_k=3, max_response_tokens=12),  # of noise, no more
        "rollout": RolloutConfig(questions_per_step=2, group_size=3),
    }
    config = toy_config(toy, out, steps=3, eval_every=1, keep_checkpoints=9, **settings)
    train(config)
    return replace(config, steps=9, algorithm=COLLAPSE, resume=True)


@pytest.fixture
def scripted_evaluation(monkeypatch):
    """Dev EM by step: the third is the best."""

    async def evaluate(questions, rollout, folder, settings):
        em = {1: 0.1, 2: 0.2, 3: 0.3}.get(int(folder.name.removeprefix("dev-")), 0.0)
        write_jsonl(folder / "trajectories.jsonl", [])
        return {"em": {"mean": em}, "searches_per_question": 1.0}

    monkeypatch.setattr(trainer, "evaluate", evaluate)


@pytest.mark.slow
def test_a_collapse_warns_then_stops_the_run_with_its_numbers_and_its_state(
    toy, tmp_path, caplog, scripted_evaluation
):
    config = healthy_then_collapsing(toy, tmp_path, action="stop", patience=2)
    assert "sentinel" not in caplog.text
    for last in (6, 8):  # the same command goes on from there, for as long as the patience is
        said = rf"step {last}: rollout/valid_format 0 is below 0\.\d+ \(min_valid_share 0\.5, .*saved in"
        with pytest.raises(RunStopped, match=said):
            train(config)
        assert f"sentinel: step {last - 1}: rollout/valid_format 0 is below" in caplog.text
        assert latest_checkpoint(tmp_path / "checkpoints").step == training_rows(tmp_path)[-1]["step"] == last
        assert read_run(tmp_path)["status"] == "stopped"


@pytest.mark.slow
def test_a_collapse_goes_back_to_the_best_checkpoint_but_not_for_ever(
    toy, tmp_path, caplog, scripted_evaluation
):
    """Resumed or not: a roll-back is part of the state."""
    said = "rolled back 2 times already; the state is saved in"
    for run, killed in ((tmp_path / "whole", []), (tmp_path / "killed", [5, 7])):
        config = healthy_then_collapsing(toy, run, action="roll_back", patience=1, max_roll_backs=2)
        for step in killed:
            with pytest.raises(Killed):
                train(config, on_step=kill_at(step))
        with pytest.raises(RunStopped, match=said):
            train(config)
        assert [row["step"] for row in training_rows(run)] == list(range(1, 10))
        best, *back = (weights(run, step) for step in (3, 5, 7))
        assert all(torch.equal(each[name], value) for each in back for name, value in best.items())
    assert caplog.text.count("going back to the weights of step 3") == 4
    assert_same_weights(tmp_path / "whole", tmp_path / "killed", 9)


def test_a_roll_back_without_a_checkpoint_to_go_back_to_stops_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Sentinel, "watch", lambda *_: Verdict(["step 1: too much"], "roll_back"))
    sentinel = SentinelConfig(action="roll_back")
    with pytest.raises(RunStopped, match="sentinel: step 1: too much; no best checkpoint yet; the state is"):
        train(toy_config(toy, tmp_path, eval_every=2, sentinel=sentinel))
    assert latest_checkpoint(tmp_path / "checkpoints").step == 1


@pytest.mark.slow
def test_a_warning_is_a_line_in_the_log_and_changes_nothing(toy, tmp_path, monkeypatch, caplog):
    train(toy_config(toy, tmp_path / "calm"))
    monkeypatch.setattr(Sentinel, "watch", lambda _, step, metrics: Verdict([f"step {step}: much"], "warn"))
    train(toy_config(toy, tmp_path / "warned"))
    assert "sentinel: step 1: much" in caplog.text and "sentinel: step 2: much" in caplog.text
    assert_same_weights(tmp_path / "calm", tmp_path / "warned", 2)
