"""Models that read pages: how an item is written, padding, towers, and gradients in mini-batches."""

import pytest
import torch
from sentence_transformers.multi_vector_encoder import losses as late
from sentence_transformers.sentence_transformer import losses

from data.errors import ConfigError
from retriever_server.encoders.loading import load_model
from retriever_server.encoders.read_spec import read_spec
from retriever_server.training.builders import vision
from retriever_server.training.losses.info_nce import Qwen3InfoNCE, item_keys
from retriever_server.training.trainer import ImageCollator, without_absent_images
from tests.retriever_server.training.pages import page, towers, vlm, write_pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return write_pages(tmp_path_factory.mktemp("pages"))


def features(model, items, task="document"):
    return {**ImageCollator(model)(items, prompt=model.prompts[task] or None, task=task), "task": task}


def test_an_item_is_written_as_its_image_then_its_text_then_eos_and_no_text_names_an_image(pages):
    model = vision.dse(vlm(pages), max_tokens=16)
    items = [page(pages, 0, "<image> red " * 9), "red <image>" * 9, page(pages, 0)]
    inputs, images = features(model, items, "query"), (4, 0, 4)
    for ids, mask, count in zip(inputs["input_ids"], inputs["attention_mask"].bool(), images, strict=True):
        tokens = model.tokenizer.convert_ids_to_tokens(ids[mask])
        assert tokens.count("<image>") == count and len(tokens) <= 16
        assert tokens[-1] == model.tokenizer.eos_token
        assert (tokens[0] == "<fake_token_around_image>") is bool(count)


def test_augmentation_stands_behind_queries_alone_and_only_patches_are_kept_of_pages(pages):
    model = vision.colpali(vlm(pages), dimension=8, augmentation=3, only_patches=True).eval()
    eos = model.tokenizer.eos_token_id
    query, passage = features(model, ["red"], "query"), features(model, [page(pages, 0)])
    assert (query["input_ids"][0, -3:] == eos).all() and not (passage["input_ids"] == eos).any()
    assert passage["input_ids"].shape[1] == 7
    assert model(passage, task="document")["attention_mask"].sum() == 4


@pytest.mark.parametrize("build", ["dse", "colpali"])
def test_vectors_do_not_depend_on_the_side_of_the_padding(pages, build):
    model = getattr(vision, build)(vlm(pages)).eval()
    items, vectors = [page(pages, 0, "a red block on the left"), "red", page(pages, 3)], []
    for model.tokenizer.padding_side in ("left", "right"):
        out = model(features(model, items), task="document")
        mask = out["attention_mask"].bool()
        vectors.append(out["token_embeddings"][mask] if build == "colpali" else out["sentence_embedding"])
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=1e-5)


def test_the_image_processor_is_changed_for_the_model_and_for_what_is_saved(pages, tmp_path):
    tiles = {"do_image_splitting": True, "size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    model = vision.dse(vlm(pages), images=tiles)
    inputs = features(model, [page(pages, 0)])
    assert (
        inputs["input_ids"] == model[0].processor.image_token_id
    ).sum() == 4 * 3  # two tiles and the whole
    model.save(str(tmp_path / "model"), create_model_card=False)
    whole = vision.dse(vlm(pages))
    specs = [
        read_spec("", each).image_processor for each in (load_model(str(tmp_path / "model")), model, whole)
    ]
    assert specs[0] == specs[1] != specs[2]


def test_two_towers_meet_in_one_space(pages):
    model = vision.two_tower_pages(**towers(pages), dimension=8).eval()
    text, image = features(model, ["red left"]), features(model, [page(pages, 0)])
    assert model(text)["sentence_embedding"].shape == model(image)["sentence_embedding"].shape == (1, 8)
    model = vision.two_tower_pages(**towers(pages), vectors="many", dimension=8).eval()
    out = model(features(model, [page(pages, 0)]))
    assert out["token_embeddings"].shape == (1, 5, 8) and out["attention_mask"].all()


def test_a_base_without_eyes_is_refused(pages):
    text = towers(pages)["base"]
    for build in (lambda: vision.two_tower_pages(text, text), lambda: vision.dse(text)):
        with pytest.raises(ConfigError, match="bert model reads no images"):
            build()


LOSSES = {
    "dse": (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss),
    "gme": (Qwen3InfoNCE, Qwen3InfoNCE),
    "two_tower_pages": (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss),
    "colpali": (
        late.MultiVectorMultipleNegativesRankingLoss,
        late.CachedMultiVectorMultipleNegativesRankingLoss,
    ),
}


@pytest.mark.parametrize("build", LOSSES)
def test_gradcache_with_images_equals_the_full_batch(pages, build):
    one_tower = build != "two_tower_pages"
    base = {"base": vlm(pages)} if one_tower else towers(pages)
    model = getattr(vision, build)(**base).eval()
    without_absent_images(model)
    documents = [page(pages, i) for i in range(4)]
    if one_tower:
        documents[:2] = ["red", "a blue block"]
        documents[3] = page(pages, 3, "a text")
    queries = ["red", "blue", "red left", "red right"]
    columns = [features(model, queries, "query"), features(model, documents)]

    def gradients(loss):
        model.zero_grad()
        loss([dict(each) for each in columns], None).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, cached = LOSSES[build]
    expected, got = gradients(whole(model)), gradients(cached(model, mini_batch_size=2))
    assert expected.keys() == got.keys() and len(got) > 5
    assert sum(float(each.abs().sum()) for each in got.values()) > 0.1
    for name, each in expected.items():
        torch.testing.assert_close(got[name], each, atol=1e-5, rtol=1e-3)


def test_two_pages_are_not_taken_for_one_and_the_same_page_is(pages):
    items = [page(pages, 0), page(pages, 1), page(pages, 0), page(pages, 0, "red")]
    for model in (vision.gme(vlm(pages)), vision.two_tower_pages(**towers(pages))):
        inputs = features(model, items[: 4 if "input_ids" in features(model, items[:1]) else 3])
        keys = item_keys(inputs).tolist()
        assert keys[0] == keys[2] and len(set(keys)) == len(keys) - 1
    patches = torch.rand(6, 5)  # Qwen2-VL: rows of patches; images of 2 and 4, the text alone has none
    flat = {"input_ids": torch.ones(3, 2).long(), "attention_mask": torch.ones(3, 2).long()}
    flat |= {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 1, 2], [1, 2, 2]])}
    keys = item_keys({**flat, "num_images_per_sample": torch.tensor([1, 0, 1])}).tolist()
    assert len(set(keys)) == 3
    assert keys[1] == item_keys({k: v for k, v in flat.items() if "_values" not in k}).tolist()[1]
