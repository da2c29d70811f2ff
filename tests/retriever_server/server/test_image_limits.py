"""Images that cost more than they are worth: refused before they are decoded, whoever is asked."""

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from data.records import Hit, Passage
from retriever_server.retriever import Retriever
from retriever_server.server.app import Limits, create_app
from retriever_server.server.backends import HotSwappable
from tests.retriever_server.server.test_embeddings import Fixed
from tests.retriever_server.server.test_image_requests import coded, picture


class Found(Retriever):
    """Finds something; `takes` images or not."""

    def __init__(self, takes: bool) -> None:
        self.generation, self.takes, self.encoder = "g", takes, Fixed("dense")

    def takes_images(self):
        return self.takes

    def search(self, queries, k, where=None):
        return [[Hit(Passage("1", "x"), 1.0, "g")] for _ in queries]


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of all images that are decoded."""
    sizes, load = [], Image.Image.load
    for kind in ("PngImagePlugin.PngImageFile", "JpegImagePlugin.JpegImageFile"):
        monkeypatch.setattr(f"PIL.{kind}.load", lambda self: (sizes.append(self.size), load(self))[1])
    return sizes


@pytest.fixture
def server():
    backends = {"text": HotSwappable(Found(False)), "pages": HotSwappable(Found(True))}
    with TestClient(create_app(backends, Limits(max_image_pixels=1000, max_images=4))) as client:
        yield client


LARGE = {"image": coded(picture("red", (25, 40)))}  # as many pixels as are allowed


def test_what_reads_text_only_decodes_nothing(server, decoded):
    form = {"files": {"image": ("p.png", picture("red"), "image/png")}}
    for path, asked in (
        ("/v1/search", {"json": {"queries": ["red", LARGE]}}),
        ("/v1/search", {"json": {"queries": [{"image": "no image"}]}}),
        ("/v1/search", form),
        ("/embed", {"json": {"inputs": [LARGE]}}),
        ("/v1/embeddings", {"json": {"input": [LARGE]}}),
    ):
        answer = server.post(path, **asked)
        assert answer.status_code in (400, 422) and "reads text only" in answer.json()["detail"]
    assert decoded == []


def test_all_images_of_a_request_together_are_bounded_before_one_is_decoded(server, decoded):
    asked = {"queries": [LARGE, LARGE], "backend": "pages"}
    assert server.post("/v1/search", json=asked).status_code == 200
    assert decoded == [(25, 40)] * 2
    asked["queries"] = [LARGE, LARGE, {"image": coded(picture("red", (1, 1)))}]
    answer = server.post("/v1/search", json=asked)
    assert answer.status_code == 422
    assert answer.json()["detail"] == "queries: images of 2,001 pixels together, over 2,000"
    answer = server.post("/v1/search", json={**asked, "queries": [{"image": "aa"}] * 5})
    assert answer.status_code == 422 and "5 images, at most 4" in answer.json()["detail"]
    assert decoded == [(25, 40)] * 2
