"""Configurations of Search-R1 and verl as recipes: the values they mean, and what has no counterpart."""

import pytest
import yaml

from rl.config import TrainConfig
from scripts import __main__ as sleuth
from scripts.command_line import call

SEARCH_R1 = """
export DATA_DIR='data/nq_search'
TRAIN_DATA_DIR=${DATA_DIR}
# export BASE_MODEL='another'
export BASE_MODEL='org/base'
export EXPERIMENT_NAME=nq
python3 -m verl.trainer.main_ppo \\
    data.train_files=$TRAIN_DATA_DIR/train.parquet \\
    data.val_files=$TRAIN_DATA_DIR/test.parquet \\
    data.train_data_num=null \\
    data.train_batch_size=512 \\
    data.max_prompt_length=4096 \\
    data.max_response_length=500 \\
    data.max_obs_length=400 \\
    algorithm.adv_estimator=ADVANTAGE \\
    actor_rollout_ref.model.path=$BASE_MODEL \\
    actor_rollout_ref.model.enable_gradient_checkpointing=true \\
    actor_rollout_ref.actor.optim.lr=1e-6 \\
    actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.285 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \\
    KL \\
    actor_rollout_ref.rollout.n_agent=5 \\
    actor_rollout_ref.actor.state_masking=true \\
    trainer.logger=['wandb'] \\
    +trainer.val_only=false \\
    trainer.save_freq=100 \\
    trainer.test_freq=50 \\
    trainer.project_name=p \\
    trainer.total_training_steps=1005 \\
    trainer.default_local_dir=verl_checkpoints/$EXPERIMENT_NAME \\
    max_turns=2 \\
    retriever.url="http://127.0.0.1:8000/retrieve" \\
    retriever.topk=3 \\
    2>&1 | tee $EXPERIMENT_NAME.log
"""
GRPO_KL = (
    "actor_rollout_ref.actor.use_kl_loss=true actor_rollout_ref.actor.kl_loss_coef=0.002 "
    "actor_rollout_ref.actor.kl_loss_type=low_var_kl"
)


def printed(text, name, trainer, tmp_path, capsys):
    """The recipe as our own command line reads it, and its text."""
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        sleuth.main(["train", "--from", trainer, str(tmp_path / name)])
    assert end.value.code == 0
    text = capsys.readouterr().out
    (tmp_path / "ours.yaml").write_text(text)
    read = []

    def keep(config: TrainConfig) -> None:
        read.append(config)

    call(keep, ["--config", str(tmp_path / "ours.yaml")], prog="sleuth train")
    return read[0], text


def test_a_script_of_search_r1_means_here_what_it_means_there(tmp_path, capsys):
    script = SEARCH_R1.replace("ADVANTAGE", "grpo").replace("KL", GRPO_KL)
    config, text = printed(script, "train.sh", "search_r1", tmp_path, capsys)
    assert (config.policy, config.questions) == ("org/base", "data/nq_search/train.parquet")
    assert (config.retriever, config.out) == ("http://127.0.0.1:8000", "verl_checkpoints/nq")
    assert (config.dev_questions, config.eval_every) == ("data/nq_search/test.parquet", 50)
    assert (config.rollout.questions_per_step, config.rollout.group_size) == (512, 5)
    assert (config.steps, config.save_every, config.wandb.project) == (1005, 100, "p")
    algorithm, protocol = config.algorithm, config.protocol
    # 512 questions x 5 in mini-batches of 256 trajectories; the warm-up is .285 of 1005 such steps.
    assert (algorithm.learning_rate, algorithm.updates_per_rollout, algorithm.warmup_steps) == (
        1e-6,
        10,
        2864,
    )
    assert (algorithm.kl_in, algorithm.kl_coefficient, algorithm.kl_estimator) == ("loss", 0.002, "k3")
    assert (protocol.name, protocol.max_turns, protocol.top_k) == ("search_r1", 2, 3)
    limits = protocol.max_response_tokens, protocol.max_observation_tokens, protocol.max_context_tokens
    assert limits == (500, 400, 4096)
    assert "#   trainer.val_only=False\n" in text and "data.train_data_num=None" in text


def test_ppo_has_its_kl_in_the_reward(tmp_path, capsys):
    script = SEARCH_R1.replace("ADVANTAGE", "gae").replace("KL", "algorithm.kl_ctrl.kl_coef=0.003")
    script = script.replace("n_agent=5", "n_agent=1 critic.optim.lr_warmup_steps_ratio=0.05")
    algorithm = printed(script, "train.sh", "search_r1", tmp_path, capsys)[0].algorithm
    assert (algorithm.advantage, algorithm.kl_in) == ("gae", "reward")
    assert (algorithm.kl_coefficient, algorithm.kl_estimator) == (0.003, "k1")
    assert algorithm.updates_per_rollout == 2
    assert (algorithm.warmup_steps, algorithm.critic_warmup_steps) == (573, 100)


def test_a_script_of_verl_finds_its_variables_here_and_names_the_file_that_it_builds_on(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA_DIR", "the script's own wins")
    script = SEARCH_R1.replace("ADVANTAGE", "grpo").replace("KL", GRPO_KL).replace("n_agent", "n")
    script = script.replace("main_ppo", "main_ppo --config-name=search").replace("'data/", "$HOME'/data/")
    config, text = printed(script, "train.sh", "verl", tmp_path, capsys)
    assert config.questions == "/home/me/data/nq_search/train.parquet"
    assert config.algorithm.updates_per_rollout == 2  # its mini-batches are of questions
    assert "#   --config-name=search\n" in text


def test_a_yaml_of_verl_with_its_own_meaning_of_turns_and_lengths(tmp_path, capsys):
    actor = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "loss_agg_mode": "seq-mean-token-mean"}
    rollout = {"n": 4, "multi_turn": {"max_assistant_turns": 3}, "gpu_memory_utilization": 0.5}
    verl = {
        "data": {"train_batch_size": 64, "max_response_length": 3000},
        "algorithm": {"adv_estimator": "rloo"},
        "actor_rollout_ref": {"actor": actor, "rollout": rollout},
    }
    config, text = printed(yaml.safe_dump(verl), "verl.yaml", "verl", tmp_path, capsys)
    assert (config.rollout.group_size, config.protocol.max_turns) == (4, 2)
    assert config.protocol.max_response_tokens is None
    assert (config.algorithm.advantage, config.algorithm.averaging) == ("rloo", "trajectory")
    assert config.algorithm.clip_high == 0.28
    assert "# Not in the file, to be filled in: policy, questions, retriever, out" in text
    assert "gpu_memory_utilization=0.5" in text


def test_what_hydra_or_the_shell_would_fill_in_is_filled_in_or_listed(tmp_path, capsys):
    data = {
        "train_files": ["a.parquet", "b.parquet"],
        "val_files": "${data.train_files}",
        "seed": "${nowhere.seed}",
    }
    trainer = {
        "size": 64,
        "default_local_dir": "runs/${trainer.name}/x",
        "name": "mine",
        "save_freq": -1,
        "test_freq": 5,
    }
    verl = {"data": data | {"train_batch_size": "${trainer.size}"}, "trainer": trainer}
    verl |= {"algorithm": {"adv_estimator": "reinforce_plus_plus"}}
    config, text = printed(yaml.safe_dump(verl), "verl.yaml", "verl", tmp_path, capsys)
    assert (config.questions, config.dev_questions) == ("a.parquet,b.parquet",) * 2
    assert (config.rollout.questions_per_step, str(config.out)) == (64, "runs/mine/x")
    assert "data.seed=${nowhere.seed}" in text and "trainer.save_freq=-1" in text
    script = "main algorithm.adv_estimator=gae data.train_batch_size=$((8*4)) data.seed=7 "
    script += "actor_rollout_ref.rollout.n=${N:-5}"
    config, text = printed(script, "verl.sh", "verl", tmp_path, capsys)
    assert config.seed == 7 and config.rollout.group_size == 5 and "data.train_batch_size=$((8*4))" in text
    text = printed(script.replace("${N:-5}", "$1"), "verl.sh", "verl", tmp_path, capsys)[1]
    named = "out, rollout.questions_per_step, rollout.group_size, algorithm.updates_per_rollout\n"
    assert named in text and "  group_size" not in text and "rollout.n=$1" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--from", "verl", "words.sh"], "data.train_batch_size='many': must be a number"),
        (["--from", "verl", "bad.yaml"], "bad.yaml, line 2: not YAML"),
        (["--from", "trl", "x.sh"], "--from 'trl': must be one of search_r1, verl"),
        (["--from", "verl"], "--from needs a trainer and its file"),
        (["--from", "verl", "none.sh"], "none.sh: no such file"),
        (["--from", "verl", "empty.sh"], "empty.sh: holds no option of Search-R1 or verl"),
        (["--from", "verl", "list.yaml"], "list.yaml: is no YAML mapping"),
        (["--from", "verl", "open.sh"], "open.sh: is no shell script"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty.sh", "echo a=b\n"), ("list.yaml", "- 1\n"), ("open.sh", 'echo "\n')):
        (tmp_path / name).write_text(text)
    for name, text in (("words.sh", "x data.train_batch_size=many\n"), ("bad.yaml", "data: [1\n")):
        (tmp_path / name).write_text(text)
    assert sleuth.main(["train", *argv]) == 2
    assert said in capsys.readouterr().err
