"""`sleuth train --ray`: the processes of a run, placed on a Ray cluster, watched over and started again.

Trainers, vLLM servers and replicas of the retriever are processes as torchrun, vLLM and `sleuth serve`
start them, each kept by an actor, its log in OUT/logs. An engine or replica that dies is started again where
it was, and the others go on meanwhile. Where a trainer dies all of them end, and begin again after the last
checkpoint. What is started again too often ends the run, in one line. All machines see the same paths.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from agent.engines.open_engine import check_engine
from data.atomic import atomic_write
from data.checkpoint import latest_checkpoint
from data.errors import DataError, RunStopped, require
from data.jsonl import write_json
from data.plugins import folders
from data.run_dir import RunStatus, read_run
from rl.config import RayConfig, TrainConfig
from scripts.on_ray.cluster import connect_ray
from scripts.on_ray.layout import OURS, lay_out
from scripts.on_ray.member import LOOK_EVERY_SECONDS, Lost, Member, Service, pause_seconds
from scripts.on_ray.place import PYTHON

logger = logging.getLogger(__name__)

GRACE_SECONDS = 60.0
"""For trainers to end by themselves: one that was told to stop, or whose fellows did, may be saving."""
SERVICE_GRACE_SECONDS = 15.0
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
        _Launch(ray, config).run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the last checkpoint is kept in {config.out}: start the same command again to go on"
        ) from None
    finally:
        ray.shutdown()


def _check(config: TrainConfig) -> None:
    """Raise ConfigError where settings do not go together."""
    served = not (config.ray.retrievers and config.retriever.startswith(("http://", "https://")))
    require(served, "ray.retrievers", config.ray.retrievers, "0 where retriever is served already")
    require(config.engine.devices is None, "engine.devices", config.engine.devices, "none with --ray")
    if config.engine.servers_to_start:
        check_engine(config.engine)


class _Launch:
    """One run on a cluster."""

    def __init__(self, ray: Any, config: TrainConfig) -> None:
        self.config, self.settings, self.out = config, config.ray, Path(config.out).absolute()
        self.folder, self.logs = self.out / "ray", self.out / "logs"
        for folder in (self.folder, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.layout = lay_out(ray, config, self.folder, self.logs)
        self.urls = ("", "")

    def run(self) -> None:
        """Until the trainers are done. However it ends, nothing of it is left running."""
        try:
            for service in self.layout.services:
                service.begin()
            self._train()
        except KeyboardInterrupt:
            self._end_trainers(GRACE_SECONDS)
            raise
        finally:
            self._end_trainers(0)
            _at_once(lambda service: service.end(SERVICE_GRACE_SECONDS), self.layout.services)
            shutil.rmtree(self.folder / "weights", ignore_errors=True)

    def _train(self) -> None:
        """Start the trainers until they are done; RunStopped where that is no use."""
        in_vain, step = 0, _step(self.out)
        while True:
            try:
                self._await_services()
                self._start_trainers()
                return self._watch_trainers()
            except Lost as loss:
                reason = str(loss)
            self._end_trainers(0)
            self._stop_if_final()
            before, step = step, _step(self.out)
            in_vain = in_vain + 1 if step == before else 0
            if in_vain > self.settings.max_restarts:
                raise RunStopped(
                    f"{reason}; the trainers were started {in_vain} times without a new checkpoint; the "
                    f"last is of step {step}, in {self.out} (see {self.logs})"
                )
            logger.warning("%s; all trainers begin again after step %d", reason, step)
            time.sleep(pause_seconds(in_vain))

    def _await_services(self) -> None:
        """Return when all that are not given up answer; RunStopped where they do not by the deadline."""
        deadline = time.monotonic() + self.settings.start_seconds
        while not all(service.well.is_set() or service.given_up for service in self.layout.services):
            self._check_services()
            if time.monotonic() > deadline:
                silent = [s.name for s in self.layout.services if not (s.well.is_set() or s.given_up)]
                raise RunStopped(
                    f"ray: {', '.join(silent)}: no answer within ray.start_seconds = "
                    f"{self.settings.start_seconds:g} (see {self.logs})"
                )
            time.sleep(LOOK_EVERY_SECONDS / 4)
        self._check_services()

    def _check_services(self) -> None:
        """Raise RunStopped where all engines, or all replicas, are given up."""
        for services in (self.layout.engines, self.layout.replicas):
            if services and all(service.given_up for service in services):
                reasons = "; ".join(str(service.given_up) for service in services)
                raise RunStopped(
                    f"ray: {reasons}; the last checkpoint is kept in {self.out} (see {self.logs})"
                )

    def _start_trainers(self) -> None:
        """All at once, from the last checkpoint; they are told where the services are, and one another."""
        shutil.rmtree(self.folder / "weights", ignore_errors=True)
        self.urls = _urls(self.layout.engines), _urls(self.layout.replicas)
        engine, weights = self.config.engine, str(self.folder / "weights")
        places = {
            "engines": self.urls[0] or engine.urls,
            "retriever": self.urls[1] or self.config.retriever,
            "weights": weights if self.layout.engines else engine.sync_folder,
        }
        write_json(self.folder / "places.json", places)
        told = replace(self.config, resume=False, ray=RayConfig())
        atomic_write(self.folder / "train.yaml", yaml.safe_dump(asdict(told), sort_keys=False))
        ours = os.pathsep.join([OURS["PYTHONPATH"], *map(str, folders())])  # the user's modules, too
        hosts = [trainer.settle() for trainer in self.layout.trainers]
        for rank, trainer in enumerate(self.layout.trainers):
            environment = {
                **{"RANK": str(rank), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0"},
                **{"MASTER_ADDR": hosts[0][0], "MASTER_PORT": str(hosts[0][1]), "PYTHONPATH": ours},
            }
            command = ["-P", "-m", "scripts.on_ray.trainer", "--config", str(self.folder / "train.yaml")]
            trainer.start([PYTHON, *command], environment)

    def _watch_trainers(self) -> None:
        """Return when all have done their work. Raises Lost when one has not, or they hang."""
        progress, written = _newest(self.out), time.monotonic()
        while True:
            time.sleep(LOOK_EVERY_SECONDS)
            ends = [trainer.ended() for trainer in self.layout.trainers]
            if all(end is not None and end[0] == 0 for end in ends):
                return
            for trainer, end in zip(self.layout.trainers, ends, strict=True):
                if end is not None and end[0] != 0:
                    if end[0] == 2:  # told in one line: the others stop too, and may be saving
                        self._let_end(GRACE_SECONDS)
                    raise Lost(f"{trainer.name}: exit status {end[0]}: {end[1]}")
            self._check_services()
            for service in self.layout.services:
                if not service.given_up and service.url not in ",".join(self.urls).split(","):
                    raise Lost(f"{service.name} is at {service.url} now")
            if (newest := _newest(self.out)) != progress:
                progress, written = newest, time.monotonic()
            elif time.monotonic() - written > self.settings.quiet_seconds:
                raise Lost(
                    f"the trainers wrote nothing for ray.quiet_seconds = {self.settings.quiet_seconds:g}"
                )

    def _let_end(self, seconds: float) -> None:
        """Wait, for so long at most, until all trainers have ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(trainer.ended() is None for trainer in self.layout.trainers):
            time.sleep(LOOK_EVERY_SECONDS)

    def _end_trainers(self, seconds: float) -> None:
        _at_once(lambda trainer: trainer.stop(seconds), self.layout.trainers)

    def _stop_if_final(self) -> None:
        """Raise RunStopped where the run has stopped itself for a reason that stays."""
        try:
            said = read_run(self.out)
        except DataError:
            return
        if said.get("status") == RunStatus.STOPPED and str(said.get("reason")).startswith(FINAL):
            raise RunStopped(str(said["reason"]))


def _at_once(act: Callable[[Any], None], members: Sequence[Member]) -> None:
    with ThreadPoolExecutor(max(1, len(members))) as threads:
        list(threads.map(act, members))


def _urls(services: Sequence[Service]) -> str:
    """Return the URLs of those that are not given up."""
    return ",".join(service.url for service in services if not service.given_up)


def _step(out: Path) -> int:
    found = latest_checkpoint(out / "checkpoints")
    return found.step if found else 0


def _newest(out: Path) -> float:
    """When the trainers last wrote a number, a transcript or a checkpoint."""
    files = [*out.glob("*.jsonl"), *out.glob("checkpoints/*"), *out.glob("evaluations/*/*")]
    times = []
    for file in files:
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue  # it was pruned meanwhile
    return max(times, default=0.0)
