"""Images at the server: asked in base64 or as a form, found, shown as thumbnails; wrong ones refused."""

import base64
import io
import struct
import zlib

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from data.corpus import Corpus
from data.jsonl import write_jsonl
from data.pages.images import read_image
from data.records import Item
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.spec import Encoder, EncodingSpec
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.flat import FlatIndex
from retriever_server.retrievers.cache import Cached
from retriever_server.retrievers.fuse import Fuse
from retriever_server.retrievers.rerank import Rerank
from retriever_server.server.app import Limits, create_app
from retriever_server.server.backends import HotSwappable
from tests.retriever_server.retrievers.test_rerank import ByLetter
from tests.retriever_server.vision_models import picture as picture_of_noise
from tests.retriever_server.vision_models import tiny_clip

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Colours(Encoder):
    """The mean colour of an image, the colour that a text names; of both their mean. Needs no model."""

    spec = EncodingSpec(
        "colours", "dense", "c", 3, similarity="dot", inputs="text+image", image_processor="mean"
    )

    takes = frozenset({"text", "image", "text+image"})

    def __init__(self) -> None:
        self.encoded: list = []

    def encode(self, inputs, role):
        self.encoded.append(list(inputs))
        return np.stack([self._one(each) for each in inputs])

    def _one(self, each):
        text = each if isinstance(each, str) else each.text
        if text == "bad":
            raise ZeroDivisionError("bad")
        parts = [COLOURS[word] for word in text.split() if word in COLOURS]
        if isinstance(each, Item):
            parts.append(np.asarray(read_image(each.image)).mean((0, 1)))
        return np.mean(parts or [(1, 1, 1)], axis=0).astype(np.float32) / 255


def picture(colour: str, size=(40, 30), kind="PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(out, kind)
    return out.getvalue()


def coded(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of three pages, one of them with text besides, one broken; a text corpus of the same ids."""
    folder = tmp_path_factory.mktemp("pages")
    for colour in ("red", "green", "blue"):
        (folder / f"{colour}.png").write_bytes(picture(colour, (400, 300)))
    (folder / "broken.png").write_bytes(picture("white")[:50])
    names = {"a/1": "red.png", "2 &?": "green.png", "3": "blue.png"}
    pages = [{"id": place, "image": image} for place, image in names.items()]
    write_jsonl(folder / "pages.jsonl", [*pages, {"id": "text", "text": "only a text"}])
    write_jsonl(folder / "broken.jsonl", [{"id": "b", "image": "broken.png"}, *pages])
    texts = [
        {"id": place, "title": "T", "text": f"the sea is {image[:-4]}"} for place, image in names.items()
    ]
    write_jsonl(folder / "texts.jsonl", texts)
    return folder


@pytest.fixture(scope="module")
def pages(folder):
    return FlatIndex.build(Corpus(folder / "pages.jsonl"), folder / "flat", Colours())


@pytest.fixture(scope="module")
def texts(folder):
    return BM25Index.build(Corpus(folder / "texts.jsonl"), folder / "bm25")


@pytest.fixture
def server(pages, texts):
    backends = {
        "pages": HotSwappable(pages),
        "texts": HotSwappable(texts),
        "both": HotSwappable(Cached(Fuse([texts, pages]))),
        "reranked": HotSwappable(Rerank(pages, ByLetter())),
    }
    limits = Limits(max_images=3, max_image_bytes=20_000, max_image_pixels=1_000_000)
    with TestClient(create_app(backends, limits)) as client:
        yield client


def search(server, *queries, **more):
    answer = server.post("/v1/search", json={"queries": list(queries), "top_k": 2, **more})
    assert answer.status_code == 200, answer.text
    return [[hit["id"] for hit in result["hits"]] for result in answer.json()["results"]]


def test_images_texts_and_both_are_searched_together(server):
    found = search(
        server,
        {"image": coded(picture("blue"))},
        "green",
        {"text": "red"},
        {"image": f"data:image/jpeg;base64,{coded(picture('green', kind='JPEG'))}", "text": "red"},
    )
    assert [each[0] for each in found[:3]] == ["3", "2 &?", "a/1"]
    assert set(found[3]) == {"2 &?", "a/1"}


def test_a_form_asks_with_files_and_text(server):
    files = [("image", ("p.png", picture("blue"), "image/png")), ("image", ("q", picture("green")))]
    answer = server.post("/v1/search", files=files, data={"top_k": "1", "backend": "pages"})
    assert [result["hits"][0]["id"] for result in answer.json()["results"]] == ["3", "2 &?"]
    fused = server.post("/v1/search", files=files[:1], data={"text": "red", "top_k": "2"}).json()
    assert {hit["id"] for hit in fused["results"][0]["hits"]} == {"3", "a/1"}
    only = server.post("/v1/search", files={"text": (None, "red"), "top_k": (None, "1")}).json()
    assert [hit["id"] for hit in only["results"][0]["hits"]] == ["a/1"]


def bomb() -> str:
    """A small PNG whose head says 30,000 x 30,000: whoever decodes it first finds another fault."""
    small = picture("red")
    head = b"IHDR" + struct.pack(">II", 30_000, 30_000) + small[24:29]
    return coded(small[:12] + head + struct.pack(">I", zlib.crc32(head)) + small[33:])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (lambda: "/etc/passwd", "queries.1.image: not base64 (the server opens no file and no URL)"),
        (lambda: "http://127.0.0.1/x.png", "queries.1.image: not base64"),
        (lambda: "file:///etc/passwd", "queries.1.image: not base64"),
        (lambda: "", "queries.1.image: image of 0 bytes: no image"),
        (lambda: coded(picture("red")[:60]), "queries.1.image: image of 60 bytes: a broken image"),
        (lambda: coded(b"%PDF-1.7 ..."), "queries.1.image: image of 12 bytes: a PDF"),
        (lambda: coded(b"no image at all"), "no image of a kind that is read: PNG, JPEG"),
        (lambda: f"data:text/html;base64,{coded(picture('red'))}", "text/html is not the type of an image"),
        (lambda: coded(bytes(30_000)), "queries.1.image: over 20,000 bytes"),
        (lambda: coded(picture("red", (30_000, 1))), "30000 x 1 pixels, over 16,384 on a side"),
        (lambda: coded(picture("red", (1_500, 1_000))), "1500 x 1000 pixels, over 1,000,000"),
    ],
)
def test_a_wrong_image_is_answered_with_one_line(server, image, reason):
    answer = server.post("/v1/search", json={"queries": ["red", {"image": image()}]})
    detail = answer.json()["detail"]
    assert answer.status_code == 422 and reason in detail and "\n" not in detail


def test_a_bomb_of_30_000_pixels_a_side_is_refused_undecoded(pages):
    with TestClient(create_app(pages)) as server:
        answer = server.post("/v1/search", json={"queries": [{"image": bomb()}]})
    assert answer.status_code == 422 and "900,000,000 pixels, over 20,000,000" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"queries": [{"image": "x", "url": "y"}]}, "queries.0.url: Extra inputs are not permitted"),
        ({"queries": [{"image": 1}]}, "queries.0.image: Input should be a valid string, not 1"),
        ({"queries": [1]}, "queries.0: Input should be a valid string"),
        ({"queries": [{"image": "aa"}] * 4}, "queries: 4 images, at most 3 are allowed"),
        ({"queries": [{"text": "a" * 9000}]}, "one of 9000 characters, at most 8192"),
    ],
)
def test_a_wrong_query_is_answered_with_one_line(server, body, reason):
    answer = server.post("/v1/search", json=body)
    assert answer.status_code == 422 and reason in answer.json()["detail"]


@pytest.mark.parametrize(
    ("parts", "status", "reason"),
    [
        ({"image": ("p.png", b"GIF", "text/plain")}, 422, "text/plain is not the type of an image"),
        ({"image": ("p.png", b"", "image/png")}, 422, "queries.0.image: image of 0 bytes"),
        ({"image": (None, "/etc/passwd")}, 422, "image: a form asks by `image`, a file, and `text`"),
        ({"text": ("t.txt", b"red")}, 422, "text: a form asks by"),
        ({"queries": (None, '["red"]')}, 422, "queries: a form asks by"),
        ({"top_k": (None, "many")}, 422, "top_k: Input should be a valid integer"),
        ({"colour": (None, "1")}, 422, "colour: Extra inputs are not permitted"),
        ({"top_k": (None, "2")}, 422, "body: a form asks by `image`, a file, and `text`, and has neither"),
        ({"stages": (None, "[" * 9000)}, 422, "stages: Input should be a valid list"),
    ],
)
def test_a_wrong_form_is_answered_with_one_line(server, parts, status, reason):
    answer = server.post("/v1/search", files=parts)
    assert answer.status_code == status and reason in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_what_is_no_form_is_answered_with_400(server, kind):
    answer = server.post("/v1/search", content=b"--y\r\nabc", headers={"Content-Type": kind})
    assert answer.status_code == 400 and answer.json()["detail"].startswith("body: ")


def test_a_form_that_is_cut_short_is_refused_and_not_half_answered(server):
    files = [("image", (f"{i}.png", picture("red"), "image/png")) for i in range(2)]
    asked = server.build_request("POST", "/v1/search", files=files)
    body, headers = asked.read(), {"Content-Type": asked.headers["Content-Type"]}
    assert len(server.post("/v1/search", content=body, headers=headers).json()["results"]) == 2
    answer = server.post("/v1/search", content=body[:-100], headers=headers)
    assert answer.status_code == 400 and "cut short" in answer.json()["detail"]


@pytest.mark.parametrize("backend", ["texts", "reranked"])
def test_an_image_for_what_reads_text_only_is_refused_and_texts_beside_it_are_not(server, backend):
    body = {"queries": ["red", {"image": coded(picture("red"))}], "backend": backend}
    answer = server.post("/v1/search", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"] == "queries: one holds an image, and what is asked reads text only"
    assert server.post("/v1/search", json={**body, "queries": ["red"]}).status_code == 200


def test_the_server_says_what_takes_images(server):
    backends = server.get("/v1/info").json()["backends"]
    takes = {name for name, about in backends.items() if "image" in about["accepts"]}
    assert takes == {"pages", "both"}


def test_an_image_on_which_the_encoder_fails_fails_alone(server):
    asked = [{"image": coded(picture("red")), "text": text} for text in ("", "bad")]
    good, bad = server.post("/v1/search", json={"queries": asked}).json()["results"]
    assert good["hits"][0]["id"] == "a/1" and bad["error"] == "search failed: ZeroDivisionError: bad"


def test_hits_link_to_thumbnails_and_name_no_file(server, folder):
    answer = server.post("/v1/search", json={"queries": ["green", "red", "blue"], "top_k": 4})
    assert str(folder) not in answer.text and ".png" not in answer.text
    hits = {hit["id"]: hit.get("thumbnail") for hit in answer.json()["results"][0]["hits"]}
    assert hits == {
        "a/1": "/v1/thumbnail/a%2F1",
        "2 &?": "/v1/thumbnail/2%20%26%3F",
        "3": "/v1/thumbnail/3",
        "text": None,
    }
    for colour, place in (("red", "a/1"), ("green", "2 &?")):
        shown = server.get(hits[place], params={"side": 64})
        assert shown.headers["content-type"] == "image/jpeg"
        image = Image.open(io.BytesIO(shown.content))
        assert image.size == (64, 48)
        assert np.abs(np.asarray(image).mean((0, 1)) - COLOURS[colour]).max() < 8
    document = server.post("/retrieve", json={"queries": ["blue"], "topk": 1}).json()["result"][0][0]
    assert document["thumbnail"] == "/v1/thumbnail/3" and "image" not in document


def test_the_link_of_a_hit_names_its_backend(server):
    body = {"queries": [{"image": coded(picture("red"))}], "backend": "both", "top_k": 1}
    [hit] = server.post("/v1/search", json=body).json()["results"][0]["hits"]
    assert hit["thumbnail"] == "/v1/thumbnail/a%2F1?backend=both"
    assert server.get(hit["thumbnail"]).status_code == 200


@pytest.mark.parametrize(
    ("place", "status", "reason"),
    [
        ("nothing", 404, "no picture of a passage 'nothing'"),
        ("text", 404, "no picture"),
        ("red.png", 404, "no picture"),
        ("%2Fetc%2Fpasswd", 404, "no picture"),
        ("..%2f..%2fred.png", 404, "no picture"),
        ("3?side=9", 422, "side = 9: must be from 16 to 2048"),
        ("3?side=x", 422, "query.side: Input should be a valid integer"),
        ("3?backend=x", 422, "backend 'x'"),
        ("3?backend=texts", 404, "no picture"),
    ],
)
def test_nothing_but_images_of_the_corpus_is_shown(server, place, status, reason):
    answer = server.get(f"/v1/thumbnail/{place}")
    assert answer.status_code == status and reason in answer.json()["detail"]


def test_a_broken_page_is_not_shown_and_its_file_not_named(folder, texts):
    class Broken(Cached):
        corpus = Corpus(folder / "broken.jsonl")

    with TestClient(create_app(Broken(texts))) as server:
        answer = server.get("/v1/thumbnail/b")
        assert answer.status_code == 404 and answer.json() == {"detail": "no picture of a passage 'b'"}


def test_a_thumbnail_is_made_once(server, monkeypatch):
    made = []
    monkeypatch.setattr("data.pages.images.thumbnail", lambda image, side: made.append(side) or b"jpeg")
    for side in (100, 200, 100):
        assert server.get("/v1/thumbnail/3", params={"side": side}).content == b"jpeg"
    assert made == [100, 200]


def test_thumbnails_that_were_not_asked_for_lately_are_forgotten(server, monkeypatch):
    pictures = server.app.state.service.images
    monkeypatch.setattr("retriever_server.server.image_requests._KEPT_BYTES", 10)
    monkeypatch.setattr("data.pages.images.thumbnail", lambda image, side: b"jpeg")
    for side in (100, 200, 100, 300):
        server.get("/v1/thumbnail/3", params={"side": side})
    assert [side for _, _, side in pictures._kept] == [100, 300] and pictures._kept_bytes == 8


def test_a_token_guards_pictures(pages):
    with TestClient(create_app(pages, token="t")) as server:
        assert server.get("/v1/thumbnail/3").status_code == 401
        assert server.get("/v1/thumbnail/3", headers={"Authorization": "Bearer t"}).status_code == 200


def test_images_are_embedded_beside_texts(server):
    image = {"image": coded(picture("blue"))}
    assert np.allclose(server.post("/embed", json={"inputs": image}).json(), [[0, 0, 1]])
    both = server.post("/embed", json={"inputs": ["red", image, {"text": "green"}]}).json()
    assert np.allclose(both, [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
    found = server.post("/v1/embeddings", json={"input": [image]}).json()
    assert np.allclose(found["data"][0]["embedding"], [0, 0, 1])
    wrong = server.post("/embed", json={"inputs": [{"image": "/etc/passwd"}]})
    assert wrong.status_code == 422 and "inputs.0.image: not base64" in wrong.json()["detail"]


def test_an_image_for_an_encoder_of_texts_is_refused():
    from tests.retriever_server.server.test_embeddings import Fixed, Whole

    with TestClient(create_app(Whole(encoder=Fixed("dense")))) as server:
        answer = server.post("/embed", json={"inputs": [{"image": coded(picture("red"))}]})
    assert answer.status_code == 422 and "the encoder reads text only" in answer.json()["detail"]


def test_what_reads_images_or_forms_is_named_where_it_is_missing(server, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "python_multipart", None)
    answer = server.post("/v1/search", files={"image": ("p.png", picture("red"))})
    assert answer.status_code == 501 and "pip install 'sleuth-rl[images]'" in answer.json()["detail"]


def test_a_real_encoder_of_pages_is_served(folder, tmp_path):
    """CLIP built from a configuration, its weights random: a page is the nearest to itself."""
    encoder = load_encoder(tiny_clip(tmp_path / "clip"), device="cpu", inputs="image")
    noise = [bytes(picture_of_noise(seed).image) for seed in range(4)]  # type: ignore[arg-type]
    for i, content in enumerate(noise):
        (tmp_path / f"{i}.png").write_bytes(content)
    write_jsonl(tmp_path / "c.jsonl", [{"id": str(i), "image": f"{i}.png"} for i in range(len(noise))])
    index = FlatIndex.build(Corpus(tmp_path / "c.jsonl"), tmp_path / "index", encoder)
    with TestClient(create_app(index)) as server:
        assert server.get("/v1/info").json()["accepts"] == ["text", "image"]
        asked = [*({"image": coded(content)} for content in noise), "a text"]
        found = [each[0] for each in search(server, *asked)]
        assert found[:4] == ["0", "1", "2", "3"]
        rows = np.array(server.post("/embed", json={"inputs": asked}).json())
    assert np.allclose(rows, encoder.encode([*map(Item, noise), "a text"], "passage"), atol=1e-5)


def test_texts_do_not_wait_in_a_batch_of_images(pages):
    """One search each, since what takes images is slower: asked at once, they are encoded apart."""
    import asyncio

    async def run():
        app = create_app(pages)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await asyncio.gather(
                *(client.post("/v1/search", json={"queries": [q]}) for q in ("red", "green")),
                client.post("/v1/search", json={"queries": [{"image": coded(picture("red"))}]}),
            )
            await app.state.service.close()

    pages.encoder.encoded.clear()
    asyncio.run(run())
    kinds = [{isinstance(each, Item) for each in batch} for batch in pages.encoder.encoded]
    assert sorted(kinds, key=list) == [{False}, {True}]
