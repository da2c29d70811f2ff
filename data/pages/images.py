"""Images out of files, PDF pages and bytes, with limits: what is broken or too large is refused by name.

Pillow reads the images and pypdfium2 the pages: the optional extra `images`. Nothing is ever fetched: a
source is a file of this machine or the bytes themselves.
"""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.errors import ConfigError, DataError, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image
    from pypdfium2 import PdfDocument

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read, by their own first bytes and never by its name; of several frames the first."""

_SCALE = 2
PAGE_DPI = 72 * _SCALE
"""Dots an inch at which a page of a PDF is drawn: a letter page is 1224 x 1584 pixels."""

_PAGE = re.compile(r"(?P<file>.+)#page=(?P<page>\d{1,9})", re.DOTALL)
_PDF_TAIL = 1 << 15  # bytes
_MOST_SCANS = 100  # each of a progressive JPEG passes over all pixels; encoders write about ten
_TILE_TAGS = (322, 323)  # width and height
_pdfium = threading.Lock()  # the library is not made for several threads


@dataclass(frozen=True)
class ImageLimits:
    """Limits beyond which an image is refused, unread or undecoded.

    max_bytes: of the file (not of a PDF, whose pages are read one by one). max_pixels: width times height.
    max_side: width and height, in pixels.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000
    max_side: int = 16_384


LIMITS = ImageLimits()


def read_image(source: str | bytes, limits: ImageLimits = LIMITS) -> Image:
    """The picture in a file, on a page of a PDF ("report.pdf#page=3", from 1) or in bytes; RGB, upright.

    Turned as its EXIF says; what is transparent becomes white. Raises DataError "SOURCE: what is wrong"
    for one that is missing, truncated, no image, beyond `limits`, or a page that is not there.
    """
    with needs_images("images"):
        if isinstance(source, str):
            file, page = split_page(source)
            if page is not None:
                return _page(file, page, source, limits)
        return _decode(*_bytes_of(source, limits), limits)


def image_size(content: bytes, limits: ImageLimits = LIMITS) -> tuple[int, int]:
    """Width and height as the head of the file says; nothing is decoded. Raises DataError as `read_image`."""
    with needs_images("images"), _refused(name := _name(content), limits):
        return _open(content, name, limits).size


def check_image(content: bytes, limits: ImageLimits = LIMITS) -> bytes:
    """Return the file, decoded once, at most four bytes a pixel. Raises DataError as `read_image`."""
    with needs_images("images"), _refused(name := _name(content), limits):
        _open(content, name, limits).load()
    return content


def split_page(source: str) -> tuple[str, int | None]:
    """The file, and the page that is meant: "a.pdf#page=3" -> ("a.pdf", 3); "a.png" -> ("a.png", None)."""
    match = _PAGE.fullmatch(source)
    return (match["file"], int(match["page"])) if match else (source, None)


def read_pdf(path: str | Path) -> tuple[str, list[str]]:
    """The title of a PDF and the text on each of its pages, "" on a scan; DataError naming the file."""
    with needs_images(str(path)):
        import pypdfium2
    with _open_pdf(str(path), str(path)) as document:
        title = document.get_metadata_dict(skip_empty=True).get("Title", "")
        texts = []
        for number in range(len(document)):
            try:
                texts.append(document[number].get_textpage().get_text_bounded().replace("\r\n", "\n").strip())
            except pypdfium2.PdfiumError:
                texts.append("")  # of this page alone; it is refused by name when it is drawn
        return title.strip(), texts


def check_pdf_reader(path: str | Path) -> None:
    """Raise ConfigError, naming the file, where the package that reads PDFs is missing."""
    with needs_images(str(path)):
        import pypdfium2  # noqa: F401


def thumbnail(image: Image, side: int) -> bytes:
    """A JPEG file of the picture, shrunk so that neither width nor height is over `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return out.getvalue()


def png(image: Image) -> bytes:
    """A PNG file of the picture: the same pixels give the same bytes."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=3)  # of pages no larger than the default, in two thirds of the time
    return out.getvalue()


def sample_images() -> list[bytes]:
    """Files of two small images of different shape."""
    with needs_images("the self-test of an encoder of images"):
        from PIL import Image
    files = []
    for seed, (height, width) in enumerate([(48, 64), (96, 40)]):
        pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        files.append(png(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)))
    return files


@contextmanager
def needs_images(what: str) -> Iterator[None]:
    """Turn a missing package of the extra `images` into a ConfigError that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        needs = f"needs the package {error.name}: pip install 'sleuth-rl[images]'"
        raise ConfigError(f"{what}: {needs}") from error


def _bytes_of(source: str | bytes, limits: ImageLimits) -> tuple[bytes, str]:
    """The bytes of the source, no more than are allowed, and its name in messages."""
    name = _name(source)
    if isinstance(source, str):
        if Path(source).exists() and not Path(source).is_file():
            raise DataError(f"{name}: not a file")
        try:
            with open(source, "rb") as file:
                source = file.read(limits.max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise DataError(f"{name}: {unreadable(error)}") from error
    if len(source) > limits.max_bytes:
        raise DataError(f"{name}: over {limits.max_bytes:,} bytes")
    return source, name


def _name(source: str | bytes) -> str:
    return source if isinstance(source, str) else f"image of {len(source)} bytes"


def _decode(content: bytes, name: str, limits: ImageLimits) -> Image:
    from PIL import ImageOps

    with _refused(name, limits):
        image = _open(content, name, limits)
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def _open(content: bytes, name: str, limits: ImageLimits) -> Image:
    """The image by its head; what takes much more time or memory than its pixels is refused."""
    from PIL import Image

    if content.startswith(b"%PDF"):
        raise DataError(f'{name}: a PDF; one of its pages is named as in "report.pdf#page=1"')
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_size(*image.size, name, limits)
    if image.format in ("JPEG", "MPO") and (scans := content.count(b"\xff\xda")) > _MOST_SCANS:
        raise DataError(f"{name}: a JPEG of {scans:,} scans, over {_MOST_SCANS}")
    width, height = (getattr(image, "tag_v2", {}).get(tag, 1) for tag in _TILE_TAGS)
    _check_size(width, height, f"{name}: a tile", limits)
    return image


@contextmanager
def _refused(name: str, limits: ImageLimits) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own limit of pixels, and of odd metadata
            yield
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: no image of a kind that is read: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # so many that Pillow does not say their width and height
        given = f"{int(pixels[0]):,} pixels, " if pixels else ""
        raise DataError(f"{name}: {given}over {limits.max_pixels:,}") from error
    except Exception as error:  # decoders raise what they like on files that are not what they say
        raise DataError(f"{name}: a broken image: {error or type(error).__name__}") from error


def _check_size(width: float, height: float, name: str, limits: ImageLimits) -> None:
    if max(width, height) > limits.max_side:
        raise DataError(f"{name}: {width:.0f} x {height:.0f} pixels, over {limits.max_side:,} on a side")
    if width * height > limits.max_pixels:
        raise DataError(f"{name}: {width:.0f} x {height:.0f} pixels, over {limits.max_pixels:,}")
    if min(width, height) < 1:
        raise DataError(f"{name}: has no pixels")


def _rgb(image: Image) -> Image:
    """The picture in RGB, on white where it is transparent; 16 bits a pixel become 8."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        from PIL import Image

        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _has_end(path: str) -> bool:
    """Return whether a PDF's last mark stands near its end; something else may follow it."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _PDF_TAIL))
            return b"%%EOF" in file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def _open_pdf(path: str, name: str) -> Iterator[PdfDocument]:
    """The document, while no other thread uses the library."""
    import pypdfium2

    if not Path(path).is_file():
        raise DataError(f"{name}: {'not a file' if Path(path).exists() else 'no such file'}")
    if not _has_end(path):  # pdfium would mend it, and leave pages blank
        raise DataError(f"{name}: a broken PDF, or no PDF: it is cut short (has no %%EOF)")
    with _pdfium:
        try:
            document = pypdfium2.PdfDocument(path)
        except (pypdfium2.PdfiumError, OSError) as error:
            raise DataError(f"{name}: a broken PDF, or no PDF: {error}") from error
        try:
            yield document
        finally:
            document.close()


def _page(path: str, page: int, name: str, limits: ImageLimits) -> Image:
    import pypdfium2

    with _open_pdf(path, name) as document:
        if not 1 <= page <= len(document):
            raise DataError(f"{name}: the PDF has {len(document)} pages")
        try:
            opened = document[page - 1]
            width, height = (side * _SCALE for side in opened.get_size())
            _check_size(width, height, name, limits)
            return opened.render(scale=_SCALE).to_pil().convert("RGB")
        except pypdfium2.PdfiumError as error:
            raise DataError(f"{name}: a broken page: {error}") from error
