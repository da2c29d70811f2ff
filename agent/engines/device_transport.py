"""New weights for vLLM servers through the memory of GPUs, over vLLM 0.32's own weight transfer.

Each server is asked to start an update, to receive every tensor under its checkpoint's name, and to finish.
NCCL: this process is rank 0 of a group with the workers of one server, and broadcasts tensor by tensor.
IPC: servers on this process's GPU map the tensors; what they need to do so is pickled by us, and unpickled
by vLLM. The wire is tested against a fake server and vLLM's own parsers; not run on a GPU.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from agent.engines.transport import Staged, Transport
from data.errors import ConfigError, EngineError
from retriever_server.client.pool import Server

Tensors = Callable[["dict[str, Tensor] | None"], dict[str, Tensor]]
"""Weights by the names of a checkpoint as servers load it; None: the model's own."""


def device_arguments(backend: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and environment of a server for such a transport.

    Raises ConfigError where torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError(f"engine.transport = {backend!r}: torch sees no CUDA device here; allowed: folder")
    unpickles = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if backend == "ipc" else {}
    return ["--weight-transfer-config", f'{{"backend":"{backend}"}}'], unpickles


class DeviceTransport(Transport):
    """Base of both: the weights lie as a copy on this process's GPU until all have taken them."""

    def __init__(self, tensors: Tensors, device: str = "cuda") -> None:
        self._tensors, self._device = tensors, device
        self._joined: dict[Server, int] = {}

    async def stage(self, state: dict[str, Tensor] | None, version: int) -> None:
        self.staged = None  # not two copies at once
        self.staged = Staged(version, tensors=await asyncio.to_thread(self._copy, state))

    def _copy(self, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        copied, seen = {}, set()
        for name, tensor in self._tensors(state).items():
            place = (tensor.data_ptr(), tensor.shape)
            if place not in seen:  # a tied head is its embedding: no checkpoint has it
                seen.add(place)
                copied[name] = tensor.detach().to(self._device, copy=True).contiguous()
        return copied

    async def load(self, server: Server, staged: Staged) -> None:
        """Have the server receive them; one that was away is joined anew."""
        if self._joined.get(server) != server.lives:
            await self._join(server)
            self._joined[server] = server.lives
        await server.ask("/start_weight_update")
        await self._send(server, staged.tensors)
        await server.ask("/finish_weight_update")

    async def _join(self, server: Server) -> None:
        raise NotImplementedError

    async def _send(self, server: Server, tensors: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.staged = None


class NCCLGroup:
    """This process, of rank 0, and the workers of one server, over torch's own NCCL."""

    def __init__(self, unique_id: bytes, size: int) -> None:
        """Waits for the others. Then the one addition that vLLM's side begins with."""
        from torch.cuda import nccl

        self._nccl, self._stream = nccl, torch.cuda.Stream()
        self._comm = nccl.init_rank(size, unique_id, 0)
        nccl.all_reduce([torch.zeros(1, device="cuda")], streams=[self._stream], comms=[self._comm])
        self._stream.synchronize()

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Send all; returns when they are sent."""
        self._stream.wait_stream(torch.cuda.default_stream())
        for tensor in tensors.values():
            self._nccl.broadcast([tensor], 0, streams=[self._stream], comms=[self._comm])
        self._stream.synchronize()


def _new_id() -> bytes:
    from torch.cuda import nccl

    return nccl.unique_id()


class NCCLTransport(DeviceTransport):
    """Weights go from GPU to GPU, over hosts too. A group for each server: one that dies is alone."""

    def __init__(
        self,
        tensors: Tensors,
        device: str = "cuda",
        connect: Callable[[bytes, int], NCCLGroup] = NCCLGroup,
        new_id: Callable[[], bytes] = _new_id,
    ) -> None:
        super().__init__(tensors, device)
        self._connect, self._new_id = connect, new_id
        self._groups: dict[Server, NCCLGroup] = {}

    async def _join(self, server: Server) -> None:
        size = 1 + int((await server.get("/get_world_size"))["world_size"])
        unique_id = self._new_id()
        info = {
            "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
            "rank_offset": 1,
            "world_size": size,
            "packed": False,
        }
        self._groups[server], _ = await _both(
            in_thread(self._connect, unique_id, size),
            server.ask("/init_weight_transfer_engine", {"init_info": info}),
        )

    async def _send(self, server: Server, tensors: Mapping[str, Tensor]) -> None:
        await _both(
            server.ask("/update_weights", {"update_info": described(tensors)}),
            in_thread(self._groups[server].broadcast, tensors),
        )


class IPCTransport(DeviceTransport):
    """Weights go to servers on the GPU that this process computes on; nothing is copied on the way."""

    def __init__(
        self, tensors: Tensors, device: str = "cuda", share: Callable[[Tensor], Any] | None = None
    ) -> None:
        """share: gives what another process maps a tensor with, by the GPU's UUID."""
        super().__init__(tensors, device)
        self._share = share or _share

    async def _join(self, server: Server) -> None:
        await server.ask("/init_weight_transfer_engine", {"init_info": {"packed": False}})

    async def _send(self, server: Server, tensors: Mapping[str, Tensor]) -> None:
        handles = pickle.dumps([self._share(tensor) for tensor in tensors.values()])
        info = described(tensors) | {"ipc_handles_pickled": base64.b64encode(handles).decode()}
        await server.ask("/update_weights", {"update_info": info})


def _share(tensor: Tensor) -> dict[str, Any]:
    from torch.multiprocessing.reductions import reduce_tensor

    uuid = torch.cuda.get_device_properties(tensor.device).uuid
    torch.cuda.synchronize()
    return {str(uuid): reduce_tensor(tensor)[1]}


def described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names, types and shapes as vLLM wants to be told of what comes."""
    return {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


async def in_thread(act: Callable[..., Any], *arguments: Any) -> Any:
    """Run `act` in a thread that no exit waits for: NCCL waits for a lost peer for ever.

    Raises EngineError for a RuntimeError, which is what NCCL's are.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(value)

    def run() -> None:
        value, error = None, None
        try:
            value = act(*arguments)
        except RuntimeError as raised:
            error = EngineError(f"engine vllm: {raised}")
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, daemon=True).start()
    return await done


async def _both(*acts: Any) -> list[Any]:
    """Await both; the first failure ends the wait for the other."""
    tasks = [asyncio.ensure_future(act) for act in acts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
