"""Several processes train as one: replicated or sharded, and however uneven their work is."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.run_dir import read_metrics
from scripts import __main__ as scripts
from tests.docs_world import free_port
from tests.processes import PATIENCE_SECONDS, Forked, sleuth
from tests.rl.learner import one_update


def launch(count, start):
    """Wait for so many processes, each with the place of a launcher's that `start(environment=)` starts."""
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    places = [{**port, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [start(environment=place) for place in places]
    for process in processes:
        assert process.wait(5 * PATIENCE_SECONDS) == 0, process.stderr.read()[-3000:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folders of gradients that one process and two wrote."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    one_update.main(one)
    launch(2, lambda **place: Forked(one_update.main, two, **place))
    return one, two


@pytest.mark.parametrize("case", one_update.CASES, ids="-".join)
def test_two_processes_have_the_gradient_of_one(recorded, case):
    """Also where one of them has all the trajectories, and the other none."""
    one, two = (load_file(folder / "-".join(case)) for folder in recorded)
    assert one.keys() == two.keys() and any(value.any() for value in one.values())
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=1e-3, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--preset=ppo", "--sharding=fsdp"], ["--preset=dapo"]],
    ids=str,
)
def test_two_processes_roll_out_what_one_does_and_leave_a_policy(toy, tmp_path, options):
    """The same trajectories and rewards in the first step, uneven as they are; then to the end."""
    first = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = [
            *("train", "--policy", toy / "policy", "--questions", toy / "train.jsonl"),
            *("--dev_questions", toy / "dev.jsonl", "--retriever", toy / "index", "--out", out),
            *("--steps=2", "--eval_every=2", "--device=cpu", "--deterministic=true"),
            *("--protocol.max_turns=2", "--rollout.questions_per_step=3", "--rollout.group_size=4"),
            *("--micro_batch_tokens=100", *options),
        ]
        if processes == 1:
            assert scripts.main([str(word) for word in words]) == 0
        else:
            launch(processes, lambda words=words, **place: sleuth(*words, **place))
        first.append({k: v for k, v in read_metrics(out)[0].items() if not k.startswith("time/")})
        AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step-000002")
    assert first[0] == pytest.approx(first[1], rel=1e-3, abs=1e-5)
