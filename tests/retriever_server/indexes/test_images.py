"""Indexes of pages: what naive loops rank, tokens pooled, broken images, generations of one resolution."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.records import Item
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.spec import Multi, rows_of
from retriever_server.encoders.token_pooling import TokenPooling
from retriever_server.indexes.ann import AnnIndex
from retriever_server.indexes.base import open_index
from retriever_server.indexes.flat import FlatIndex
from retriever_server.indexes.maxsim import MaxSimIndex
from tests.pdfs import write_pdf
from tests.retriever_server.running import run_index
from tests.retriever_server.tiny_encoders import FakeEncoder
from tests.retriever_server.vision_models import picture, tiny_clip, tiny_colqwen2, tiny_vlm
from tests.samples import quick

COUNT = 24
QUERIES = ["a river", "the capital", picture(3), picture(101, 60, 60)]
INDEXES = {"flat": FlatIndex, "ann": AnnIndex, "maxsim": MaxSimIndex}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "dense": tiny_vlm(folder / "dse"),
        "multi": tiny_vlm(folder / "late", "multi", split=True),
        "colqwen2": tiny_colqwen2(folder / "colqwen2"),
        "clip": tiny_clip(folder / "clip"),
    }


@pytest.fixture
def pages(tmp_path) -> Corpus:
    """Pages of several shapes, each with a text beside it that is not encoded."""
    rows = []
    for i in range(COUNT):
        (tmp_path / f"{i}.png").write_bytes(bytes(picture(i, 24 + 8 * (i % 5), 64 - 8 * (i % 3)).image))
        rows.append(
            {"id": str(i), "text": f"page {i}", "image": f"{i}.png", "metadata": {"even": i % 2 == 0}}
        )
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    return Corpus(tmp_path / "corpus.jsonl")


def naive_maxsim(query: np.ndarray, page: np.ndarray) -> float:
    total = 0.0
    for token in query.astype(np.float64):
        total += max(float(token @ patch) for patch in page.astype(np.float64))
    return total


@pytest.mark.parametrize("kind", quick(["maxsim"], INDEXES))
def test_an_index_of_pages_ranks_as_a_naive_loop_one_page_at_a_time(models, pages, tmp_path, kind):
    encoder = load_encoder(models["multi" if kind == "maxsim" else "dense"], device="cpu")
    index = INDEXES[kind].build(pages, tmp_path / "i", encoder, "float32", passages_per_shard=10)
    vectors = [rows_of(encoder.encode([Item(page.image)], "passage"), 0) for page in pages]
    found = index.search(QUERIES, 5)
    for query, hits in zip(QUERIES, found, strict=True):
        asked = rows_of(encoder.encode([query], "query"), 0)
        scores = np.array([naive_maxsim(asked, each) for each in vectors])
        if kind == "maxsim":
            theirs = encoder._model.similarity([torch.from_numpy(asked)], [*map(torch.from_numpy, vectors)])
            np.testing.assert_allclose(theirs.numpy()[0], scores, atol=1e-5)
        assert [hit.passage.id for hit in hits] == [str(i) for i in np.argsort(-scores, kind="stable")[:5]]
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=1e-5)
    assert index.takes_images() and index.describe()["spec"]["inputs"] == "image"
    assert all(int(hit.passage.id) % 2 == 0 for hit in index.search(QUERIES[2:3], 9, {"even": True})[0])
    open_index(tmp_path / "i", device="cpu")  # its encoder by its spec, some pages encoded again


@pytest.mark.parametrize(("name", "shapes"), [("multi", [20, 120, 64, 64]), ("colqwen2", [28, 28, 64, 112])])
def test_padding_of_pages_leaves_no_vectors(models, name, shapes):
    encoder = load_encoder(models[name], device="cpu")
    short, long = picture(1, *shapes[:2]), picture(2, *shapes[2:])
    together = encoder.encode([short, long], "passage")
    assert len(together[0]) < len(together[1])
    for i, page in enumerate((short, long)):
        np.testing.assert_allclose(together[i], encoder.encode([page], "passage")[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together.values, axis=1), 1, atol=1e-5)


class Opposite(FakeEncoder):
    """Its queries lie on the other side of all passages: every product is negative."""

    def encode(self, texts, role):
        vectors = super().encode(texts, role)
        return Multi(np.abs(vectors.values) * (-1 if role == "query" else 1), vectors.offsets)


def test_no_padding_wins_a_maximum_with_its_zero(tmp_path):
    """If passages are padded with zero vectors, every maximum of theirs is at least 0 (ColPali)."""
    texts = [" ".join(f"w{i}{j}" for j in range(1 + i % 5)) for i in range(20)]
    write_jsonl(tmp_path / "c.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    encoder = Opposite("multi")
    index = MaxSimIndex.build(Corpus(tmp_path / "c.jsonl"), tmp_path / "i", encoder, "float32")
    query, pages = encoder.encode(["some words"], "query")[0], encoder.encode(texts, "passage")
    hits = index.search(["some words"], 20)[0]
    for hit in hits:
        page = pages[int(hit.passage.id)]
        assert hit.score == pytest.approx(naive_maxsim(query, page), abs=1e-5) and hit.score < -0.1
        if len(page) < 5:
            padded = np.concatenate([page, np.zeros((5 - len(page), 16))])
            assert naive_maxsim(query, padded) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_pooled_under_either_padding(models, side):
    encoder = load_encoder(models["dense"], device="cpu", inputs="text+image")
    alone = [encoder.encode([each], "query")[0] for each in mixed()]
    tokenizer = encoder._model.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        together = encoder.encode(mixed(), "query")
        given = encoder._model.preprocess([{"text": "find: " + each} for each in mixed()[:2]])
        hidden = encoder._model[0](dict(given))["token_embeddings"]
    finally:
        tokenizer.padding_side = before
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    mask = given["attention_mask"].bool()
    last = torch.stack([tokens[kept][-1] for tokens, kept in zip(hidden, mask, strict=True)])
    naive = (last / last.norm(dim=1, keepdim=True)).detach().numpy()
    np.testing.assert_allclose(together[:2], naive, atol=1e-5)


def mixed() -> list:
    image = picture(0).image
    return [
        "a river",
        "much longer than the other one",
        Item(image),
        Item(image, "and"),
        Item(image, "and " * 9),
    ]


def test_rows_pools_patches_side_by_side_and_leaves_text_tokens():
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    patch = np.array([0, 1, 1, 1, 1, 1, 0, 0, 1], bool)
    runs = [[0], [1, 2], [3, 4], [5], [6], [7], [8]]
    expected = np.stack([vectors[run].mean(0) / np.linalg.norm(vectors[run].mean(0)) for run in runs])
    np.testing.assert_allclose(TokenPooling("rows", 2).pool(vectors, patch), expected, atol=1e-6)


def test_hierarchical_pools_as_sentence_transformers_does():
    vectors = torch.nn.functional.normalize(
        torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    ours = TokenPooling("hierarchical", 4).pool(vectors.numpy(), np.ones(50, bool))
    theirs = HierarchicalTokenPooling(4, num_protected_tokens=0).pool([vectors])[0]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


def test_kmeans_finds_clusters_and_none_is_empty():
    rng = np.random.default_rng(0)
    centres = np.eye(4, 8, dtype=np.float32)
    vectors = np.repeat(centres, 6, 0) + 0.01 * rng.standard_normal((24, 8)).astype(np.float32)
    vectors = rng.permutation(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    pooled = TokenPooling("kmeans", 3).pool(vectors, np.ones(24, bool))
    assert 4 <= len(pooled) <= 8 and ((pooled @ centres.T).max(0) > 0.999).all()
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-5)
    assert TokenPooling.parse("") is None
    for wrong in ("rows", "rows:1", "means:4", "rows:x"):
        with pytest.raises(ConfigError, match=f"token_pooling '{wrong}': must be one of rows, kmeans"):
            TokenPooling.parse(wrong)


@pytest.mark.parametrize("pooling", quick(["rows:4"], ["rows:4", "kmeans:4", "hierarchical:4"]))
def test_an_index_of_pooled_pages_is_smaller_and_of_another_spec(models, pages, tmp_path, pooling):
    whole = load_encoder(models["multi"], device="cpu")
    pooled = load_encoder(models["multi"], device="cpu", token_pooling=pooling)
    built = MaxSimIndex.build(pages, tmp_path / "whole", whole)
    small = MaxSimIndex.build(pages, tmp_path / "small", pooled)
    tokens, fewer = int(built.offsets[-1]), int(small.offsets[-1])
    assert fewer < tokens if pooling == "rows:4" else fewer <= 0.26 * tokens  # rows leaves text tokens
    assert whole.spec.hash != pooled.spec.hash and small.generation != built.generation
    np.testing.assert_array_equal(*(e.encode(QUERIES, "query").values for e in (whole, pooled)))
    del pooled, small
    again = open_index(tmp_path / "small", device="cpu")
    assert again.encoder.spec.token_pooling == pooling  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=f"built with another encoder .*token_pooling: '{pooling}', here ''"):
        open_index(tmp_path / "small", encoder=whole)


@pytest.mark.parametrize("kind", quick(["flat"], INDEXES))
def test_a_broken_image_stops_the_build_by_name_or_is_skipped_by_choice(
    models, pages, tmp_path, kind, caplog
):
    encoder = load_encoder(models["multi" if kind == "maxsim" else "dense"], device="cpu")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    (tmp_path / "7.png").unlink()
    build, out = INDEXES[kind].build, tmp_path / "i"
    with pytest.raises(DataError, match=r"passage '3': .*3\.png: a broken image.*--on_error skip"):
        build(pages, out, encoder)
    index = build(pages, out, encoder, on_error="skip", passages_per_shard=10)
    assert sorted(index.skipped) == [3, 7] and index.describe()["skipped"] == 2
    assert "skipped: passage '7'" in caplog.text
    hits = open_index(out, encoder=encoder).search(QUERIES, COUNT)
    assert all({"3", "7"}.isdisjoint(hit.passage.id for hit in each) for each in hits)
    assert all(len(each) == COUNT - 2 for each in hits)
    assert len(index.search(QUERIES[:1], COUNT, {"even": False})[0]) == COUNT // 2 - 2
    with pytest.raises(ConfigError, match="on_error = 'ignore': must be one of stop, skip"):
        build(pages, tmp_path / "j", encoder, on_error="ignore")
    with pytest.raises(ConfigError, match="holds the index"):  # with holes it is another one
        build(pages, out, encoder)


@pytest.mark.parametrize("kind", quick(["ann"], INDEXES))
def test_a_shard_of_texts_alone_is_skipped_and_a_corpus_of_them_is_refused(models, pages, tmp_path, kind):
    encoder = load_encoder(models["multi" if kind == "maxsim" else "dense"], device="cpu")
    texts = [{"id": f"t{i}", "text": "words"} for i in range(4)]
    pictures = [{"id": p.id, "image": p.image} for p in pages]
    write_jsonl(tmp_path / "mixed.jsonl", texts + pictures)
    mixed, build = Corpus(tmp_path / "mixed.jsonl"), INDEXES[kind].build
    index = build(mixed, tmp_path / "i", encoder, on_error="skip", passages_per_shard=2)
    assert len(index.search(QUERIES[:1], COUNT + 4)[0]) == COUNT
    write_jsonl(tmp_path / "texts.jsonl", texts)
    with pytest.raises(DataError, match=r"texts\.jsonl: none of its 4 passages can be encoded"):
        build(Corpus(tmp_path / "texts.jsonl"), tmp_path / "j", encoder, on_error="skip")


def test_skipped_passages_do_not_crowd_out_what_points_away_from_the_query(models, pages, tmp_path):
    encoder = load_encoder(models["dense"], device="cpu")
    rows = [{"id": f"t{i}", "text": "words"} for i in range(300)]
    rows += [{"id": p.id, "image": p.image} for p in pages]
    write_jsonl(tmp_path / "c.jsonl", rows)
    index = INDEXES["ann"].build(Corpus(tmp_path / "c.jsonl"), tmp_path / "i", encoder, on_error="skip")
    away = -np.stack([index.stored(300 + i)[0] for i in range(COUNT)]).sum(0, keepdims=True)
    [(positions, scores)] = index.rank(away.astype(np.float32), 3)
    assert len(positions) == 3 and (positions >= 300).all() and (scores < 0).all()


def test_a_passage_without_an_image_is_refused_by_name(models, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [{"id": "7", "text": "words alone"}])
    with pytest.raises(DataError, match=r"passage '7' has no image, and .* encodes nothing else"):
        FlatIndex.build(
            Corpus(tmp_path / "c.jsonl"), tmp_path / "i", load_encoder(models["clip"], device="cpu")
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi", "clip"])
def test_one_command_indexes_a_folder_of_pages_and_pdfs(models, tmp_path, capsys, name):
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "cover.png").write_bytes(bytes(picture(3).image))
    write_pdf(folder / "report.pdf", ["The first page", "The second page\nhas two lines"])
    (folder / "broken.png").write_bytes(b"no picture")
    given = {"corpus": str(folder), "out": str(tmp_path / "i"), "encoder": models[name], "device": "cpu"}
    with pytest.raises(DataError, match=r"broken\.png: .*--on_error skip"):
        run_index(**given)
    run_index(**given, on_error="skip", token_pooling="rows:4" if name == "multi" else "")
    said = capsys.readouterr().out
    assert "indexed 3 passages" in said and re.search(r"\d+ images; the model waited for them \d+%", said)
    hits = open_index(tmp_path / "i", device="cpu").search([picture(3)], 3)[0]
    assert {hit.passage.id for hit in hits} == {"cover.png", "report.pdf#page=1", "report.pdf#page=2"}
    assert name == "multi" or hits[0].passage.id == "cover.png"
    assert "second page" in next(hit.passage.text for hit in hits if hit.passage.id.endswith("2"))
    run_index(str(folder), str(tmp_path / "words"), on_error="skip")  # BM25, of what the PDFs say
    found = open_index(tmp_path / "words").search(["second lines"], 1)[0]
    assert found[0].passage.id == "report.pdf#page=2" and found[0].passage.image.endswith(".png")
    with pytest.raises(ConfigError, match="--token_pooling rows:4: has a meaning only with --encoder"):
        run_index(str(folder), str(tmp_path / "words"), token_pooling="rows:4")


@pytest.mark.slow
def test_another_resolution_is_refused_by_the_spec(pages, tmp_path):
    folder = tiny_colqwen2(tmp_path / "model")
    encoder = load_encoder(folder, device="cpu")
    MaxSimIndex.build(pages, tmp_path / "i", encoder)
    config = Path(folder) / "processor_config.json"
    settings = json.loads(config.read_text())
    settings["image_processor"]["size"]["longest_edge"] = 4 * 28 * 28
    config.write_text(json.dumps(settings))
    other = load_encoder(folder, device="cpu")
    with pytest.raises(DataError, match=r"built with another encoder \(image_processor: .*longest_edge"):
        open_index(tmp_path / "i", encoder=other)
    del encoder
    with pytest.raises(DataError, match=r"another encoder than was asked for .image_processor"):
        open_index(tmp_path / "i", device="cpu")  # a server that starts again
