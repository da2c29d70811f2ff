"""A configuration of Search-R1 or verl, read as it is, as a recipe of ours (docs/from-other-trainers.md).

Either a shell script that calls `main_ppo` with `key=value` arguments, or a YAML file. What has no
counterpart is listed in comments, never dropped in silence.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from data.errors import ConfigError
from data.jsonl import read_text
from data.yaml_file import read_yaml

TRAINERS = ("search_r1", "verl")
_ARR = "actor_rollout_ref"
_KL = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "abs": "k1"}
_ADVANTAGES = {
    "gae": "gae",
    "grpo": "grpo",
    "rloo": "rloo",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
}
_AVERAGING = {
    "token-mean": "token",
    "seq-mean-token-mean": "trajectory",
    "seq-mean-token-sum-norm": "constant",
}
_VARIABLE = re.compile(r"\$\{?(\w+)(?::?-([^}]*))?\}?")  # $NAME, ${NAME}, ${NAME:-what else}
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def _sources(files: Any) -> str:
    return ",".join(map(str, files)) if isinstance(files, list) else str(files)


_SAME: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "data.train_batch_size": ("rollout.questions_per_step", int),
    f"{_ARR}.rollout.temperature": ("rollout.temperature", float),
    "data.train_files": ("questions", _sources),
    f"{_ARR}.model.path": ("policy", str),
    "trainer.default_local_dir": ("out", str),
    "trainer.total_training_steps": ("steps", int),
    "trainer.save_freq": ("save_every", lambda steps: int(steps) if int(steps) > 0 else None),
    "trainer.project_name": ("wandb.project", str),
    f"{_ARR}.model.enable_gradient_checkpointing": ("gradient_checkpointing", bool),
    f"{_ARR}.model.use_remove_padding": ("packing", bool),
    f"{_ARR}.model.lora_rank": ("lora.rank", int),
    f"{_ARR}.model.lora_alpha": ("lora.alpha", float),
    f"{_ARR}.actor.state_masking": ("mask_observations", bool),
    f"{_ARR}.actor.optim.lr": ("algorithm.learning_rate", float),
    f"{_ARR}.actor.optim.weight_decay": ("algorithm.weight_decay", float),
    f"{_ARR}.actor.grad_clip": ("algorithm.max_grad_norm", float),
    f"{_ARR}.actor.entropy_coeff": ("algorithm.entropy_coefficient", float),
    f"{_ARR}.actor.clip_ratio_low": ("algorithm.clip_low", float),
    f"{_ARR}.actor.clip_ratio_high": ("algorithm.clip_high", float),
    f"{_ARR}.actor.clip_ratio_c": ("algorithm.dual_clip", float),
    f"{_ARR}.actor.loss_agg_mode": ("algorithm.averaging", lambda name: _AVERAGING.get(name)),
    "algorithm.adv_estimator": ("algorithm.advantage", lambda name: _ADVANTAGES.get(name)),
    "algorithm.gamma": ("algorithm.gamma", float),
    "algorithm.lam": ("algorithm.gae_lambda", float),
    "critic.optim.lr": ("algorithm.critic_learning_rate", float),
    "critic.cliprange_value": ("algorithm.value_clip", float),
    "trainer.critic_warmup": ("algorithm.critic_only_steps", int),
    "max_turns": ("protocol.max_turns", int),
    "data.max_response_length": ("protocol.max_response_tokens", int),
    "data.max_obs_length": ("protocol.max_observation_tokens", int),
    "data.max_prompt_length": ("protocol.max_context_tokens", int),
    "retriever.topk": ("protocol.top_k", int),
    "retriever.url": ("retriever", lambda url: str(url).removesuffix("/retrieve")),
    "data.seed": ("seed", int),
}
"""Options that mean the same here: their name, and what makes its value (None: it has no counterpart)."""
_DERIVED = {
    "rollout.questions_per_step": ("data.train_batch_size",),
    "rollout.group_size": (f"{_ARR}.rollout.n_agent", f"{_ARR}.rollout.n"),
    "algorithm.updates_per_rollout": (
        "data.train_batch_size", f"{_ARR}.actor.ppo_mini_batch_size", f"{_ARR}.rollout.n_agent",
        f"{_ARR}.rollout.n",
    ),
}  # fmt: skip
"""Settings left out where an option that they are made of is not known, lest a default be believed."""
Flat = dict[str, Any]


def print_recipe(trainer: str, file: str) -> None:
    """Print the recipe of a configuration. Raises ConfigError."""
    if trainer not in TRAINERS:
        raise ConfigError(f"--from {trainer!r}: must be one of {', '.join(TRAINERS)}")
    print(recipe_text(read_options(Path(file)), trainer, file), end="")


def read_options(file: Path) -> Flat:
    """The options of a shell script or YAML file by dotted name. Raises ConfigError where it has none."""
    if file.suffix in (".yaml", ".yml"):
        if not isinstance(content := read_yaml(file), dict):
            raise ConfigError(f"{file}: is no YAML mapping")
        options = dict(_flatten(content))
    else:
        options = _of_script(read_text(file), file)
    options = {name: _interpolated(value, options) for name, value in options.items()}
    if not any(name.startswith((f"{_ARR}.", "algorithm.", "data.")) for name in options):
        raise ConfigError(f"{file}: holds no option of Search-R1 or verl, such as data.train_batch_size=512")
    return options


def _interpolated(value: Any, options: Flat, depth: int = 8) -> Any:
    """The value with ${data.seed} of Hydra as what that option holds; what is of no option stays."""
    if not isinstance(value, str) or not depth:
        return value
    if (whole := _REFERENCE.fullmatch(value)) and whole[1] in options:
        return _interpolated(options[whole[1]], options, depth - 1)
    return _REFERENCE.sub(lambda m: str(_interpolated(options.get(m[1], m[0]), options, depth - 1)), value)


def _flatten(node: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _of_script(text: str, file: Path) -> Flat:
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ConfigError(f"{file}: is no shell script: {error}") from error
    variables = dict(os.environ)
    options: Flat = {}
    for word in words:
        name, is_given, value = word.lstrip("+").partition("=")
        if not is_given or not re.fullmatch(r"[A-Za-z_][\w.]*|--config-\w+", name):
            continue
        value = _VARIABLE.sub(lambda m: variables.get(m[1], m[2] or m[0]), value)
        if name == "max_turns" or not name.isidentifier():
            options[name] = (
                yaml.safe_load(value) if not re.fullmatch(r"[-\d.]+e-?\d+", value) else float(value)
            )
        else:
            variables[name] = value
    return options


def translate(options: Flat, trainer: str) -> tuple[dict[str, Any], Flat]:
    """Our options by dotted name, and theirs that have no counterpart."""
    unknown = {name: value for name, value in options.items() if "$" in str(value)}  # the shell's or Hydra's
    left, ours = {name: value for name, value in options.items() if name not in unknown}, dict[str, Any]()
    for name, (own, convert) in _SAME.items():
        try:
            if left.get(name) is not None and (value := convert(left[name])) is not None:
                ours[own] = value
                del left[name]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{name}={left[name]!r}: must be a number") from error
    try:
        _derive(ours, left, trainer)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"an option that is no number: {error}") from error
    for own, names in _DERIVED.items():
        if unknown.keys() & names:
            ours.pop(own, None)
    return ours, left | unknown


def _derive(ours: dict[str, Any], left: Flat, trainer: str) -> None:
    """Add what follows from several options, or depends on the trainer."""
    take: Callable[..., Any] = left.pop
    group = [take(f"{_ARR}.rollout.{name}", None) for name in ("n_agent", "n")]
    ours["rollout.group_size"] = int(next((n for n in group if n), 1))
    clip = take(f"{_ARR}.actor.clip_ratio", None)
    if clip is not None:
        ours |= {"algorithm.clip_low": float(clip), "algorithm.clip_high": float(clip)}
    mini = take(f"{_ARR}.actor.ppo_mini_batch_size", None)
    # Search-R1 cuts trajectories into mini-batches, verl questions.
    whole = ours.get("rollout.questions_per_step", 0) * (
        ours["rollout.group_size"] if trainer == "search_r1" else 1
    )
    updates = max(1, whole // int(mini)) if mini else 1
    ours["algorithm.updates_per_rollout"] = updates
    if steps := ours.get("steps"):  # else of how many steps is not said
        for of, own in ((f"{_ARR}.actor", "warmup_steps"), ("critic", "critic_warmup_steps")):
            if ratio := take(f"{of}.optim.lr_warmup_steps_ratio", None):
                ours[f"algorithm.{own}"] = round(ratio * steps * updates)
    _derive_kl(ours, take)
    if (tested := take("trainer.test_freq", None)) and int(tested) > 0 and left.get("data.val_files"):
        ours |= {"eval_every": int(tested), "dev_questions": _sources(take("data.val_files"))}
    if (turns := take(f"{_ARR}.rollout.multi_turn.max_assistant_turns", None)) is not None:
        ours["protocol.max_turns"] = int(turns) - 1
    if trainer == "verl":  # its limit is of all turns and observations together
        ours.pop("protocol.max_response_tokens", None)
    else:
        ours["protocol.name"] = "search_r1"
    if "wandb" not in str(take("trainer.logger", "")):
        ours.pop("wandb.project", None)


def _derive_kl(ours: dict[str, Any], take: Callable[..., Any]) -> None:
    in_loss, in_reward = take(f"{_ARR}.actor.use_kl_loss", None), take("algorithm.use_kl_in_reward", None)
    of_loss = take(f"{_ARR}.actor.kl_loss_coef", 0.001), take(f"{_ARR}.actor.kl_loss_type", "low_var_kl")
    of_reward = take("algorithm.kl_ctrl.kl_coef", None), take("algorithm.kl_penalty", "kl")
    if in_loss:
        where, (weight, kind) = "loss", of_loss
    elif in_reward or (in_reward is None and of_reward[0]):
        where, (weight, kind) = "reward", of_reward
    else:
        return
    estimator = _KL.get(str(kind), "k3")
    ours |= {"algorithm.kl_in": where, "algorithm.kl_coefficient": float(weight or 0.0)}
    ours["algorithm.kl_estimator"] = estimator


def recipe_text(options: Flat, trainer: str, file: str) -> str:
    """The recipe as YAML, what was not taken over in comments at its end."""
    ours, left = translate(options, trainer)
    nested: dict[str, Any] = {}
    missing = {
        "policy": "POLICY",
        "questions": "QUESTIONS",
        "retriever": "http://127.0.0.1:8000",
        "out": "runs/out",
    }
    for name, value in {**missing, **ours}.items():
        part, _, key = name.rpartition(".")
        (nested.setdefault(part, {}) if part else nested)[key] = value
    lines = [
        f"# From {file} ({trainer}). docs/from-other-trainers.md says where an option means something else.",
        "",
    ]
    lines.append(yaml.safe_dump(nested, sort_keys=False, width=110).rstrip())
    unknown = [own for own, names in _DERIVED.items() if left.keys() & names and own not in ours]
    if absent := [name for name in missing if name not in ours] + unknown:
        lines += ["", f"# Not in the file, to be filled in: {', '.join(absent)}"]
    if left:
        lines += ["", "# Without a counterpart here, of its machines, or not known from the file:"]
        lines += [f"#   {name}={value}" for name, value in sorted(left.items())]
    return "\n".join([*lines, ""])
