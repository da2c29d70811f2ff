"""Shards of vectors encoded by the workers of a Ray cluster, each shard a task.

All machines see corpus and output at the same path (a shared folder) and have this package. What a
worker finishes is a shard with its marker, as without Ray: a run that ended early goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.errors import ConfigError, DataError, RunStopped
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.indexes.shards import Progress, Shards, silent
from scripts.on_ray.cluster import connect_ray

ATTEMPTS = 3
"""A task whose worker fails or dies begins again so often in all, on whichever machine is free."""


@dataclass(frozen=True)
class Plan:
    """All that a worker must know to write the very shards that the launcher asks for."""

    folder: str
    corpus: str
    corpus_hash: str
    spec: EncodingSpec
    dtype: str
    passages_per_shard: int
    device: str


def encode_on_ray(
    shards: Shards, progress: Progress = silent, address: str = "auto", device: str = "auto"
) -> None:
    """Write the missing shards on the cluster at `address` (host:port, auto), or `local`: this machine's.

    A task takes a GPU where the cluster has any and device is not cpu, else a CPU. Raises ConfigError
    without Ray or a cluster, RunStopped naming the shards that failed `ATTEMPTS` times.
    """
    todo = shards.missing()
    if not todo:
        return
    ray = connect_ray(address)
    try:
        gpus = int(device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)
        if device == "cuda" and not gpus:
            raise ConfigError(f"--device cuda: the Ray cluster at {address} has no GPU")
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": ATTEMPTS - 1, "retry_exceptions": True}
        task, plan = ray.remote(**options)(encode_shard), _plan(shards, "cuda" if gpus else "cpu")
        failures: dict[int, str] = {}
        running = {task.remote(plan, shard): shard for shard in todo}
        total = sum(len(shards.positions(shard)) for shard in todo)
        for _ in progress(_finished(ray, running, shards, failures), total):
            pass
    finally:
        ray.shutdown()
    if missing := shards.missing():
        named = ", ".join(f"{shard:05d}" for shard in missing)
        why = failures.get(missing[0], "its files are not in the folder: is it shared by all machines?")
        raise RunStopped(
            f"{shards.folder}: {len(missing)} of {len(shards)} shards are missing: {named} "
            f"({missing[0]:05d}: {why}); the others are kept, the same command goes on"
        )


def encode_shard(plan: Plan, shard: int) -> None:
    """Write one shard; runs on a worker. Raises DataError where this machine has another corpus or model."""
    shards = _open(plan)
    shards.encode(part=(shard + 1, len(shards)))


@cache
def _open(plan: Plan) -> Shards:
    """Corpus and encoder, once in the life of a worker."""
    from retriever_server.encoders.loading import load_encoder

    corpus = Corpus(plan.corpus)
    if corpus.content_hash != plan.corpus_hash:
        raise DataError(f"{plan.corpus}: another file on {socket.gethostname()} than where the run started")
    encoder = load_encoder(plan.spec, device=plan.device)
    return Shards(Path(plan.folder), corpus, encoder, plan.dtype, plan.passages_per_shard)


def _plan(shards: Shards, device: str) -> Plan:
    spec, corpus = shards.encoder.spec, shards.corpus
    if Path(spec.model).exists():  # a folder, and workers stand in another than ours
        spec = replace(spec, model=str(Path(spec.model).absolute()))
    path, size = str(corpus.path.absolute()), shards.passages_per_shard
    return Plan(str(shards.folder), path, corpus.content_hash, spec, shards.dtype, size, device)


def _finished(ray: Any, running: dict[Any, int], shards: Shards, failures: dict[int, str]) -> Iterator[int]:
    """The passages of each shard as it is done; `failures` gets the reasons of those that are not."""
    while running:
        [task], _ = ray.wait(list(running), num_returns=1)
        shard = running.pop(task)
        try:
            ray.get(task)
            yield from shards.positions(shard)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            failures[shard] = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
