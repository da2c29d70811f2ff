"""Every setting of a run changes what it says: shown here, or where SHOWN_IN says."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from agent.engines.hf import HFEngine
from agent.protocol import PROTOCOLS
from data.checkpoint import list_checkpoints
from data.jsonl import read_jsonl
from data.questions import load_questions
from data.run_dir import read_metrics
from data.settings import LoraConfig
from rl import trainer
from rl.algorithm.presets import AlgorithmConfig
from rl.config import ProtocolConfig, RolloutConfig, SentinelConfig, TrainConfig
from rl.rollouts import Rollouts
from scripts import wiring
from scripts.train import train
from tests.rl.learner.learning import configure, learn, make_groups, make_learner
from tests.toy import toy_config


@pytest.fixture
def engines(monkeypatch):
    """Every engine with the samplings that it was asked for."""
    found: dict[HFEngine, list] = {}
    generate = HFEngine.generate

    async def spy(self, prompt_ids, sampling, *rest):
        found.setdefault(self, []).append(sampling)
        return await generate(self, prompt_ids, sampling, *rest)

    monkeypatch.setattr(HFEngine, "generate", spy)
    return found


@pytest.fixture
def collected(monkeypatch):
    """Return what each step learned from."""
    found, collect = [], Rollouts.collect

    async def spy(self, *given):
        found.append(await collect(self, *given))
        return found[-1]

    monkeypatch.setattr(Rollouts, "collect", spy)
    return found


def small(**changes) -> RolloutConfig:
    return RolloutConfig(**{"questions_per_step": 2, "group_size": 3, "max_failed_share": 1.0, **changes})


STILL = AlgorithmConfig(learning_rate=1e-9)
"""An update that changes no answer."""


def test_trajectories_are_sampled_as_rollout_says_and_dev_questions_greedily(toy, tmp_path, engines):
    rollout = small(temperature=0.8, top_p=0.9, top_k=40, renormalise_logprobs=True, max_rows=3)
    train(toy_config(toy, tmp_path, steps=1, rollout=rollout, algorithm=STILL, eval_every=1))
    ((engine, samplings),) = engines.items()
    assert engine.max_rows == 3
    said = [(s.temperature, s.top_p, s.top_k, s.renormalise) for s in samplings]
    first_greedy = said.index((0, 1.0, 0, False))
    assert set(said[:first_greedy]) == {(0.8, 0.9, 40, True)} and set(said[first_greedy:]) == {
        (0, 1.0, 0, False)
    }
    (row,) = [row for row in read_metrics(tmp_path) if "dev/em" in row]
    records = list(read_jsonl(tmp_path / "evaluations" / "dev-000001" / "trajectories.jsonl"))
    assert len(records) == 12 and len({r["answer"] for r in records}) == 1  # sampled, it says A, B or C
    assert row["dev/em"] == sum(r["em"] for r in records) / 12
    assert row["dev/searches"] == sum(len(r["searches"]) for r in records) / 12


def test_kept_rollouts_are_all_that_a_step_learned_from(toy, tmp_path, collected):
    train(toy_config(toy, tmp_path, steps=5, rollout=small(), keep_rollouts_every=2))
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [file.name for file in files] == ["step-000002-0.jsonl", "step-000004-0.jsonl"]
    for file, step in zip(files, (collected[1], collected[3]), strict=True):
        rows = list(read_jsonl(file))
        pairs = [(g, t, r) for g in step.groups for t, r in zip(g.trajectories, g.rewards, strict=True)]
        assert len(rows) == 6
        for row, (group, trajectory, reward) in zip(rows, pairs, strict=True):
            assert (row["group"], row["reward"]) == (group.number, reward.total)
            assert (row["id"], row["answer"]) == (trajectory.question.id, trajectory.answer)
            assert "token_ids" not in row["segments"][0]
    train(toy_config(toy, tmp_path / "none", rollout=small()))
    assert not (tmp_path / "none" / "rollouts").exists()


@pytest.mark.parametrize(
    ("settings", "saved", "evaluated"),
    [
        pytest.param({"save_every": 2, "keep_checkpoints": 9}, [2, 4, 5], [], marks=pytest.mark.slow),
        pytest.param({"save_every": 2, "keep_checkpoints": 1}, [5], [], marks=pytest.mark.slow),
        pytest.param({"save_every": 50}, [5], [], marks=pytest.mark.slow),
        ({"save_every": 50, "eval_every": 2, "keep_checkpoints": 9}, [2, 4, 5], [2, 4, 5]),
    ],
)
def test_checkpoints_and_evaluations_come_when_they_are_due(toy, tmp_path, settings, saved, evaluated):
    train(toy_config(toy, tmp_path, steps=5, rollout=small(), algorithm=STILL, **settings))
    assert [found.step for found in list_checkpoints(tmp_path / "checkpoints")] == saved
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "reward/mean" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "dev/em" in row] == evaluated


def test_only_so_many_dev_questions_are_asked(toy, tmp_path):
    train(toy_config(toy, tmp_path, steps=1, rollout=small(), eval_every=1, eval_limit=5))
    records = read_jsonl(tmp_path / "evaluations" / "dev-000001" / "trajectories.jsonl")
    assert sorted(record["id"] for record in records) == [f"dev{n}" for n in range(5)]


def test_the_seed_decides_which_questions_come_and_what_is_sampled(toy, tmp_path, collected):
    for run, seed in enumerate((0, 0, 7)):
        train(toy_config(toy, tmp_path / str(run), steps=1, rollout=small(group_size=8), seed=seed))
    one, again, other = ([t for g in each.groups for t in g.trajectories] for each in collected)
    assert [t.token_ids for t in one] == [t.token_ids for t in again]
    assert [t.question for t in one] != [t.question for t in other]
    answers = [[t.token_ids[-2] for t in run] for run in (one, other)]
    assert answers[0] != answers[1]


def test_rewards_are_weighed(toy, tmp_path):
    train(toy_config(toy, tmp_path, steps=3, rollout=small(), rewards={"em": 2.0, "search_cost": 0.25}))
    for row in read_metrics(tmp_path):
        assert row["reward/mean"] == pytest.approx(2 * row["reward/em"] + 0.25 * row["reward/search_cost"])
    assert any(row["reward/search_cost"] < 0 for row in read_metrics(tmp_path))


def test_rates_are_of_all_that_was_drawn(toy, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: float(next(clock)))
    train(toy_config(toy, tmp_path, steps=1, rollout=small()))
    (row,) = read_metrics(tmp_path)
    times = [row[f"time/{name}_seconds"] for name in ("rollout", "update", "step")]
    assert times[0] + times[1] == times[2] and all(time > 0 for time in times)
    assert row["time/tokens_per_second"] == pytest.approx(6 * row["rollout/total_tokens"] / times[2])
    assert row["time/trajectories_per_second"] == pytest.approx(6 / times[0])


def test_the_deadline_of_a_search_and_the_kind_of_run_reach_the_client(toy, tmp_path, monkeypatch):
    asked, connect = [], wiring.connect
    monkeypatch.setattr(wiring, "connect", lambda *given: asked.append(given) or connect(*given))
    train(toy_config(toy, tmp_path, steps=1, rollout=small(retriever_deadline_seconds=7.5)))
    assert asked == [(str(toy / "index"), 7.5)]


def test_splits_limit_and_normalizer_reach_the_reader_of_questions(toy, tmp_path, monkeypatch):
    asked, load = [], load_questions

    def spy(source, split=None, limit=None, normalizer=None):
        asked.append((source, split, limit, normalizer))
        return load(source, None, limit, normalizer)

    monkeypatch.setattr("scripts.train.load_questions", spy)
    given = {"split": "a", "dev_split": "b", "eval_limit": 3, "normalizer": "unicode"}
    train(toy_config(toy, tmp_path, steps=1, rollout=small(), **given))
    train_file, dev_file = str(toy / "train.jsonl"), str(toy / "dev.jsonl")
    assert asked == [(train_file, "a", None, "unicode"), (dev_file, "b", 3, "unicode")]


def test_weights_are_of_the_type_that_is_asked_for(toy, tmp_path):
    from safetensors.torch import load_file

    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        train(toy_config(toy, out, steps=1, rollout=small(), dtype=dtype, algorithm=STILL))
        state = load_file(out / "checkpoints" / "step-000001" / "model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}


def test_without_determinism_kernels_are_free(toy, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **_: seen.append(on))
    for deterministic in (True, False):
        config = toy_config(toy, tmp_path / str(deterministic), steps=1, rollout=small())
        train(replace(config, deterministic=deterministic))
        assert (True in seen) == deterministic
        seen.clear()


@pytest.mark.parametrize(("packing", "tokens"), [(True, 30), (True, 16384), (False, 50)])
def test_a_forward_pass_has_no_more_tokens_than_a_micro_batch_may(packing, tokens):
    learner = make_learner(replace(configure(), packing=packing, micro_batch_tokens=tokens))
    shapes = []
    learner.model.base_model.register_forward_pre_hook(
        lambda _, given, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    groups = make_groups(5)
    learn(learner, groups)
    longest = max(len(t.token_ids) for g in groups for t in g.trajectories)
    assert all(rows * width <= max(tokens, longest) for rows, width in shapes)
    assert all(rows == 1 for rows, _ in shapes) if packing else any(rows > 1 for rows, _ in shapes)
    assert (len(shapes) == 1) == (tokens == 16384)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_chosen_by_name_and_each_of_its_limits_by_itself(name):
    policy = "atlas"  # which speaks compact
    assert wiring.make_protocol(ProtocolConfig(), policy) == PROTOCOLS["compact"]
    assert wiring.make_protocol(ProtocolConfig(name=name), policy) == PROTOCOLS[name]
    unquoted = wiring.make_protocol(ProtocolConfig(name=name, titles="unquoted"), policy)
    assert unquoted.titles == "unquoted"
    limits = ("max_turns", "top_k", "max_response_tokens", "max_observation_tokens", "max_context_tokens")
    for limit in limits:
        given = ProtocolConfig(name=name, **{limit: 17})  # type: ignore[arg-type]
        assert wiring.make_protocol(given, policy) == replace(PROTOCOLS[name], **{limit: 17})


HERE = "test_settings.py"
SHOWN_IN: dict[type, dict[str, str]] = {
    RolloutConfig: {
        HERE: "max_rows retriever_deadline_seconds",
        "test_collecting.py": "questions_per_step group_size max_failed_share max_staleness "
        "mixed_generations",
        "learner/test_learning.py": "temperature top_p top_k renormalise_logprobs",
        "test_asynchrony.py": "deadline_seconds",
        "test_question_mix.py": "kind_weights last_kind_weights",
    },
    ProtocolConfig: {
        HERE: "name titles max_turns top_k max_response_tokens max_observation_tokens max_context_tokens",
        "../agent/test_prompt.py": "chat_template_kwargs",
        "../agent/test_environment.py": "tools",
        "../agent/test_answer_form.py": "answer_form may_abstain",
        "../agent/test_rollout.py": "query_style",
    },
    SentinelConfig: {
        "test_sentinel.py": "action patience baseline_steps min_entropy_share max_entropy_share "
        "min_valid_share max_correct_logprob_fall max_grad_norm_ratio max_sampler_difference "
        "preserve_coefficient",
        "test_trainer.py": "max_roll_backs",
    },
    LoraConfig: {"learner/test_lora.py": "rank alpha target_modules", "test_trainer.py": "dropout"},
    TrainConfig: {
        HERE: "steps save_every eval_every eval_limit keep_checkpoints keep_rollouts_every split dev_split "
        "normalizer micro_batch_tokens packing seed rewards deterministic dtype rollout protocol",
        "learner/test_learning.py": "algorithm mask_observations",
        "test_trainer.py": "gradient_checkpointing resume sentinel lora dev_questions",
        "test_config.py": "preset policy questions retriever out device",
        "test_estimate.py": "sharding",
        "../agent/evaluation/test_judge.py": "judge",
        "test_weight_sync.py": "engine",
        "../scripts/test_train.py": "wandb dry_run",
        "../scripts/test_train_on_ray.py": "ray",
    },
}


@pytest.mark.parametrize("settings", SHOWN_IN, ids=lambda settings: settings.__name__)
def test_no_setting_is_without_a_test(settings):
    shown = [(file, name) for file, names in SHOWN_IN[settings].items() for name in names.split()]
    assert sorted(name for _, name in shown) == sorted(field.name for field in fields(settings))
    for file, name in shown:
        assert name in (Path(__file__).parent / file).read_text(), f"{file} says nothing of {name}"
