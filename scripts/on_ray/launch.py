"""`sleuth train --ray`: the processes of a run, placed on a Ray cluster, watched over and started again.

Trainers, vLLM servers and replicas of the retriever are processes as torchrun, vLLM and `sleuth serve`
start them, each kept by an actor, its log in OUT/logs. An engine or replica that dies is started again where
it was, and the others go on meanwhile. Where a trainer dies all of them end, and begin again after the last
checkpoint. What is started again too often ends the run, in one line. All machines see the same paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from agent.engines.open_engine import check_engine
from data.atomic import atomic_write
from data.checkpoint import latest_checkpoint
from data.errors import DataError, EngineError, RunStopped, require
from data.jsonl import write_json
from data.objects.plugins import folders
from data.run_dir import RunStatus, read_run
from retriever_server.client.bridge import Bridge
from retriever_server.client.pool import ServerPool, pause_seconds
from retriever_server.client.server_process import PYTHON
from rl.config import RayConfig, TrainConfig
from scripts.console import going_on
from scripts.on_ray.cluster import connect_ray
from scripts.on_ray.layout import OURS, lay_out
from scripts.on_ray.ray_process import Lost

logger = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 1.0
GRACE_SECONDS = 60.0
"""For trainers to end by themselves: one that was told to stop, or whose fellows did, may be saving."""
FINAL = ("ConfigError", "DataError", "StorageError", "sentinel:")
"""A run that stopped for these reasons would stop again."""


def launch(config: TrainConfig) -> None:
    """Train as `config` says, in processes placed by Ray, until the run is done.

    Raises RunStopped where it cannot go on, ConfigError before anything starts; KeyboardInterrupt, all ended.
    """
    _check(config)
    services = config.ray.retrievers + config.engine.servers_to_start
    ray = connect_ray(str(config.ray.address), cpus=config.ray.cpus * (config.ray.trainers + services))
    try:
        with going_on(config.out, "the last checkpoint is kept"):
            _Launch(ray, config).run()
    finally:
        ray.shutdown()


def _check(config: TrainConfig) -> None:
    served = not (config.ray.retrievers and config.retriever.startswith(("http://", "https://")))
    require(served, "ray.retrievers", config.ray.retrievers, "0 where retriever is served already")
    require(config.engine.devices is None, "engine.devices", config.engine.devices, "none with --ray")
    if config.engine.servers_to_start:
        check_engine(config.engine)


class _Launch:
    def __init__(self, ray: Any, config: TrainConfig) -> None:
        self.config, self.settings, self.out = config, config.ray, Path(config.out).absolute()
        self.folder, self.logs = self.out / "ray", self.out / "logs"
        for folder in (self.folder, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.layout = lay_out(ray, config, self.folder, self.logs)
        self.pools = [pool for pool in (self.layout.engines, self.layout.replicas) if pool.servers]
        self.urls: list[str] = []
        self.bridge = Bridge()

    def run(self) -> None:
        """Until the trainers are done. However it ends, nothing of it is left running."""
        try:
            self._train()
        except KeyboardInterrupt:
            self._end_trainers(GRACE_SECONDS)
            raise
        finally:
            self._end_trainers(0)
            self.bridge.close(self._end_services())
            shutil.rmtree(self.folder / "weights", ignore_errors=True)

    def _train(self) -> None:
        """Start the trainers until they are done; RunStopped where that is no use."""
        in_vain, step, limit = 0, _step(self.out), self.settings.max_restarts
        while True:
            try:
                self.bridge.run(self._start_services())
                self._start_trainers()
                return self._watch_trainers()
            except Lost as loss:
                reason = str(loss)
            except EngineError as error:  # all engines or all replicas are given up, or never answered
                limits = f"ray.start_seconds = {self.settings.start_seconds:g}, ray.max_restarts = {limit}"
                raise RunStopped(
                    f"{error}; the last checkpoint is kept in {self.out} ({limits}; see {self.logs})"
                ) from error
            self._end_trainers(0)
            self._stop_if_final()
            before, step = step, _step(self.out)
            in_vain = in_vain + 1 if step == before else 0
            if in_vain > limit:
                raise RunStopped(
                    f"{reason}; the trainers were started {in_vain} times without a new checkpoint; the "
                    f"last is of step {step}, in {self.out} (see {self.logs})"
                )
            logger.warning("%s; all trainers begin again after step %d", reason, step)
            time.sleep(pause_seconds(in_vain))

    async def _start_services(self) -> None:
        await asyncio.gather(*(pool.start() for pool in self.pools))

    def _check_services(self) -> None:
        for pool in self.pools:
            pool.check()
            for server in pool.live:
                if server.url not in self.urls:
                    raise Lost(f"{server.name} is at {server.url} now")

    async def _end_services(self) -> None:
        await asyncio.gather(*(pool.close() for pool in self.pools))

    def _start_trainers(self) -> None:
        """All at once, from the last checkpoint; they are told where the services are, and one another."""
        shutil.rmtree(self.folder / "weights", ignore_errors=True)
        engines, replicas = _urls(self.layout.engines), _urls(self.layout.replicas)
        engine, weights = self.config.engine, str(self.folder / "weights")
        places = {
            "engines": ",".join(engines) or engine.urls,
            "retriever": ",".join(replicas) or self.config.retriever,
            "weights": weights if engines else engine.sync_folder,
        }
        self.urls = engines + replicas
        write_json(self.folder / "places.json", places)
        told = replace(self.config, resume=False, ray=RayConfig())
        atomic_write(self.folder / "train.yaml", yaml.safe_dump(asdict(told), sort_keys=False))
        ours = os.pathsep.join([OURS["PYTHONPATH"], *map(str, folders())])  # the user's modules, too
        hosts = [trainer.address() for trainer in self.layout.trainers]
        for rank, trainer in enumerate(self.layout.trainers):
            environment = {
                **{"RANK": str(rank), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0"},
                **{"MASTER_ADDR": hosts[0][0], "MASTER_PORT": str(hosts[0][1]), "PYTHONPATH": ours},
            }
            command = ["-P", "-m", "scripts.on_ray.trainer", "--config", str(self.folder / "train.yaml")]
            trainer.start([PYTHON, *command], environment, str(Path.cwd()), str(trainer.log))

    def _watch_trainers(self) -> None:
        """Return when all have done their work. Raises Lost when one has not, or they hang."""
        progress, written = _newest(self.out), time.monotonic()
        while True:
            time.sleep(LOOK_EVERY_SECONDS)
            ends = self._states()
            if all(end is not None and end[0] == 0 for end in ends):
                return
            for trainer, end in zip(self.layout.trainers, ends, strict=True):
                if end is not None and end[0] != 0:
                    until = time.monotonic() + GRACE_SECONDS
                    # Told in one line: the others stop too, and may be saving.
                    while end[0] == 2 and time.monotonic() < until and None in self._states():
                        time.sleep(LOOK_EVERY_SECONDS)
                    raise Lost(f"{trainer.name}: exit status {end[0]}: {end[1]}")
            self._check_services()
            if (newest := _newest(self.out)) != progress:
                progress, written = newest, time.monotonic()
            elif time.monotonic() - written > self.settings.quiet_seconds:
                raise Lost(
                    f"the trainers wrote nothing for ray.quiet_seconds = {self.settings.quiet_seconds:g}"
                )

    def _states(self) -> list[tuple[int, str] | None]:
        return [trainer.state() for trainer in self.layout.trainers]

    def _end_trainers(self, seconds: float) -> None:
        with ThreadPoolExecutor(len(self.layout.trainers)) as threads:
            list(threads.map(lambda trainer: trainer.stop(seconds), self.layout.trainers))

    def _stop_if_final(self) -> None:
        """Raise RunStopped where the run has stopped itself for a reason that stays."""
        try:
            said = read_run(self.out)
        except DataError:
            return
        if said.get("status") == RunStatus.STOPPED and str(said.get("reason")).startswith(FINAL):
            raise RunStopped(str(said["reason"]))


def _urls(pool: ServerPool) -> list[str]:
    """Return the URLs of those that are not given up."""
    return [server.url for server in pool.servers if server.url and not server.given_up]


def _step(out: Path) -> int:
    found = latest_checkpoint(out / "checkpoints")
    return found.step if found else 0


def _newest(out: Path) -> float:
    """Return the time at which the trainers last wrote a number, a transcript or a checkpoint."""
    times = [0.0]
    for pattern in ("*.jsonl", "checkpoints/*", "evaluations/*/*"):
        for file in out.glob(pattern):
            with contextlib.suppress(OSError):  # it was pruned meanwhile
                times.append(file.stat().st_mtime)
    return max(times)
