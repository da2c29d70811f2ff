"""Queries with images, through what is made of retrievers, another server, the client and `sleuth search`."""

import asyncio
import io

import pytest
from PIL import Image

from data.corpus import Corpus
from data.errors import ConfigError, DataError, RetrieverError, RetrieverRefused, RetrieverUnavailable
from data.jsonl import write_jsonl
from data.records import Item, Passage
from retriever_server.client.search_client import SearchClient, connect
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.flat import FlatIndex
from retriever_server.retrievers.cache import Cached
from retriever_server.retrievers.fuse import Fuse
from retriever_server.retrievers.remote import Remote
from retriever_server.retrievers.rerank import Rerank
from retriever_server.retrievers.shard import Sharded
from retriever_server.server.app import Limits, create_app
from retriever_server.server.batching import run_isolated
from scripts import search
from tests.retriever_server.answering import answering, echo
from tests.retriever_server.retrievers.test_rerank import ByLetter
from tests.retriever_server.running import serving
from tests.retriever_server.server.test_image_requests import Colours, picture

NAMES = {"a/1": "red", "2": "green", "3": "blue"}
BLUE = Item(picture("blue"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("queries")
    for colour in NAMES.values():
        (folder / f"{colour}.png").write_bytes(picture(colour, (400, 300)))
    write_jsonl(folder / "pages.jsonl", [{"id": i, "image": f"{c}.png"} for i, c in NAMES.items()])
    write_jsonl(folder / "texts.jsonl", [{"id": i, "text": f"the {c} sea"} for i, c in NAMES.items()])
    return folder


@pytest.fixture(scope="module")
def pages(folder):
    return FlatIndex.build(Corpus(folder / "pages.jsonl"), folder / "flat", Colours())


@pytest.fixture(scope="module")
def texts(folder):
    return BM25Index.build(Corpus(folder / "texts.jsonl"), folder / "bm25")


@pytest.fixture(scope="module")
def url(pages):
    with serving(create_app(pages, Limits(max_images=1))) as url:
        yield url


def ids(rankings):
    return [[hit.passage.id for hit in ranking] for ranking in rankings]


def test_a_text_is_asked_of_both_and_an_image_of_what_takes_images(texts, pages):
    asked = []
    pages_alone, spied = Fuse([pages]), BM25Index.search

    class Spy(type(texts)):
        def __init__(self) -> None:
            self.generation = texts.generation

        def search(self, queries, k, where=None):
            asked.append(list(queries))
            return spied(texts, queries, k, where)

    both = Fuse([Spy(), pages])
    by_text, by_image, by_two = both.search(["green", BLUE, Item(picture("red"), "green")], 3)
    assert asked == [["green"]]
    assert by_text[0].passage.id == "2" and by_text[0].score == pytest.approx(2 / 61)
    [alone] = pages_alone.search([BLUE], 3)
    assert [(h.passage.id, h.score) for h in by_image] == [(h.passage.id, h.score) for h in alone]
    assert {hit.passage.id for hit in by_two[:2]} == {"a/1", "2"}
    assert both.takes_images() and {hit.generation for hit in by_image} == {both.generation}


def test_a_passage_has_its_text_from_one_corpus_and_its_image_from_another(texts, pages):
    for parts in ([texts, pages], [pages, texts]):
        hit = Fuse(parts).search(["green"], 1)[0][0]
        assert hit.passage.text == "the green sea" and hit.passage.image.endswith("green.png")


def test_texts_that_differ_are_no_one_passage_though_one_has_an_image(texts, folder):
    rows = [{"id": i, "text": "other green", "image": f"{c}.png"} for i, c in NAMES.items()]
    write_jsonl(folder / "other.jsonl", rows)
    other = FlatIndex.build(Corpus(folder / "other.jsonl"), folder / "other", Colours())
    with pytest.raises(RetrieverError, match="is another passage in each part"):
        Fuse([texts, other]).search(["green"], 1)


def test_an_image_that_no_part_takes_is_refused(texts):
    both = Fuse([texts, texts])
    assert not both.takes_images() and both.accepts("green") and not both.accepts(BLUE)
    with pytest.raises(DataError, match="none of the retrievers that are fused takes images"):
        both.search(["green", BLUE], 1)


def test_what_wraps_takes_what_is_inside(texts, pages):
    assert Cached(pages).takes_images() and not Cached(texts).takes_images()
    assert Sharded([pages, pages]).takes_images() and not Sharded([pages, texts]).takes_images()
    assert not Rerank(pages, ByLetter()).takes_images()


def test_an_image_is_cached_by_its_hash_and_its_text(pages):
    cached = Cached(pages)
    asked = [BLUE, Item(picture("blue"), "red"), Item(picture("blue")), "blue"]
    first = cached.search(asked, 2)
    assert ids(first) == ids(pages.search(asked, 2))
    assert ids(cached.search(asked, 2)) == ids(first)
    assert (cached.hits, cached.misses) == (4, 4)
    keys = [key[1] for key in cached._kept]
    assert [len(key.image) for key in keys if isinstance(key, Item)] == [32, 32]


def test_an_unreadable_image_fails_alone_in_its_batch():
    def work(items):
        if any(item.image == b"bad" for item in items):
            raise DataError("broken")
        return items

    good = Item(b"good")
    first, bad, last = run_isolated(work, [good, Item(b"bad"), Item(b"too")])
    assert (first, last) == (good, Item(b"too")) and isinstance(bad, DataError)


def test_remote_passes_images_on_and_shows_their_pages(url, pages, folder):
    remote = Remote(url)
    assert remote.takes_images()
    file, bare = str(folder / "green.png"), "red"
    found = remote.search([BLUE, Item(file), bare, Item(file, "red")], 1)  # halved until each may pass
    assert ids(found)[:3] == [["3"], ["2"], ["a/1"]]
    assert (
        found[2][0].passage.image == f"{url}/v1/thumbnail/a%2F1"
        and found[0][0].generation == pages.generation
    )
    assert Image.open(io.BytesIO(remote.thumbnail("a/1", 100) or b"")).size == (100, 75)
    assert remote.thumbnail("nothing", 100) is None
    assert ids(remote.search([BLUE], 1, {"year": 1})) == [[]]
    remote.close()


def test_a_server_before_a_server_shows_its_pages(url, texts):
    with serving(create_app(Cached(Fuse([texts, Remote(url)])))) as outer:
        remote = Remote(outer)
        [[hit]] = remote.search([BLUE], 1)
        assert hit.passage.image == f"{outer}/v1/thumbnail/3" and remote.thumbnail("3", 64)
        remote.close()


def test_a_server_that_says_nothing_of_images_takes_none():
    with answering(retrieve=echo("g"), v1__info=lambda _: (200, {"kind": "x"})) as server:
        remote = Remote(server.url)
        assert not remote.takes_images() and not remote.takes_images()
        assert server.paths().count("/v1/info") == 1
        remote.close()
    absent = Remote("http://127.0.0.1:9", deadline_seconds=0.2)
    assert absent.takes_images()  # nobody is there to say no
    with pytest.raises(RetrieverUnavailable):
        absent.search([BLUE], 1)
    absent.close()


def test_a_client_asks_with_images_and_fetches_pictures(url, pages, folder):
    async def use(client: SearchClient):
        async with client:
            found = await asyncio.gather(*(client.search(q, 1) for q in ("green", BLUE, Item(folder_blue))))
            shown = [await client.picture(hit.passage, 100) for [hit] in found[:1]]
            with pytest.raises(DataError, match="passage '9' has no image"):
                await client.picture(Passage("9", "x"))
        return ids(found), Image.open(io.BytesIO(shown[0])).size

    folder_blue = str(folder / "blue.png")
    for client in (
        connect(url),
        SearchClient(pages),
        SearchClient(Cached(Remote(url))),
    ):
        assert asyncio.run(use(client)) == ([["2"], ["3"], ["3"]], (100, 75))


def test_a_picture_that_the_server_does_not_have_is_an_error(url):
    async def use():
        async with connect(url) as client:
            await client.picture(Passage("9", "", image="somewhere"))

    with pytest.raises(RetrieverRefused, match="answered 404"):
        asyncio.run(use())


def test_the_wire_names_no_file_that_is_opened():
    """A server's name of a passage's image is neither opened nor asked of anybody but that server."""
    from retriever_server.client.wire import parse_hits, parse_results

    document = {"id": "1", "title": "", "text": "", "thumbnail": "/etc/passwd", "image": "/etc/passwd"}
    [[hit]] = parse_hits({"result": [[document]]}, "http://h")
    found = {**document, "metadata": {}, "score": 1, "generation": ""}
    [row] = parse_results({"results": [{"hits": [found], "error": None}]}, "http://h")
    assert isinstance(row, list)
    [other] = row
    assert hit.passage.image == other.passage.image == "http://h/v1/thumbnail/1"


def test_sleuth_search_takes_a_picture(url, folder, capsys):
    search.main(retriever=url, image=str(folder / "blue.png"), top_k=1)
    assert f"{url}/v1/thumbnail/3" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"nothing\.png"):
        search.main(retriever=url, image=str(folder / "nothing.png"))
    with pytest.raises(ConfigError, match="query: must be given, or an --image"):
        search.main(retriever=url)
