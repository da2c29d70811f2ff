"""Images: what is read, and that what is broken, huge or no image is refused by its name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest

from data.errors import ConfigError, DataError
from data.pages.images import (
    ImageLimits,
    check_image,
    image_size,
    png,
    read_image,
    read_pdf,
    split_page,
    thumbnail,
)

Image = pytest.importorskip("PIL.Image")


def picture(width=40, height=30, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image, kind="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pdf(path, pages=2):
    sheets = [Image.new("RGB", (200, 100), colour) for colour in ("red", "green", "blue")[:pages]]
    sheets[0].save(path, "PDF", save_all=True, append_images=sheets[1:], resolution=72)
    return path


def test_a_file_and_its_bytes_give_the_same_rgb_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(picture()))
    from_file, from_bytes = read_image(str(tmp_path / "a.png")), read_image(saved(picture()))
    assert from_file.mode == "RGB"
    np.testing.assert_array_equal(from_file, picture())
    np.testing.assert_array_equal(from_bytes, picture())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG"])
def test_every_kind_is_read_whatever_the_file_is_called(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(saved(picture(), kind))
    assert read_image(str(tmp_path / "a.jpg")).size == (40, 30)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    assert read_image(saved(picture(mode=mode), "TIFF")).mode == "RGB"


def test_what_is_transparent_becomes_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert read_image(saved(clear)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness():
    grey = Image.fromarray(np.full((4, 4), 0x8080, dtype=np.uint16))
    assert read_image(saved(grey)).getpixel((0, 0)) == (128, 128, 128)


def test_a_photo_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert read_image(saved(picture(40, 30), "JPEG", exif=exif)).size == (30, 40)


def test_a_page_of_a_pdf_is_drawn_by_its_number(tmp_path):
    path = pdf(tmp_path / "r.pdf")
    assert read_pdf(path)[1] == ["", ""]  # no text, as of scans
    page = read_image(f"{path}#page=2")
    assert page.size == (400, 200)  # 144 dots an inch
    assert page.getpixel((200, 100))[1] > 100 > page.getpixel((200, 100))[0]


@pytest.mark.parametrize("page", [0, 3])
def test_a_page_that_is_not_there_is_refused(tmp_path, page):
    path = pdf(tmp_path / "r.pdf")
    with pytest.raises(DataError, match=f"r.pdf#page={page}: the PDF has 2 pages"):
        read_image(f"{path}#page={page}")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.98])
def test_a_truncated_pdf_is_refused(tmp_path, share):
    whole = pdf(tmp_path / "r.pdf").read_bytes()
    (tmp_path / "half.pdf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"half\.pdf"):
        read_image(f"{tmp_path}/half.pdf#page=1")


def test_a_pdf_without_a_page_says_how_one_is_named(tmp_path):
    with pytest.raises(DataError, match=r'r.pdf: a PDF; .*"report.pdf#page=1"'):
        read_image(str(pdf(tmp_path / "r.pdf")))


def huge_png(width: int, height: int) -> bytes:
    """A few hundred bytes that say they are so large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("cut", [60, 1000, 3000])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused_by_name(tmp_path, kind, cut):
    whole = saved(picture(100, 100), kind)
    (tmp_path / "cut").write_bytes(whole[: min(cut, len(whole) - 200)])
    with pytest.raises(DataError, match="cut: "):
        read_image(str(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30_000, 10), "30000 x 10 pixels, over 16,384 on a side"),
        ((16_000, 16_000), "256,000,000 pixels, over 64,000,000"),
        ((2**31 - 1, 2**31 - 1), "over"),
    ],
)
def test_a_bomb_is_refused_before_it_is_decoded(size, message):
    with pytest.raises(DataError, match=message):
        read_image(huge_png(*size))


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded():
    content = saved(picture(), "JPEG", progressive=True)
    assert 1 < content.count(b"\xff\xda") < 20 and read_image(content).size == picture().size
    scan = content[content.index(b"\xff\xda") : -2]
    many = content[:-2] + scan * 40 + content[-2:]
    for refuse in (read_image, check_image, image_size):
        with pytest.raises(DataError, match=r"a JPEG of \d+ scans, over 100"):
            refuse(many)


def test_a_tiff_of_tiles_larger_than_any_image_is_refused_before_it_is_decoded():
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 100)]
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    content = b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + b"\0" * 200
    with pytest.raises(DataError, match=r"a tile: 60000 x 60000 pixels, over 16,384 on a side"):
        image_size(content)


def test_the_size_is_read_and_the_file_checked_without_a_copy():
    content = saved(picture(), "PNG")
    assert image_size(content) == picture().size
    check_image(content)
    with pytest.raises(DataError, match="a broken image"):
        check_image(content[:-30])


def test_a_file_over_the_limit_of_bytes_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(picture()))
    with pytest.raises(DataError, match=r"a.png: over 100 bytes"):
        read_image(str(tmp_path / "a.png"), ImageLimits(max_bytes=100))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "no image of a kind"),
        (b"", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no image of a kind"),
    ],
)
def test_what_is_no_image_is_refused(content, message):
    with pytest.raises(DataError, match=f"image of {len(content)} bytes: {message}"):
        read_image(content)


def test_missing_files_folders_and_urls_are_refused_by_name(tmp_path):
    for source in (f"{tmp_path}/none.png", "http://127.0.0.1/a.png", f"{tmp_path}/none.pdf#page=1"):
        with pytest.raises(DataError, match="no such file"):
            read_image(source)
    for source in (str(tmp_path), f"{tmp_path}#page=1"):
        with pytest.raises(DataError, match="not a file"):
            read_image(source)
    with pytest.raises(DataError, match="cannot be read"):
        read_image("a\0b.png")


def test_split_page_reads_the_number_at_the_end():
    assert split_page("a/b.pdf#page=12") == ("a/b.pdf", 12)
    assert split_page("a#page=x.png") == ("a#page=x.png", None)


def test_a_thumbnail_keeps_the_shape_and_a_png_its_pixels():
    assert read_image(thumbnail(picture(400, 200), 100)).size == (100, 50)
    assert png(picture()) == png(picture())
    np.testing.assert_array_equal(read_image(png(picture())), picture())


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"PIL: pip install 'sleuth-rl\[images\]'"):
        read_image(b"x")
