"""Transports of new weights to vLLM servers: through a folder, whole or as LoRA adapters.

`stage` makes weights ready once; `load` has one paused server take them; `settle` drops what none needs.
Through the memory of GPUs: agent/engines/device_transport.py.
"""

from __future__ import annotations

import asyncio
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from retriever_server.client.pool import Server, ServerLost

RELOAD = ("sleuth_reload", "reload_weights")
"""Methods of a server's worker that load weights: of ours (worker/sleuth_worker.py), of vLLM's own."""
ADAPTER = "policy"
"""Name of the adapter in requests."""

Write = Callable[[Path, "dict[str, Tensor] | None"], None]
"""Writes weights into a folder under the names that servers read; None: the model's own."""


@dataclass(frozen=True)
class Staged:
    """Weights that lie ready: in a folder, or in memory."""

    version: int
    folder: Path = Path()
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Transport(ABC):
    """Brings the weights of a VLLMEngine to its servers."""

    staged: Staged | None = None
    """The newest."""
    model: str | None = None
    """Model that requests name once weights are loaded; None: the server's own."""

    @abstractmethod
    async def stage(self, state: dict[str, Tensor] | None, version: int) -> None:
        """Make weights ready; None: the model's own."""

    @abstractmethod
    async def load(self, server: Server, staged: Staged) -> None:
        """Have a paused server take them. Raises EngineError where it does not."""

    def settle(self) -> None:  # noqa: B027 (the newest stays, for servers that come back)
        """Drop what is neither the newest nor being loaded."""

    @abstractmethod
    def close(self) -> None:
        """Drop all."""


class FolderTransport(Transport):
    """Safetensors in a folder that the servers see."""

    def __init__(self, write: Write, folder: Path) -> None:
        self._write, self._folder = write, folder
        self._kept: list[Path] = []
        self._loading: list[Path] = []

    async def stage(self, state: dict[str, Tensor] | None, version: int) -> None:
        folder = self._folder / f"weights-{version:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        await asyncio.to_thread(self._write, folder, state)
        self._kept.append(folder)
        self.staged = Staged(version, folder)

    async def load(self, server: Server, staged: Staged) -> None:
        self._loading.append(staged.folder)
        try:
            await self._read(server, str(staged.folder))
        finally:
            self._loading.remove(staged.folder)

    async def _read(self, server: Server, folder: str) -> None:
        try:
            await call_worker(server, RELOAD[0], weights_path=folder)
        except ServerLost:  # it lives, but was started without our worker
            await call_worker(server, RELOAD[1], weights_path=folder)

    def settle(self) -> None:
        newest = self.staged and self.staged.folder
        for folder in {*self._kept} - {newest, *self._loading}:
            shutil.rmtree(folder, ignore_errors=True)
        self._kept = [folder for folder in self._kept if folder.exists()]

    def close(self) -> None:
        for folder in self._kept:
            shutil.rmtree(folder, ignore_errors=True)


class AdapterTransport(FolderTransport):
    """LoRA adapters in a folder; the weights under them stay those that the servers were started with.

    vLLM's own `load_inplace` would read the folder again for every batch: our worker replaces it once.
    """

    model = ADAPTER

    async def _read(self, server: Server, folder: str) -> None:
        known = await server.get("/v1/models")
        if any(model["id"] == ADAPTER for model in known["data"]):
            await call_worker(server, "sleuth_adapter", name=ADAPTER, path=folder)
        else:
            await server.ask("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": folder})


async def call_worker(server: Server, method: str, **arguments: str) -> None:
    """Call a method of the server's workers."""
    await server.ask("/collective_rpc", {"method": method, "kwargs": arguments})
