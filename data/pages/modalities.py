"""Modalities of items beside text, and their readers: images here, others by whoever registers them.

    register("audio", read_wav)  # {"id": "7", "audio": "a.wav"} is a passage now, "audio" an encoder's inputs

The name is the key in a record of a corpus and in what models of sentence-transformers are given. Installed
packages register their own: entry points of the group `sleuth.modalities` name modules that call `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.records import Item

GROUP = "sleuth.modalities"
_TAKEN = ("id", "_id", "title", "text", "contents", "metadata", "image", "message")


@dataclass(frozen=True)
class _Modality:
    read: Callable[[str | bytes], Any]
    samples: Callable[[], Sequence[bytes]]


def _read_image(source: str | bytes) -> Any:
    from data.pages.images import read_image

    return read_image(source)


def _sample_images() -> list[bytes]:
    from data.pages.images import sample_images

    return sample_images()


_KNOWN = {"image": _Modality(_read_image, _sample_images)}


def register(
    name: str, read: Callable[[str | bytes], Any], samples: Callable[[], Sequence[bytes]] = tuple
) -> None:
    """Let items hold a `name`; `read` makes of a file, or its bytes, what models are given.

    read: called in threads and workers; raises DataError "SOURCE: what is wrong". For audio and video
    sentence-transformers takes {"array", "sampling_rate"} and {"array", "video_metadata"}. samples: gives
    files of different length, with which an encoder is tested before it is used; without it is not.
    Raises ConfigError for a name that records of a corpus use already.
    """
    from data.errors import require

    allowed = f"a name, none of {', '.join(_TAKEN)}"
    require(name.isidentifier() and name not in _TAKEN, "modality", name, allowed)
    _KNOWN[name] = _Modality(read, samples)


def modalities() -> tuple[str, ...]:
    """The names of all that is registered, image first."""
    _load_installed()
    return tuple(_KNOWN)


def kinds() -> tuple[str, ...]:
    """Return the kinds of input that an encoder may take.   -> ("text", "image", "text+image", ...)"""
    return ("text", *(kind for name in modalities() for kind in (name, f"text+{name}")))


def read(item: Item) -> Any:
    """Read the file of an item as models take it: the picture of an image. Raises DataError."""
    from data.errors import require

    require(item.modality in modalities(), "modality", item.modality, f"one of {', '.join(modalities())}")
    return _KNOWN[item.modality].read(item.image)


def samples(name: str) -> Sequence[bytes]:
    """Small files of this modality, of different shape, for the self-test of an encoder."""
    return _KNOWN[name].samples()


@cache
def _load_installed() -> None:
    for each in entry_points(group=GROUP):
        each.load()
