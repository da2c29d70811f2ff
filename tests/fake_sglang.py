"""A user's engine, shaped like a client of SGLang, and a fake of its server around the hf engine."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from safetensors.torch import load_file
from torch import Tensor

from agent.engines.base import Completion, Engine, FinishReason, Sampling
from agent.engines.hf import HFEngine
from agent.policy import Policy
from agent.trajectory import Picture

REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class SGLangEngine(Engine):
    """Completions by `/generate`; weights by a folder and `/update_weights_from_disk`."""

    def __init__(self, url: str, policy: Policy) -> None:
        self.policy, self._http = policy, httpx.AsyncClient(base_url=url, timeout=30)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        trajectory_id: str,
        pictures: Sequence[Picture] = (),
    ) -> Completion:
        parameters = {
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
            "no_stop_trim": True,
            "sampling_seed": sampling.seed,
        }
        asked = {"input_ids": prompt_ids, "sampling_params": parameters, "return_logprob": True}
        answer = await self._post("/generate", asked)
        told = answer["meta_info"]
        logprobs = [logprob for logprob, *_ in told["output_token_logprobs"]]
        reason = REASONS[told["finish_reason"]["type"]]
        return Completion(answer["output_ids"], logprobs, reason, int(told["weight_version"]))

    async def update_weights(self, state: dict[str, Tensor] | None, version: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.policy.model.save_pretrained(folder, state_dict=state)
            await self._post(
                "/update_weights_from_disk", {"model_path": folder, "weight_version": str(version)}
            )
        self.weights_version = version

    async def probe(
        self, prompts: Sequence[list[int]], sampling: Sampling
    ) -> Mapping[str, Sequence[Completion]]:
        probed = (self.generate(ids, sampling, f"probe {i}") for i, ids in enumerate(prompts))
        return {str(self._http.base_url): await asyncio.gather(*probed)}

    async def close(self) -> None:
        await self._http.aclose()

    async def _post(self, path: str, body: Any) -> Any:
        return (await self._http.post(path, json=body)).raise_for_status().json()


class FakeSGLang:
    """`app` answers; `versions` are those of the weights that it was given."""

    def __init__(self, policy: Policy) -> None:
        self.engine, self.asked, self.versions = HFEngine(policy.model, policy.tokenizer), 0, [0]
        self.app = FastAPI()
        self.app.post("/generate")(self.generate)
        self.app.post("/update_weights_from_disk")(self.update_weights_from_disk)

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion with the log-probs of its tokens."""
        self.asked += 1
        name, given = f"request {self.asked}", body["sampling_params"]
        sampling = Sampling(
            given["temperature"],
            max_tokens=given["max_new_tokens"],
            stop=tuple(given["stop"]),
            seed=given["sampling_seed"],
        )
        done = await self.engine.generate(body["input_ids"], sampling, name)
        await self.engine.release(name)
        told = {
            "finish_reason": {"type": str(done.finish_reason)},
            "output_token_logprobs": list(zip(done.logprobs, done.token_ids, strict=True)),
            "weight_version": str(done.weights_version),
        }
        return {"output_ids": done.token_ids, "meta_info": told}

    async def update_weights_from_disk(self, body: dict[str, str]) -> dict[str, bool]:
        """Weights that lie in a folder."""
        self.versions.append(int(body["weight_version"]))
        state = load_file(Path(body["model_path"]) / "model.safetensors")
        await self.engine.update_weights(state, self.versions[-1])
        return {"success": True}
