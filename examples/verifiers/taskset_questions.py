"""A taskset of verifiers as questions and rewards of `sleuth train`.

python -m examples.verifiers.taskset_questions --taskset '{"id": "gsm8k-v1"}' --out train.jsonl
sleuth train --questions train.jsonl --rewards '{"examples.verifiers.taskset_questions:taskset_reward": 1}'
"""

from __future__ import annotations

import inspect
import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

from agent.trajectory import Trajectory
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from retriever_server.client.bridge import Bridge

KEY = "verifiers"
_LOOP = Bridge()  # the trainer asks for rewards inside its own


def main(taskset: dict[str, Any], out: Path, answer: str = "answer", limit: int = 100_000) -> None:
    """Write the tasks of a taskset as questions.

    Args:
        taskset: Its configuration: id, and what else it takes.
        out: The file of questions (JSONL).
        answer: The field of a task's data with its right answer, or a list of them.
        limit: Only the first so many tasks.
    """
    name = json.dumps(taskset)
    rows = [_row(name, task.data, answer) for task in islice(_open(name), limit)]
    write_jsonl(out, rows)
    print(f"{len(rows)} questions -> {out}")


def _row(taskset: str, data: Any, answer: str) -> dict[str, Any]:
    gold = getattr(data, answer, None)
    if gold is None:
        fields = ", ".join(sorted(set(type(data).model_fields) - set(vf.TaskData.model_fields)))
        raise DataError(f"task {data.idx} has no {answer!r}: --answer must be of {fields or 'none'}")
    golds = [str(each) for each in (gold if isinstance(gold, list | tuple) else [gold])]
    metadata = {KEY: {"taskset": taskset, "data": data.model_dump(mode="json")}}
    at = data.id or str(data.idx)
    return {"id": at, "question": data.prompt_text, "golden_answers": golds, "metadata": metadata}


def taskset_reward(trajectory: Trajectory) -> float:
    """Return what the taskset's own rewards give the answer as the last message; 0 without one."""
    found = trajectory.question.metadata.get(KEY)
    if found is None:
        raise ConfigError(f"question {trajectory.question.id!r}: is of no taskset: metadata has no {KEY!r}")
    if trajectory.answer is None:
        return 0.0
    kind, config = type(_open(found["taskset"])).task_type(), _open(found["taskset"]).config.task
    task = kind(kind.data_type().model_validate(found["data"]), config)
    rewards = [*task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    blind = [f.__name__ for f in rewards if "runtime" in inspect.signature(f).parameters]
    if blind or not rewards:
        raise ConfigError(f"{found['taskset']}: rewards {blind}: need more than an answer, or there are none")
    trace = vf.Trace(
        task=vf.TraceTask(type=kind.__name__, data=task.data), agent=vf.AgentInfo(config=vf.AgentConfig())
    )
    asked = vf.MessageNode(message=vf.UserMessage(content=task.data.prompt_text))
    said = vf.AssistantMessage(content=trajectory.answer)
    trace.nodes = [asked, vf.MessageNode(parent=0, message=said, sampled=True)]
    _LOOP.run(task.score(trace))
    return float(trace.reward)


@cache
def _open(config: str) -> Any:
    given = json.loads(config)
    return vf.load_taskset(vf.resolve_env_config({"taskset": given}).taskset)


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
