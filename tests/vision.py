"""A tiny policy with eyes, and pages for it, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerBase

from agent.engines.base import Completion, FinishReason
from agent.policy import Policy, load_policy
from data.jsonl import write_json
from data.records import Hit, Passage
from retriever_server.training.builders.tiny_vision import write_vlm
from tests.fakes import SIZES, byte_tokenizer

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def seeing_policy(folder: Path, protocol: str = "compact") -> Policy:
    """A random Idefics3 of two layers that takes 16 tokens a picture, through a policy folder."""
    settings = {"text_config": SIZES, "vision_config": VISION}
    write_vlm(settings, byte_tokenizer(), 0, folder)
    write_json(folder / "sleuth.json", {"protocol": protocol})
    policy = load_policy(str(folder), "cpu")
    with torch.no_grad():  # wider than the usual initialisation, so that a picture matters
        for parameter in policy.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return policy


def draw_pages(folder: Path, count: int = 3) -> list[str]:
    """Files of pictures that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        page = Image.new("RGB", (96, 64), (255, 255, 255 - 80 * number))
        ImageDraw.Draw(page).ellipse((5 * number, 5, 40 + 10 * number, 50), fill=(200 - 60 * number, 40, 90))
        paths.append(str(folder / f"{number}.png"))
        page.save(paths[-1])
    return paths


class PageSearcher:
    """Finds the pages whose numbers are in the query, else the first; as long as there is one."""

    def __init__(self, pages: list[str], text: str = "") -> None:
        self.passages = [Passage(f"p{n}", text, f"Page {n}", image=page) for n, page in enumerate(pages)]

    async def search(self, query: str, k: int) -> list[Hit]:
        """The first k pages asked for."""
        asked = [p for n, p in enumerate(self.passages) if str(n) in query] or self.passages
        return [Hit(passage, 1.0, "pages") for passage in asked[:k]]


class Turns:
    """An engine that writes the given turns through a tokenizer of any kind, and notes what it was shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *turns: str) -> None:
        self.tokenizer, self.turns, self.shown = tokenizer, list(turns), []

    async def generate(self, prompt_ids, sampling, trajectory_id, pictures=()) -> Completion:
        """The next turn."""
        self.shown.append(list(pictures))
        ids = self.tokenizer.encode(self.turns.pop(0), add_special_tokens=False)
        return Completion(ids, [-1.0] * len(ids), FinishReason.STOP, 0)

    async def release(self, trajectory_id) -> None:
        """Nothing to let go of."""

    async def update_weights(self, state, version) -> None:
        """There are none."""
