"""Encoders that read images: as sentence-transformers encodes, no text taken for a path, a spec of pixels."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from data.errors import ConfigError, DataError
from data.pages.images import read_image
from data.records import Item
from retriever_server.encoders.image_inputs import as_model_input
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.spec import rows_of, similarities
from tests.retriever_server.vision_models import picture, tiny_clip, tiny_colpali, tiny_colqwen2, tiny_vlm
from tests.samples import quick

MAKE = {
    "dse": tiny_vlm,
    "late": lambda folder: tiny_vlm(folder, "multi"),
    "split": lambda folder: tiny_vlm(folder, "multi", split=True),
    "clip": tiny_clip,
    "colpali": tiny_colpali,
    "colqwen2": tiny_colqwen2,
}
PICTURES = [
    picture(i, *size) for i, size in enumerate([(40, 56), (90, 30), (33, 33), (20, 120), (64, 64)] * 2)
]
TEXTS = ["a river", "the capital of a country is not its largest city", "", "page.png", "two"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return {name: make(tmp_path_factory.mktemp("models") / name) for name, make in MAKE.items()}


def of_sentence_transformers(folder, kind, inputs, role):
    import sentence_transformers as st

    model = (st.MultiVectorEncoder if kind == "multi" else st.SentenceTransformer)(folder, device="cpu")
    given = [
        as_model_input(each, None if isinstance(each, str) else read_image(each.image)) for each in inputs
    ]
    encode = model.encode_query if role == "query" else model.encode_document
    return [np.atleast_2d(np.asarray(encode([each])[0])) for each in given]


@pytest.mark.parametrize("name", quick(["late", "clip"], MAKE))
def test_vectors_are_those_of_sentence_transformers(models, name):
    encoder = load_encoder(models[name], device="cpu")
    assert encoder.spec.kind == ("dense" if name in ("dse", "clip") else "multi")
    assert encoder.spec.inputs == "image" and "text" in encoder.takes
    before = encoder.images
    mixed = [each for pair in zip(TEXTS, PICTURES, strict=False) for each in pair]
    for role, inputs in (("query", mixed), ("passage", PICTURES)):
        ours = encoder.encode(inputs, role)
        expected = of_sentence_transformers(models[name], encoder.spec.kind, inputs, role)
        for i, vectors in enumerate(expected):
            np.testing.assert_allclose(rows_of(ours, i), vectors / norms(vectors), atol=1e-5)
    assert encoder.images - before == 15 and encoder.model_seconds > 0


def norms(vectors):
    return np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["dse", "late"])
def test_an_image_and_its_text_are_encoded_together(models, name):
    encoder = load_encoder(models[name], device="cpu", inputs="text+image")
    both = [replace(item, text=text) for item, text in zip(PICTURES, TEXTS, strict=False) if text]
    ours = encoder.encode(both, "passage")
    for i, vectors in enumerate(of_sentence_transformers(models[name], encoder.spec.kind, both, "passage")):
        np.testing.assert_allclose(rows_of(ours, i), vectors, atol=1e-5)
    alone = encoder.encode([PICTURES[0], TEXTS[0]], "passage")
    assert all(rows_of(alone, i).shape != rows_of(ours, 0).shape or
               similarities(rows_of(alone, i), rows_of(ours, 0)).max() < 0.99 for i in (0, 1))  # fmt: skip


@pytest.mark.parametrize("name", ["dse", "clip"])
def test_a_text_that_looks_like_an_image_is_a_text(models, name, tmp_path, monkeypatch):
    encoder = load_encoder(models[name], device="cpu")
    (tmp_path / "page.png").write_bytes(PICTURES[0].image)
    monkeypatch.chdir(tmp_path)
    pixel = "data:image/png;base64,iVBORw0KGgo="
    texts = ["page.png", str(tmp_path / "page.png"), "http://127.0.0.1:9/a.png", pixel, "<image> in a text"]
    before, of_picture = encoder.images, encoder.encode([PICTURES[0]], "query")
    vectors = encoder.encode(texts, "query")
    assert encoder.images - before == 1
    assert np.isfinite(vectors).all() and (vectors @ of_picture.T < 0.99).all()
    if name == "clip":  # knows no such token
        return
    same = encoder.encode(["in a text", "<image>in a text"], "query")
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)  # a placeholder in a text stands for nothing


def test_a_long_text_beside_an_image_is_cut_before_the_end_of_the_template(models):
    encoder = load_encoder(models["dse"], device="cpu", inputs="text+image", max_tokens=60)
    long, cut = (replace(PICTURES[0], text=text) for text in ("abc " * 40, "abc " * 40))
    features = []
    model = encoder._model
    watched, model.forward = model.forward, lambda f, **k: features.append(f["input_ids"]) or watched(f, **k)
    try:
        encoder.encode([long, PICTURES[1], cut], "passage")
    finally:
        model.forward = watched
    ends = {int(row[row != 0][-1]) for ids in features for row in ids}
    assert ends == {1} and max(ids.shape[1] for ids in features) == 60
    tight = load_encoder(models["dse"], device="cpu", max_tokens=10_000)
    tight._model.max_seq_length = 5
    with pytest.raises(DataError, match="an image of 56 x 40 pixels takes 8 tokens, of at most 5"):
        tight.encode(PICTURES[:1], "passage")


def test_the_spec_says_what_becomes_of_an_image_and_refuses_another_resolution(tmp_path):
    folder = tiny_vlm(tmp_path / "dse")
    encoder = load_encoder(folder, device="cpu")
    line = encoder.spec.image_processor
    assert line.startswith("Idefics3ImageProcessor {") and '"max_image_size": {"longest_edge": 32}' in line
    assert '"image_seq_len": 4' in line and line.count(" template ") == 1
    spec = type(encoder.spec)(**json.loads(json.dumps(vars(encoder.spec))))
    assert load_encoder(spec, device="cpu") is encoder
    del encoder
    path = Path(folder) / "processor_config.json"
    path.write_text(path.read_text().replace('"resample": 1', '"resample": 3'))
    with pytest.raises(DataError, match=r"another encoder than was asked for .image_processor: .*resample"):
        load_encoder(spec, device="cpu")


def test_inputs_that_a_model_does_not_take_are_refused(models):
    with pytest.raises(ConfigError, match=r"inputs 'text\+image': this model encodes image, text"):
        load_encoder(models["clip"], device="cpu", inputs="text+image")
    clip = load_encoder(models["clip"], device="cpu")
    with pytest.raises(DataError, match=r"reads image or text, text\+image was given"):
        clip.encode([replace(PICTURES[0], text="and a text")], "passage")
    for broken, wrong in ((b"\x89PNG cut", "no image"), (PICTURES[0].image[:90], "broken image")):
        with pytest.raises(DataError, match=f"image of {len(broken)} bytes: .*{wrong}"):
            clip.encode([PICTURES[1], Item(broken)], "passage")
    with pytest.raises(ConfigError, match=r"token_pooling 'rows:4': .* makes no vectors of tokens"):
        load_encoder(models["clip"], device="cpu", token_pooling="rows:4")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_processor_that_needs_torchvision_says_so(tmp_path):
    folder = tiny_colqwen2(tmp_path / "model")
    for name in ("processor_config.json", "tokenizer_config.json"):
        path = Path(folder) / name
        path.write_text(path.read_text().replace("ColQwen2Processor", "Qwen2VLProcessor"))
    with pytest.raises(ConfigError, match="its processor needs the package torchvision"):
        load_encoder(folder, device="cpu")


def test_batches_of_images_grow_to_the_budget(models):
    encoder, sizes = load_encoder(models["dse"], device="cpu"), []
    encoder.batch_pixels = 3 * 3 * 32 * 32  # three images
    watched = encoder._forward

    def forward(features, role):
        sizes.append(len(features["input_ids"]))
        return watched(features, role)

    encoder._forward = forward  # type: ignore[method-assign]
    encoder.encode(PICTURES, "passage")
    assert sizes == [1, 2, 3, 3, 1]
