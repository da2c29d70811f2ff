"""vLLM's wire around the hf engine: the routes of 0.32 that we use, with faults to order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine

HEAD = "lm_head.weight"


class FakeVLLM:
    """`app` answers; the attributes say what happened, and what shall go wrong."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = HFEngine(model, tokenizer)
        self.version = "default"
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.dead = self.hangs = self.stale_head = False
        self.worker = True
        self.running = asyncio.Event()
        self.running.set()
        self.app = FastAPI()
        self.app.middleware("http")(self._answer_or_die)
        self.app.get("/health")(lambda: {})
        self.app.get("/v1/models")(lambda: {"data": [{"max_model_len": 256}]})
        self.app.post("/inference/v1/generate")(self.generate)
        self.app.post("/collective_rpc")(self.call)
        for path in ("/pause", "/resume", "/update_weight_version", "/reset_prefix_cache"):
            self.app.post(path)(getattr(self, path[1:]))

    async def _answer_or_die(self, request: Request, following: Any) -> Any:
        if self.dead:
            return JSONResponse({"error": "EngineCore encountered an issue"}, 503)
        return await following(request)

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion, and which weights wrote it."""
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
        state = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        if self.stale_head:
            state[HEAD] = self.engine.model.state_dict()[HEAD].clone()
        self.engine.model.load_state_dict(state)
        return {"results": [None]}

    async def update_weight_version(self, body: dict[str, str]) -> dict[str, str]:
        """What the server calls its weights from now on."""
        self.version = body["new_version"]
        return body

    async def reset_prefix_cache(self, reset_running_requests: bool) -> dict[str, bool]:
        """Forget what the old weights made."""
        self.calls.append(f"reset {reset_running_requests}")
        await self.engine.update_weights(None, 0)
        return {"success": True}
