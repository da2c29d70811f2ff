"""vLLM's wire around the hf engine: the routes of 0.32 that we use, with faults to order."""

from __future__ import annotations

import asyncio
import copy
import json
import queue
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine

HEAD = "lm_head.weight"
TRANSFER = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


class FakeVLLM:
    """`app` answers; the attributes say what happened, and what shall go wrong."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = HFEngine(model, tokenizer)
        self.version = "default"
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.dead = self.hangs = self.stale_head = False
        self.worker = True
        self.base = copy.deepcopy(model.state_dict())
        self.adapter: str | None = None
        self.arriving: queue.Queue[Any] = queue.Queue()
        """Tensors of an update that a transfer brings."""
        self.updating: dict[str, Any] | None = None
        self.transfers: list[dict[str, Any]] = []
        self.running = asyncio.Event()
        self.running.set()
        self.app = FastAPI()
        self.app.middleware("http")(self._answer_or_die)
        self.app.get("/health")(lambda: {})
        self.app.get("/v1/models")(self.models)
        self.app.get("/get_world_size")(lambda: {"world_size": 1})
        self.app.post("/inference/v1/generate")(self.generate)
        self.app.post("/collective_rpc")(self.call)
        self.app.post("/v1/load_lora_adapter")(self.load_lora_adapter)
        for path in ("pause", "resume", "update_weight_version", "reset_prefix_cache", *TRANSFER):
            self.app.post(f"/{path}")(getattr(self, path))

    async def _answer_or_die(self, request: Request, following: Any) -> Any:
        if self.dead:
            return JSONResponse({"error": "EngineCore encountered an issue"}, 503)
        return await following(request)

    async def models(self) -> dict[str, Any]:
        """The policy, and the adapter over it."""
        adapters = [{"id": self.adapter, "max_model_len": None}] if self.adapter else []
        return {"data": [{"id": "policy folder", "max_model_len": 256}, *adapters]}

    async def generate(self, body: dict[str, Any]) -> Any:
        """A completion, and which weights wrote it."""
        if body.get("model") not in (None, self.adapter):
            return JSONResponse({"error": "The model does not exist."}, 404)
        self.requests.append(body)
        name = f"request {len(self.requests)}"
        await self.running.wait()
        while self.hangs:
            await asyncio.sleep(0.02)
        given, before = body["sampling_params"], self.version
        names = ("temperature", "top_p", "top_k", "max_tokens", "seed")
        sampling = Sampling(stop=tuple(given["stop"]), **{name: given.get(name) for name in names})
        done = await self.engine.generate(body["token_ids"], sampling, name)
        await self.engine.release(name)
        pairs = zip(done.token_ids, done.logprobs, strict=True)
        choice = {
            "token_ids": done.token_ids,
            "logprobs": {"content": [{"token_id": i, "logprob": p} for i, p in pairs]},
            "finish_reason": str(done.finish_reason),
            "weight_versions": [{"version": before, "start": 0, "end": len(done.token_ids)}],
        }
        return {"choices": [choice]}

    async def pause(self, mode: str) -> None:
        """Completions that come wait."""
        self.calls.append(f"pause {mode}")
        self.running.clear()

    async def resume(self) -> None:
        """They go on."""
        self.calls.append("resume")
        self.running.set()

    async def call(self, body: dict[str, Any]) -> Any:
        """New weights from a folder; with `stale_head` the head keeps its own."""
        self.calls.append(body["method"])
        if body["method"] != "reload_weights" and not self.worker:
            return JSONResponse({"error": "AttributeError: no such method"}, 500)
        if body["method"] == "sleuth_adapter":
            assert body["kwargs"]["name"] == self.adapter
            self._adapt(Path(body["kwargs"]["path"]))
            return {"results": [None]}
        state = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        if self.stale_head:
            state[HEAD] = self.engine.model.state_dict()[HEAD].clone()
        self.engine.model.load_state_dict(state)
        return {"results": [None]}

    async def load_lora_adapter(self, body: dict[str, Any]) -> Any:
        """The first adapter; vLLM refuses a second of its name."""
        if body["lora_name"] == self.adapter:
            return JSONResponse({"error": "has already been loaded"}, 400)
        self.calls.append("load_lora_adapter")
        self.adapter = body["lora_name"]
        self._adapt(Path(body["lora_path"]))
        return PlainTextResponse("Success: LoRA adapter added successfully.")

    def _adapt(self, folder: Path) -> None:
        """The first weights and what a folder's adapters add to them."""
        config = json.loads((folder / "adapter_config.json").read_text())
        state, low = dict(self.base), load_file(folder / "adapter_model.safetensors")
        for name in [name for name in low if ".lora_A." in name]:
            assert name.split(".lora_")[0].rpartition(".")[2] in config["target_modules"]
            change = low[name.replace("lora_A", "lora_B")] @ low[name]
            of = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            state[of] = state[of] + change * config["lora_alpha"] / config["r"]
        self.engine.model.load_state_dict(state)

    async def init_weight_transfer_engine(self, body: dict[str, Any]) -> None:
        """Join the trainer."""
        self.transfers.append(body["init_info"])

    async def start_weight_update(self) -> None:
        """Begin an update: what comes now belongs together."""
        self.updating = {}

    async def update_weights(self, body: dict[str, Any]) -> None:
        """Receive what is described, in its order, from `arriving`."""
        info = body["update_info"]
        self.transfers.append(info)
        assert self.updating is not None
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            tensor = await asyncio.to_thread(self.arriving.get, timeout=5)
            assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape)
            self.updating[name] = tensor.clone()

    async def finish_weight_update(self) -> None:
        """All of it is the model from here on."""
        self.calls.append("transferred")
        self.engine.model.load_state_dict(self.updating or {}, strict=False)
        self.updating = None

    async def update_weight_version(self, body: dict[str, str]) -> dict[str, str]:
        """Set the version that the server gives its weights from now on."""
        self.version = body["new_version"]
        return body

    async def reset_prefix_cache(self, reset_running_requests: bool) -> dict[str, bool]:
        """Forget what the old weights made."""
        self.calls.append(f"reset {reset_running_requests}")
        await self.engine.update_weights(None, 0)
        return {"success": True}
