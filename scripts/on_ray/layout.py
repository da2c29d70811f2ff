"""The processes of a run, each with room of its own in a Ray cluster and the command that it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import ConfigError
from retriever_server.client.pool import Server, ServerPool
from retriever_server.client.server_process import PYTHON, Command, ServerProcess
from rl.config import TrainConfig
from scripts.on_ray.ray_process import RayProcess

OURS = {"PYTHONPATH": str(Path(__file__).parents[2])}
"""Environment in which a process runs this very package, wherever it stands."""


UNWELL_SECONDS = 90.0
"""An engine or replica that does not answer for so long is started again."""


@dataclass(frozen=True)
class Layout:
    """Parts of a run: trainers, and the pools of what serves them."""

    trainers: Sequence[RayProcess]
    engines: ServerPool
    replicas: ServerPool


def lay_out(ray: Any, config: TrainConfig, scratch: Path, logs: Path) -> Layout:
    """Find room for all processes of the run; none is started. ConfigError where there is no room in time.

    scratch: where a policy goes that engines are served as another model; all machines see it, and `logs`.
    """
    settings = config.ray
    with_gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    gpus = {"trainer": settings.trainer_gpus, "engine": settings.engine_gpus, "retriever": 0}
    engines_wanted = config.engine.servers_to_start
    counts = {"trainer": settings.trainers, "engine": engines_wanted, "retriever": settings.retrievers}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    room = [{"CPU": settings.cpus, "GPU": gpus[kind] * with_gpus} for kind in kinds]
    bundles = [{name: amount for name, amount in each.items() if amount} for each in room]
    group = ray.util.placement_group(bundles, strategy="SPREAD" if settings.spread else "PACK")
    if not group.wait(settings.start_seconds):
        raise ConfigError(_no_room(ray, bundles, settings.start_seconds))
    names = [f"{kind}-{i}" for kind, count in counts.items() for i in range(count)]
    places = [
        RayProcess(ray, name, _options(group, number, each), logs / f"{name}.log", settings.start_seconds)
        for number, (name, each) in enumerate(zip(names, room, strict=True))
    ]

    def pool(kind: str, command: Command, environment: Mapping[str, str | None], health: str) -> ServerPool:
        servers = [
            Server("", ServerProcess(place.name, place, command, environment, place.log), health)
            for place in places
            if place.name.startswith(kind)
        ]
        limits = {"max_restarts": settings.max_restarts, "hang_seconds": UNWELL_SECONDS}
        return ServerPool("ray", servers, settings.start_seconds, **limits)

    engines = ServerPool("ray", [])
    if engines_wanted:
        engines = pool("engine", *_engine(config, scratch, with_gpus), "/health")
    replicas = pool("retriever", _replica(config), OURS, "/readyz")
    return Layout(places[: settings.trainers], engines, replicas)


def _engine(config: TrainConfig, scratch: Path, with_gpus: bool) -> tuple[Command, Mapping[str, str | None]]:
    from agent.engines.open_vllm import plan_server
    from scripts.wiring import make_protocol

    protocol = make_protocol(config.protocol, config.policy)
    limits = (protocol, config.rollout.max_rows, scratch, with_gpus and config.ray.engine_gpus > 0)
    return plan_server(config.engine, config.policy, config.dtype, *limits)


def _options(group: Any, bundle: int, room: dict[str, float]) -> dict[str, Any]:
    from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]  (an extra)
        PlacementGroupSchedulingStrategy,
    )

    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return {"scheduling_strategy": strategy, "num_cpus": room["CPU"], "num_gpus": room["GPU"]}


def _no_room(ray: Any, bundles: Sequence[dict[str, float]], seconds: float) -> str:
    wanted = {name: sum(each.get(name, 0) for each in bundles) for name in ("CPU", "GPU")}
    there = ray.cluster_resources()
    needs = " and ".join(f"{amount:g} {name}s (of {there.get(name, 0):g})" for name, amount in wanted.items())
    return f"ray: no room in the cluster within {seconds:g} s for {len(bundles)} processes with {needs}"


def _replica(config: TrainConfig) -> Command:
    def command(host: str, port: int) -> Sequence[str]:
        serve = [PYTHON, "-P", "-m", "scripts", "serve", "--index", config.retriever]
        return [*serve, "--host", host, "--port", str(port), "--drain_seconds", "0"]

    return command
