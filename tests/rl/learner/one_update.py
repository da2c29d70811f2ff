"""Run in one process or several: for every case one update of policy and critic, and its gradients on disk.

Where the work is "uneven", all groups belong to the first process.
"""

from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from agent.policy import Policy
from agent.protocol import COMPACT
from data.models.sharding import whole
from data.settings import LoraConfig
from rl.algorithm.presets import AlgorithmConfig, preset_fields
from rl.config import TrainConfig
from rl.learner.learner import Learner
from rl.learner.workers import Workers, join_workers
from rl.rollouts import Collected
from tests.fakes import tiny_model
from tests.rl.learner.learning import GROUPS, VOCABULARY, configure, make_groups

ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "token-average": ("grpo", {}),
    "ppo": ("ppo", {}),
    "adapters-near-a-reference": ("search_r1_grpo", {"lora": LoraConfig(rank=4)}),
    "whitened-by-all": ("reinforce_pp", {}),
}
CASES = [("token-average", "even", "none"), *product(ALGORITHMS, ("uneven",), ("none", "fsdp"))]


def gradients(config: TrainConfig, workers: Workers, share: str) -> dict[str, torch.Tensor]:
    """Return the gradients of one update; AdamW is replaced by a recorder."""
    near = Policy(tiny_model("qwen2", VOCABULARY, seed=1), None) if config.algorithm.kl_coefficient else None
    learner = Learner(Policy(tiny_model("qwen2", VOCABULARY), None), config, COMPACT, workers, near)
    seen = {}

    def record(optimizer, name, module):
        def update():
            for key, parameter in module.named_parameters():
                if parameter.grad is not None:
                    seen[f"{name}/{key}"] = whole(parameter.grad).clone()
            module.zero_grad(set_to_none=True)
            return 0.0

        optimizer.update = update

    record(learner.optimizer, "policy", learner.model)
    if learner.critic_optimizer:
        torch.nn.init.constant_(learner.critic.head.bias, 1.0)
        record(learner.critic_optimizer, "critic", learner.critic)
    mine = [g for g in make_groups(5) if g.number % workers.count == workers.rank]
    if share == "uneven":
        mine = make_groups(5) if workers.leads else []
    learner.learn(Collected(mine, GROUPS, GROUPS, {}), step=0)
    return seen


def main(out: Path) -> None:
    torch.set_num_threads(1)
    workers = join_workers()
    for name, share, sharding in CASES:
        preset, changes = ALGORITHMS[name]
        algorithm = AlgorithmConfig(**{**preset_fields(preset), "updates_per_rollout": 1})
        config = configure(algorithm, micro_batch_tokens=30, sharding=sharding, **changes)
        seen = gradients(config, workers, share)
        if workers.leads:
            save_file(seen, out / f"{name}-{share}-{sharding}")
    workers.leave()
    workers.exit()
