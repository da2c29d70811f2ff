"""Values of --retriever: every kind opens, a YAML file nests, and what is wrong is said in one line."""

import asyncio

import pytest

from data.errors import ConfigError
from data.records import Hit
from retriever_server.client.search_client import connect
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.open_retriever import open_retriever
from retriever_server.retriever import Retriever
from retriever_server.retrievers.cache import Cached
from retriever_server.retrievers.fuse import Fuse
from retriever_server.retrievers.remote import Remote
from tests.retriever_server.running import build_small_index


class Parrot(Retriever):
    """A user's own: finds nothing."""

    generation = "parrot"

    def __init__(self, words: int, loud=False) -> None:
        self.words, self.loud = words, loud

    def search(self, queries, k, where=None) -> list[list[Hit]]:
        return [[] for _ in queries]


def parrot(words: int) -> Retriever:
    """A function that makes one."""
    return Parrot(words, loud=True)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_small_index(tmp_path_factory.mktemp("opened"))


def open_yaml(tmp_path, text: str) -> Retriever:
    (tmp_path / "mine.yaml").write_text(text)
    return open_retriever(str(tmp_path / "mine.yaml"))


def test_every_kind_of_word_opens(index):
    assert isinstance(open_retriever(str(index)), BM25Index)
    assert open_retriever("none").search(["fox"], 3) == [[]]
    drawn = open_retriever(f"random:{index}")
    assert drawn.generation.startswith("random-") and len(drawn.search(["fox"], 3)[0]) == 3
    remote = open_retriever("http://127.0.0.1:9/retrieve", deadline_seconds=3)
    assert isinstance(remote, Remote) and remote._http.deadline_seconds == 3
    remote.close()
    for spec in (str(index), "none", "http://127.0.0.1:9"):
        with pytest.raises(ConfigError, match=r"deadline_seconds = -1: must be > 0"):
            open_retriever(spec, deadline_seconds=-1)


def test_a_yaml_file_nests_and_names_retrievers_by_what_the_option_accepts(tmp_path, index):
    (tmp_path / "inner.yaml").write_text(f"class_path: Cached\ninit_args: {{retriever: {index}, size: 7}}")
    opened = open_yaml(
        tmp_path,
        f"""
class_path: Fuse
init_args:
  parts:
  - {index}
  - {tmp_path}/inner.yaml
  - class_path: Cached
    init_args: {{retriever: none}}
  method: convex
  weights: [1, 2, 3]
""",
    )
    assert isinstance(opened, Fuse) and opened.method == "convex" and opened.weights == [1.0, 2.0, 3.0]
    first, second, third = opened.parts
    assert isinstance(first, BM25Index)
    assert isinstance(second, Cached) and second.size == 7 and isinstance(second.retriever, BM25Index)
    assert third.generation == "none"
    assert [hit.passage.text for hit in opened.search(["fox"], 1)[0]] == ["red fox"]


def test_a_users_own_class_or_function_plugs_in_by_its_path(tmp_path):
    opened = open_yaml(tmp_path, f"class_path: {__name__}.Parrot\ninit_args: {{words: 3}}")
    assert (opened.words, opened.loud) == (3, False)  # type: ignore[attr-defined]
    made = open_yaml(tmp_path, f"class_path: {__name__}.parrot\ninit_args: {{words: 4}}")
    assert (made.words, made.loud) == (4, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "class_path: Fuze",
            r"mine.yaml: class_path: 'Fuze' must be one of open_index, Fuse, .*module.Class",
        ),
        ("class_path: nowhere.Fuse", r"class_path: 'nowhere.Fuse': no module nowhere in .*, nor installed"),
        (
            "class_path: data.records.Hat",
            r"class_path: 'data.records.Hat': .*records.py defines no Hat, but Hit",
        ),
        ("class_path: pathlib.Path", r"mine.yaml: class_path: pathlib.Path is no Retriever"),
        ("[1, 2]", r"mine.yaml: must be a mapping of class_path and init_args"),
        (
            "class_path: Fuse\nparts: []",
            "must be a mapping of class_path and init_args; found class_path, parts",
        ),
        (
            "class_path: Fuse\ninit_args: {parts: [none], depht: 3}",
            r"init_args.depht: unknown key; Fuse takes parts, method",
        ),
        (
            "class_path: Fuse\ninit_args: {parts: [none], rrf_k: many}",
            r"init_args: rrf_k: got 'many', expected int",
        ),
        ("class_path: Fuse\ninit_args: {parts: none}", r"init_args.parts: expected a list of Retriever"),
        ("class_path: Fuse\ninit_args: {}", r"mine.yaml: init_args: missing: parts"),
        (
            "class_path: Fuse\ninit_args: {parts: [none, no/index]}",
            r"init_args.parts\[1\]: retriever 'no/index': must be an http",
        ),
        (
            "class_path: Cached\ninit_args: {retriever: {class_path: Fuse, init_args: {parts: [none], k: 1}}}",  # noqa: E501
            r"mine.yaml: init_args.retriever.init_args.k: unknown key; Fuse takes",
        ),
        ("class_path: Cached\ninit_args: {retriever: none, size: 0}", r"init_args: size = 0: must be >= 1"),
        ("class_path: Fuse\n  init_args:", r"mine.yaml, line 2: not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_file_and_key(text, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as caught:
        open_yaml(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["nowhere", "random:nowhere", "absent.yaml"])
def test_what_is_none_of_them_is_refused(spec):
    with pytest.raises(ConfigError, match=r"must be an http\(s\) URL or the folder|no such file"):
        open_retriever(spec)


def test_the_client_searches_whatever_opens(tmp_path, index):
    open_yaml(tmp_path, f"class_path: Fuse\ninit_args: {{parts: [{index}, {index}]}}")

    async def ask() -> list[Hit]:
        async with connect(str(tmp_path / "mine.yaml")) as client:
            return await client.search("sea", 2)

    hits = asyncio.run(ask())
    assert len(hits) == 2 and hits[0].generation.startswith("fuse-")


def test_an_index_can_be_opened_with_options_of_its_kind(tmp_path, index):
    opened = open_yaml(tmp_path, f"class_path: open_index\ninit_args: {{path: {index}}}")
    assert isinstance(opened, BM25Index)


def test_a_file_that_names_itself_is_refused(tmp_path):
    file = tmp_path / "loop.yaml"
    file.write_text(f"class_path: Cached\ninit_args:\n  retriever: {file}\n")
    with pytest.raises(
        ConfigError, match=r"^[^:]+loop\.yaml: init_args\.retriever: [^:]+loop\.yaml: names itself"
    ):
        open_retriever(str(file))
