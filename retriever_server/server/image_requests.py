"""Images in requests, checked before any search, and thumbnails of the images of a corpus.

A request brings an image as bytes and names no file or URL. A thumbnail is looked up by the id of a passage.
Both are decoded in two threads, so that they neither hold up the searches nor fill the memory.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.pages.images import ImageLimits, check_image, image_size
from data.records import Input, Item
from retriever_server.retriever import corpora_in
from retriever_server.server.backends import RetrieverLease
from retriever_server.server.batching import Batcher, Batching
from retriever_server.server.config import Limits
from retriever_server.server.schema import ImageInput, texts_of

_log = logging.getLogger(__name__)

THUMBNAIL_SIDES = (16, 2048)
"""The smallest and the largest that a client may ask for, in pixels."""
_KEPT_BYTES = 64 << 20
_DECODING = Batching(max_batch=1, window_seconds=0, threads=2, max_waiting=1024)
_IMAGES_OF_MOST_PIXELS = 2
"""The most pixels of all images of a request together, in images of the most pixels."""
_DATA_URL = re.compile(r"data:([^;,]*)(?:;[^;,]*)*?;base64,", re.IGNORECASE)
_NOT_SAID = ("", "application/octet-stream")


class ImageReader:
    """Reads the images of requests, within limits, and keeps the thumbnails that were asked for last."""

    def __init__(self, limits: Limits, folders: Sequence[str | Path] = ()) -> None:
        """folders: where images of a corpus may lie beside its own."""
        self._folders = [Path(folder).resolve() for folder in folders]
        self._most = limits.max_images
        self._limits = ImageLimits(max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
        self.batcher = Batcher(_DECODING)
        self._kept: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._kept_bytes, self._lock = 0, threading.Lock()

    async def read(self, inputs: Sequence[str | ImageInput], place: str) -> list[Input]:
        """Return texts, and items whose images have been decoded once, as a check.

        Raises DataError "PLACE.0.image: what is wrong" for the first that is no image or beyond a limit.
        """
        coded = [each.image if isinstance(each, ImageInput) else None for each in inputs]
        places = [f"{place}.{i}.image" for i, image in enumerate(coded) if image is not None]
        if len(places) > self._most:
            raise DataError(f"{place}: {len(places)} images, at most {self._most} are allowed")
        measured = await self._each(_measured, [image for image in coded if image is not None], places)
        most = _IMAGES_OF_MOST_PIXELS * self._limits.max_pixels
        if (pixels := sum(size for _, size in measured)) > most:
            raise DataError(f"{place}: images of {pixels:,} pixels together, over {most:,}")
        contents = iter(await self._each(check_image, [content for content, _ in measured], places))
        pairs = zip(coded, texts_of(inputs), strict=True)
        return [text if image is None else Item(next(contents), text) for image, text in pairs]

    async def _each(
        self, act: Callable[[Any, ImageLimits], Any], images: Sequence[Any], places: Sequence[str]
    ) -> list[Any]:
        """Return `act` of each image, in a thread; DataError names the place of the first that is none."""
        made = await self.batcher.run(
            act.__name__, lambda items: [act(item, self._limits) for item in items], images
        )
        for place, outcome in zip(places, made, strict=True):
            if isinstance(outcome, DataError):
                raise DataError(f"{place}: {outcome}")
            if isinstance(outcome, Exception):
                raise outcome
        return made

    async def thumbnail(self, lease: RetrieverLease, passage_id: str, side: int) -> bytes | None:
        """Return a JPEG of the image of this passage, at most `side` wide and high; None without one.

        Raises DataError for a wrong side, a RetrieverError where another server does not answer.
        """
        smallest, largest = THUMBNAIL_SIDES
        if not smallest <= side <= largest:
            raise DataError(f"side = {side}: must be from {smallest} to {largest}")
        key = (lease.generation, passage_id, side)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]

        def work(ids: list[str]) -> list[bytes | None]:
            with lease:
                return [_shrunk(lease, each, side, self._folders) for each in ids]

        [made] = await self.batcher.run((lease, "thumbnail", side), work, [passage_id])
        if isinstance(made, DataError):
            # The file's name stays here: a client learns of no path of the server.
            _log.warning("no thumbnail of passage %r: %s", passage_id, made)
            return None
        if isinstance(made, Exception):
            raise made
        if made is not None:
            self._keep(key, made)
        return made

    def _keep(self, key: tuple[str, str, int], made: bytes) -> None:
        with self._lock:
            self._kept_bytes += len(made) - len(self._kept.pop(key, b""))
            self._kept[key] = made
            while self._kept_bytes > _KEPT_BYTES:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])


def _measured(coded: str, limits: ImageLimits) -> tuple[bytes, int]:
    """Return the bytes of an image and its number of pixels, nothing decoded; DataError where it is none."""
    content = _decoded(coded, limits.max_bytes)
    width, height = image_size(content, limits)
    return content, width * height


def _decoded(coded: str, max_bytes: int) -> bytes:
    """Return the bytes in base64 or in a data: URL that says it is an image."""
    if url := _DATA_URL.match(coded):
        kind = url[1].strip().lower()
        if not kind.startswith("image/") and kind not in _NOT_SAID:
            raise DataError(f"{kind[:40]} is not the type of an image")
        coded = coded[url.end() :]
    if len(coded) > max_bytes * 4 // 3 + 4:
        raise DataError(f"over {max_bytes:,} bytes")
    try:
        content = base64.b64decode("".join(coded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("not base64 (the server opens no file and no URL)") from error
    if len(content) > max_bytes:
        raise DataError(f"over {max_bytes:,} bytes")
    return content


def _shrunk(lease: RetrieverLease, passage_id: str, side: int, folders: Sequence[Path]) -> bytes | None:
    """Return the first image that a corpus, or a server, inside the retriever has of this passage.

    A corpus may come from a stranger: DataError for a file outside of its folder and of `folders`.
    """
    from data.pages.images import read_image, split_page, thumbnail

    for corpus in corpora_in(lease.retriever):
        passage = corpus.get(passage_id)
        if passage is not None and passage.image:
            file = Path(split_page(passage.image)[0]).resolve()
            if not any(map(file.is_relative_to, (corpus.path.parent.resolve(), *folders))):
                raise DataError(f"{file}: outside of the folder of its corpus; --image_folders allows others")
            return thumbnail(read_image(passage.image), side)
    return lease.retriever.thumbnail(passage_id, side)
