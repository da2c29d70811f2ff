"""An observation as tokens: text, and where a policy has eyes the tokens of the pictures in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.search_tool import PICTURE
from agent.trajectory import Picture
from data.errors import DataError
from data.records import Hit

if TYPE_CHECKING:
    from agent.vision import Vision


@dataclass(frozen=True)
class Observation:
    """What the policy is shown after a turn."""

    text: str
    """For people: a picture is "[picture]"."""
    token_ids: list[int]
    pictures: tuple[Picture, ...] = ()
    """`start` counts in `token_ids`."""


async def find_pictures(hits: Sequence[Hit], vision: Vision | None, searcher: Any) -> list[str]:
    """The sources of the hits' pictures in order, all of them read; none for a policy without eyes.

    A picture that a server found is asked of that server, by its client alone, and kept for training under
    the name "URL@generation". Raises DataError naming one that cannot be read, or a RetrieverError.
    """
    if vision is None:
        return []
    found = [hit for hit in hits if hit.passage.image]
    sources = [await _source(hit, vision, searcher) for hit in found]
    for source in sources:
        vision.see(source)
    return sources


async def _source(hit: Hit, vision: Vision, searcher: Any) -> str:
    image = hit.passage.image
    if "://" not in image:
        return image
    source = f"{image}@{hit.generation}"
    if not vision.has(source):
        if not hasattr(searcher, "picture"):
            raise DataError(f"{image}: on a server, and the searcher fetches no pictures")
        vision.keep(source, await searcher.picture(hit.passage))
    return source


def lay_out(
    text: str, sources: Sequence[str], encode: Callable[[str], list[int]], vision: Vision | None
) -> Observation:
    """The observation with the tokens of one source after the other at each `PICTURE`.

    The text between pictures is encoded piece by piece, so that where a picture begins is exact.
    """
    if vision is None or not sources:
        return Observation(text, encode(text))
    first, *others = text.split(PICTURE)
    token_ids, pictures = encode(first), []
    for source, after in zip(sources, others, strict=False):  # others may have been cut off
        shown = vision.see(source).token_ids
        pictures.append(Picture(source, len(token_ids), len(shown)))
        token_ids = token_ids + shown + encode(after)
    return Observation(text.replace(PICTURE, "[picture]"), token_ids, tuple(pictures))
