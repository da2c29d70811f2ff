"""Every writer's files are read back by its reader, whatever stands in ids and texts; or an id is refused."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.corpus import Corpus
from data.errors import DataError
from data.examples import Examples
from data.formats.benchmarks import benchmark_passages, load_benchmark
from data.formats.rows import passage_row
from data.formats.training import one_text
from data.formats.trec import load_run, write_run
from data.jsonl import write_jsonl
from data.records import Example, Hit, Passage
from retriever_server.training.convert import FORMATS, convert_from, convert_to
from tests.samples import quick

SIGNS = " \t\n\r\x0b\x1c\x85\u00a0\u2028\ufeff\"',;%#\\/[]{}:0a\u00e9\u9df9\U0001f600"
TABLES = ("beir", "msmarco")  # whose ids stand in tables
NOT_IN_TABLES = re.compile(r"[\t\r\n]|^\ufeff")
WORDS = st.text(st.sampled_from(SIGNS), max_size=6)
ANY = WORDS.filter(str.strip)
IN_TABLES = ANY.filter(lambda id_: not NOT_IN_TABLES.search(id_))
several = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


def one_line(text: str) -> str:
    return " ".join(text.split())


@st.composite
def lists_of_ids(draw):
    kind = draw(st.sampled_from([ANY, IN_TABLES]))
    return draw(st.lists(kind, min_size=9, max_size=9, unique=True))


@st.composite
def collections(draw, kinds):
    """Six passages, and three examples over them; ids and titles of any signs, texts that differ."""
    ids = draw(kinds)
    metadata = st.sampled_from([{}, {"year": 1999, "a": ["b", None]}])
    passages = [
        Passage(id_, f"{draw(WORDS)}text{n}{draw(WORDS)}".strip(), draw(WORDS).strip(), draw(metadata))
        for n, id_ in enumerate(ids[:6])
    ]
    examples = []
    for n, query_id in enumerate(ids[6:]):
        sides = draw(st.permutations(ids[:6]))
        scores = {id_: draw(st.floats(-9, 9)) for id_ in sides[:4]}
        query, answers = f"{draw(WORDS)}query{n}", tuple(draw(st.sampled_from([(), ("Rome", "7")])))
        query_id = query_id if draw(st.booleans()) else ""
        examples.append(Example(query, tuple(sides[:2]), tuple(sides[2:4]), scores, query_id, answers))
    return passages, examples


def write_ours(folder: Path, passages: list[Passage], examples: list[Example]) -> Examples:
    write_jsonl(folder / "corpus.jsonl", (passage_row(passage, folder) for passage in passages))
    write_jsonl(folder / "ours.jsonl", (each.as_record() for each in examples))
    return Examples(folder / "ours.jsonl", Corpus(folder / "corpus.jsonl"))


def judged(examples):
    return [(each.query, set(each.positives), each.negatives) for each in examples]


@pytest.mark.parametrize(
    "name",
    quick(
        ["tevatron-v2", "beir"],
        [name for name, form in FORMATS.items() if form.write],
    ),
)
@several
@given(collections(lists_of_ids()))
def test_what_a_format_writes_comes_back_the_same(name, collection):
    with tempfile.TemporaryDirectory() as scratch:
        folder, form = Path(scratch), FORMATS[name]
        source = write_ours(folder, *collection)
        try:
            convert_to(name, source, folder / "theirs")
        except DataError as error:
            ids = {p.id for p in source.corpus} | {each.query_id for each in source}
            refused = [id_ for id_ in ids if NOT_IN_TABLES.search(id_)]
            assert name in TABLES and any(repr(id_) in str(error) for id_ in refused)
            return
        done = convert_from(
            name, folder / "theirs", folder / "back", None if form.has_ids else source.corpus.path
        )
        back = list(Examples(done.examples, done.corpus))
        if name == "sentence-transformers":  # a row a positive
            expected = [replace(each, positives=(id_,)) for each in source for id_ in each.positives]
        else:
            expected = [
                replace(each, query=one_line(each.query)) if name == "msmarco" else each for each in source
            ]
        assert judged(back) == judged(expected)
        assert name not in ("tevatron", "tevatron-v2", *TABLES) or all(
            after.query_id == before.query_id
            for before, after in zip(source, back, strict=True)
            if before.query_id
        )
        assert name != "dpr" or [each.answers for each in back] == [each.answers for each in source]
        assert name != "bge" or [each.scores for each in back] == [each.scores for each in source]
        for passage in source.corpus if name in ("tevatron-v2", "beir", "msmarco") else ():
            kept = {"tevatron-v2": replace(passage, metadata={}), "beir": passage}
            flat = Passage(passage.id, one_line(one_text(passage)))
            assert done.corpus.get(passage.id) == kept.get(name, flat)


@several
@given(collections(st.lists(IN_TABLES, min_size=9, max_size=9, unique=True)))
def test_a_folder_of_beir_is_a_benchmark_with_all_its_passages(collection):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = write_ours(folder, *collection)
        convert_to("beir", source, folder / "beir")
        write_jsonl(
            folder / "back" / "corpus.jsonl", benchmark_passages(str(folder / "beir"), folder / "back")
        )
        assert list(Corpus(folder / "back" / "corpus.jsonl")) == list(source.corpus)
        benchmark = load_benchmark(f"{folder / 'beir'}:train")
        assert [query.text for query in benchmark.queries] == [each.query for each in source]
        for query, each in zip(benchmark.queries, source, strict=True):
            assert benchmark.qrels[query.id] == dict.fromkeys(each.positives, 1) | dict.fromkeys(
                each.negatives, 0
            )


@several
@given(lists_of_ids(), st.lists(st.floats(-1e9, 1e9), min_size=6, max_size=6), WORDS)
@example([*"abcdefghi"], [0.0, -0.0, 0.0, 1.0, 1.0, -1.0], "a name")
def test_rankings_come_back_in_their_order(ids, scores, name):
    passages, queries = ids[:6], ids[6:]
    hits = [
        Hit(Passage(id_, ""), score, name) for id_, score in zip(passages, sorted(scores)[::-1], strict=True)
    ]
    refused = [id_ for id_ in ids if re.search(r"[\t\r\n]", id_)] + [
        q for q in queries if q.startswith("\ufeff")
    ]
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run.trec"
        if refused:
            with pytest.raises(DataError) as caught:
                write_run(run, dict.fromkeys(queries, hits), name)
            assert any(repr(id_) in str(caught.value) for id_ in refused)
            return
        write_run(run, dict.fromkeys(queries, hits), name)
        back = load_run(run)
        assert list(back) == queries
        assert all([hit.passage.id for hit in found] == passages for found in back.values())
