"""Images for a policy: a picture becomes tokens, pixels, and vectors where its tokens stand.

The agent asks for the tokens, the engine and the trainer for the vectors, from the same pixels of the same
file, so what was sampled is what is trained. Only models that read a picture as tokens in one line, like
Idefics3 and SmolVLM, are supported: those that give it positions in two or three dimensions, or let its
tokens see each other both ways, need more than vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from agent.trajectory import Picture
from data.errors import ConfigError, DataError
from data.pages.images import read_image

REMEMBERED_PICTURES = 16
"""Pixels are made anew after this many others: a page in crops is some fifty megabytes."""

IN_ONE_LINE = ("idefics3", "smolvlm")
"""Model types that are known to read a picture as tokens in one line; tests compare the first with its own
forward."""


@dataclass(frozen=True)
class Seen:
    """A picture as the policy gets it."""

    token_ids: list[int]
    """Its tokens in the context, markup around it included."""
    pixels: dict[str, Tensor]
    """Arguments of the model's `get_image_features`."""


class Vision:
    """A policy's processor, and how its model turns pictures into vectors."""

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self.processor, self.image_token_id = processor, image_token_id
        self._folder: TemporaryDirectory[str] | None = None
        self._kept: dict[str, Path] = {}
        self.see = lru_cache(REMEMBERED_PICTURES)(self._see)

    def keep(self, source: str, content: bytes) -> None:
        """Keep the bytes of a picture under the name `source`, which is no file of this machine."""
        if source in self._kept:
            return
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="sleuth-pictures-")
        path = Path(self._folder.name) / str(len(self._kept))
        path.write_bytes(content)
        self._kept[source] = path

    def has(self, source: str) -> bool:
        """Return whether `keep` was given this picture."""
        return source in self._kept

    @classmethod
    def load(cls, source: str, config: PretrainedConfig) -> Vision:
        """Load the processor in a policy's folder or on the hub. Raises ConfigError where there is none."""
        from transformers import AutoProcessor

        try:
            processor: Any = AutoProcessor.from_pretrained(source)
            image_token: str = processor.image_token
        except (OSError, ValueError, ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"policy = {source!r}: its image processor does not load: {reason}") from error
        token_id = getattr(config, "image_token_id", None)
        if token_id is None:
            token_id = processor.tokenizer.convert_tokens_to_ids(image_token)
        return cls(processor, token_id)

    def _see(self, source: str) -> Seen:
        """The tokens and pixels of a picture: one that is kept, or what `data.pages.images.read_image` takes.

        Raises DataError naming the source where it cannot be read.
        """
        out = self.processor(
            text=[self.processor.image_token],
            images=[[read_image(str(self._kept.get(source, source)))]],
            add_special_tokens=False,
            return_tensors="pt",
        )
        token_ids = out.pop("input_ids")[0].tolist()
        out.pop("attention_mask", None)
        return Seen(token_ids, dict(out))

    def vectors(self, trunk: PreTrainedModel, source: str) -> Tensor:
        """Compute the vectors of a picture (N, H): one vector an image token, in order."""
        pixels = {name: tensor.to(trunk.device) for name, tensor in self.see(source).pixels.items()}
        found = trunk.get_image_features(**pixels, return_dict=True).pooler_output  # type: ignore[operator]
        parts = found if isinstance(found, list | tuple) else [found]
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    def embed(
        self,
        trunk: PreTrainedModel,
        token_ids: Tensor,
        pictures: Sequence[Picture],
        vectors: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The inputs (R, T, H) of the language model: embeddings of tokens, and vectors of the pictures.

        token_ids (R, T); a picture's `start` counts in the flattened rows. Image tokens outside of
        pictures, which only a policy can write, are words like others. vectors: by source, where they are
        known already. Raises DataError where the picture is no longer the one that was shown.
        """
        known = {} if vectors is None else vectors
        embedded = trunk.get_input_embeddings()(token_ids)
        if not pictures:
            return embedded
        for source in {picture.source for picture in pictures} - known.keys():
            known[source] = self.vectors(trunk, source)
        is_image = token_ids.flatten() == self.image_token_id
        places = []
        for picture in pictures:
            inside = is_image[picture.start : picture.start + picture.tokens].nonzero()[:, 0]
            if len(inside) != len(known[picture.source]):
                raise DataError(f"{picture.source}: changed since it was shown to the policy")
            places.append(inside + picture.start)
        found = torch.cat([known[picture.source] for picture in pictures]).to(embedded.dtype)
        flat = embedded.flatten(0, 1).index_copy(0, torch.cat(places), found)
        return flat.view_as(embedded)


def reads_pictures(config: PretrainedConfig) -> bool:
    """Return whether the model of this configuration takes pictures in the one way that is supported here."""
    return config.model_type in IN_ONE_LINE


def text_trunk(trunk: Any) -> Any:
    """The language model inside the trunk of one that also sees; any other trunk as it is."""
    return trunk.get_decoder() if hasattr(trunk, "get_image_features") else trunk
