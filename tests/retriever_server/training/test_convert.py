"""Training data of other projects: what we read is theirs, and what we write comes back the same."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples, parse_example
from data.jsonl import read_jsonl, write_jsonl
from retriever_server.training.convert import convert_from, convert_to

PASSAGES = [{"id": f"p{i}", "title": f"T{i}" if i % 2 else "", "text": f"text of {i}"} for i in range(6)]
ROWS = [
    {"query_id": "q0", "query": "first ö", "positives": ["p0", "p3"], "negatives": ["p1", "p2"]},
    {"query_id": "q1", "query": "second", "positives": ["p5"], "negatives": ["p4", "p1"]},
]
SCORED = [
    row | {"scores": {p: i / 2 for i, p in enumerate([*row["positives"], *row["negatives"]])}} for row in ROWS
]


@pytest.fixture
def corpus(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", PASSAGES)
    return Corpus(tmp_path / "corpus.jsonl")


def ours(tmp_path, corpus, rows):
    write_jsonl(tmp_path / "ours.jsonl", rows)
    return Examples(tmp_path / "ours.jsonl", corpus)


def plain(examples, *without):
    records = [replace(example, provenance={}).as_record() for example in examples]
    return [{key: value for key, value in record.items() if key not in without} for record in records]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(done):
    """Query -> texts of the positives and of the negatives."""
    examples = Examples(done.examples, done.corpus)
    text = {passage.id: passage.contents for passage in done.corpus}
    return {e.query: ([text[i] for i in e.positives], [text[i] for i in e.negatives]) for e in examples}


@pytest.mark.parametrize("name", ["tevatron", "tevatron-v2", "beir", "msmarco", "dpr"])
def test_formats_with_ids_come_back_the_same(tmp_path, corpus, name):
    source = ours(tmp_path, corpus, ROWS)
    convert_to(name, source, tmp_path / "theirs")
    done = convert_from(name, tmp_path / "theirs", tmp_path / "back")
    back = Examples(done.examples, done.corpus)
    lost = ["query_id"] if name == "dpr" else []
    assert plain(back, *lost) == plain(source, *lost)
    assert back[0].provenance == {"corpus": done.corpus.content_hash, "from": name}
    if name != "msmarco":  # which has no titles
        used = {passage.id: passage for passage in corpus}
        assert all(passage == used[passage.id] for passage in done.corpus)


@pytest.mark.parametrize(
    "name, rows", [("bge", SCORED), ("bge", ROWS), ("sentence-transformers", SCORED[1:])]
)
def test_formats_of_texts_find_their_passages_in_the_corpus(tmp_path, corpus, name, rows):
    source = ours(tmp_path, corpus, rows)
    convert_to(name, source, tmp_path / "theirs.jsonl")
    done = convert_from(name, tmp_path / "theirs.jsonl", tmp_path / "back", corpus=corpus.path)
    assert plain(Examples(done.examples, corpus), "query_id") == plain(source, "query_id")
    assert not (tmp_path / "back" / "corpus.jsonl").exists()


def test_tevatron_as_published(tmp_path):
    source = write(tmp_path / "train.jsonl", {
        "query_id": "23", "query": "what is rba",
        "positive_passages": [{"docid": "77", "title": "RBA", "text": "Since 2007"}],
        "negative_passages": [{"docid": "8", "title": "", "text": "other"}],
    })  # fmt: skip
    done = convert_from("tevatron", source, tmp_path / "out")
    assert read(done) == {"what is rba": (['"RBA"\nSince 2007'], ["other"])}
    assert [passage.id for passage in done.corpus] == ["77", "8"]


def test_labelled_texts_become_triples_that_their_ids_tell_apart(tmp_path):
    texts = [
        ("rain tomorrow", "weather"),
        ("snow on hills", "weather"),
        ("play jazz", "music"),
        ("a louder song", "music"),
    ]
    rows = [{"text": text, "label": label} for text, label in [*texts, ("book a table", "alone")]]
    done = convert_from("labelled", write(tmp_path / "texts.jsonl", *rows), tmp_path / "out")
    label_of, numbers = dict(texts) | {"book a table": "alone"}, set()
    for query, (good, bad) in read(done).items():
        stems, ids = zip(
            *(each.removesuffix("]").rsplit(" [", 1) for each in (query, *good, *bad)), strict=True
        )
        assert len(set(ids)) == 1 and stems[0] != stems[1]
        assert label_of[stems[0]] == label_of[stems[1]] != label_of[stems[2]]
        numbers.add(ids[0])
    assert len(numbers) == len(texts)  # the label that stands there once has no positive
    with pytest.raises(DataError, match="has 1 labels; two are needed"):
        convert_from("labelled", write(tmp_path / "one.jsonl", *rows[:2]), tmp_path / "one")


def test_bge_keeps_the_teachers_scores(tmp_path):
    row = {"query": "q", "pos": ["good"], "neg": ["bad", "worse"], "pos_scores": [9], "neg_scores": [2, 1]}
    source = write(tmp_path / "bge.jsonl", row | {"prompt": "p", "type": "normal"})
    done = convert_from("bge", source, tmp_path / "out")
    [example] = Examples(done.examples, done.corpus)
    assert list(example.scores.values()) == [9, 2, 1] and next(iter(example.scores)) == example.positives[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_plain_pairs_are_read_from_every_kind_of_table(tmp_path, suffix):
    end = " " if suffix == ".tsv" else "\n"  # which has no quotes, and so no line ends in its fields
    texts = [("who, me?", "you"), ("where", f'"a" here{end}or "there')]
    rows = [{"question": question, "passage": passage} for question, passage in texts]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        import csv

        how: dict = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), **(how if suffix == ".tsv" else {}))
            table.writeheader()
            table.writerows(rows)
    done = convert_from("sentence-transformers", path, tmp_path / "out")
    assert [passage.text for passage in done.corpus] == ["you", texts[1][1]]
    assert len(Examples(done.examples, done.corpus)) == 2


def test_triples_of_texts_are_grouped_by_their_query(tmp_path):
    (tmp_path / "t.tsv").write_text("q\tgood\tbad\nr\tfine\tbad\nq\tgood\tworse\n")
    done = convert_from("msmarco", tmp_path / "t.tsv", tmp_path / "out")
    assert read(done) == {"q": (["good"], ["bad", "worse"]), "r": (["fine"], ["bad"])}


def test_headers_of_triples_and_the_column_of_pandas_index_are_no_data(tmp_path):
    (tmp_path / "t.tsv").write_text("query\tpositive\tnegative\nq\tgood\tbad\n")
    (tmp_path / "t.csv").write_text(",query,positive,negative\n0,q,good,bad\n")
    for name, path in (("msmarco", tmp_path / "t.tsv"), ("sentence-transformers", tmp_path / "t.csv")):
        assert read(convert_from(name, path, tmp_path / "out")) == {"q": (["good"], ["bad"])}


def test_ids_that_are_words_are_no_header(tmp_path):
    passages = [{"id": id_, "text": f"about {id_}"} for id_ in ("p", "pos", "neg", "passage")]
    write_jsonl(tmp_path / "corpus.jsonl", passages)
    row = {"query_id": "q", "query": "text", "positives": ["pos"], "negatives": ["neg"]}
    source = ours(tmp_path, Corpus(tmp_path / "corpus.jsonl"), [row])
    convert_to("msmarco", source, tmp_path / "theirs")
    done = convert_from("msmarco", tmp_path / "theirs", tmp_path / "back")
    assert plain(Examples(done.examples, done.corpus)) == [row] and len(done.corpus) == 4


@pytest.mark.parametrize("as_lines", [True, False])
def test_dpr_reads_arrays_and_lines(tmp_path, as_lines):
    rows = [
        {
            "question": f"q{i}", "answers": ["x"],
            "positive_ctxs": [{"title": "A", "text": f"good {i} [,{{", "passage_id": f"{i}", "score": 1000}],
            "hard_negative_ctxs": [{"title": "B", "text": "hard", "psg_id": 99}],
            "negative_ctxs": [{"title": "C", "text": "easy"}],
        }
        for i in range(3)
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, indent=2)
    (tmp_path / "dpr.json").write_text(text)
    done = convert_from("dpr", tmp_path / "dpr.json", tmp_path / "out")
    assert read(done)["q2"] == (['"A"\ngood 2 [,{'], ['"B"\nhard', '"C"\neasy'])
    assert Examples(done.examples, done.corpus)[0].answers == ("x",)


def test_our_questions_name_passages_of_a_corpus(tmp_path, corpus):
    row = {"id": "x", "question": "who", "golden_answers": ["me"]}
    source = write(tmp_path / "questions.jsonl", row | {"metadata": {"supporting_ids": ["p1", "p2"]}})
    done = convert_from("questions", source, tmp_path / "out", corpus=corpus.path)
    [example] = Examples(done.examples, corpus)
    assert (example.query_id, example.positives, example.answers) == ("x", ("p1", "p2"), ("me",))
    with pytest.raises(ConfigError, match="corpus, which must be given"):
        convert_from("questions", source, tmp_path / "out")


def test_repetitions_empty_passages_and_false_negatives_are_left_out_and_counted(tmp_path):
    row = {"query": "q", "pos": ["good", "good", " "], "neg": ["bad", "", "good", "bad"]}
    done = convert_from("bge", write(tmp_path / "b.jsonl", row), tmp_path / "out")
    assert read(done) == {"q": (["good"], ["bad"])}
    assert done.left_out == {"empty passages": 2, "repetitions": 2, "negatives that are positives": 1}


@pytest.mark.parametrize(
    "name, line, message",
    [
        ("bge", '{"query": "q", "pos": [', r"theirs:2: not valid JSON"),
        ("bge", '{"pos": ["x"]}', r"theirs:2: no 'query'"),
        ("bge", '{"query": "q", "pos": [7]}', r'theirs:2: "pos" must be texts or objects.*found 7'),
        ("bge", '{"query": "q", "pos": []}', r"theirs:2: query 'q' has no positive"),
        ("bge", '{"query": " ", "pos": ["x"]}', r"theirs:2: the query is empty"),
        ("bge", '{"query": "q", "pos": ["x"], "pos_scores": [1, 2]}', r"theirs:2: 2 scores for 1 passages"),
        ("sentence-transformers", '{"q": "q", "p": "x", "label": 0}', r"theirs:2: label 0: must be > 0"),
        ("sentence-transformers", '{"q": "q"}', r"theirs:2: columns q: must be one of anchor"),
        ("tevatron", '{"query":"b","positive_passages": [{"docid":"1","text":"b"}]}', r"rs:2: passage '1'"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, name, line, message):
    good = {
        "bge": {"query": "a", "pos": ["x"]},
        "sentence-transformers": {"q": "a", "p": "x"},
        "tevatron": {"query": "a", "positive_passages": [{"docid": "1", "text": "a"}]},
    }[name]
    (tmp_path / "theirs").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        convert_from(name, tmp_path / "theirs", tmp_path / "out")
    assert not (tmp_path / "out" / "examples.jsonl").exists()


def test_a_corpus_of_others_and_the_source_are_not_replaced(tmp_path):
    source = tmp_path / "examples.jsonl"
    source.write_text('{"query": "q", "pos": ["good"], "neg": []}\n')
    with pytest.raises(ConfigError, match="must be another folder than that of source"):
        convert_from("bge", source, tmp_path)
    (own := tmp_path / "own").mkdir()
    (own / "corpus.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds another corpus\.jsonl, which would be replaced"):
        convert_from("bge", source, own)
    assert (own / "corpus.jsonl").read_text() == "mine"
    for _ in range(2):  # its own may be made again
        assert convert_from("bge", source, tmp_path / "new").count == 1
    with pytest.raises(ConfigError, match="is a file, the format beir is a folder"):
        convert_from("beir", source, tmp_path / "new")


def test_dangling_ids_are_errors_or_skipped(tmp_path, corpus):
    rows = [{"question": "a", "metadata": {"supporting_ids": ["p1"]}},
            {"question": "b", "metadata": {"supporting_ids": ["gone"]}}]  # fmt: skip
    source = write(tmp_path / "q.jsonl", *rows)
    with pytest.raises(DataError, match=r"q.jsonl:2: passage 'gone' is not in"):
        convert_from("questions", source, tmp_path / "out", corpus=corpus.path)
    done = convert_from("questions", source, tmp_path / "out", corpus=corpus.path, on_error="skip")
    assert done.count == 1 and done.left_out["examples"] == 1


def test_triples_cannot_say_that_there_are_no_negatives(tmp_path, corpus):
    source = ours(tmp_path, corpus, [ROWS[0], {"query": "alone", "positives": ["p1"]}])
    with pytest.raises(DataError, match=r"ours.jsonl:2: has no negatives"):
        convert_to("msmarco", source, tmp_path / "out")


def test_unequal_numbers_of_negatives_are_cut_to_the_least(tmp_path, corpus):
    source = ours(tmp_path, corpus, [ROWS[0], {**ROWS[1], "negatives": ["p4"]}])
    convert_to("sentence-transformers", source, tmp_path / "st.jsonl")
    rows = list(read_jsonl(tmp_path / "st.jsonl"))
    assert [list(row) for row in rows] == [["anchor", "positive", "negative_1"]] * 3  # one row a positive


def test_written_examples_parse(tmp_path, corpus):
    source = write(tmp_path / "bge.jsonl", {"query": "q", "pos": ["a"], "neg": ["b"]})
    done = convert_from("bge", source, tmp_path / "out")
    assert [parse_example(record).query for record in read_jsonl(done.examples)] == ["q"]


def picture(folder, name, colour):
    image = pytest.importorskip("PIL.Image").new("RGB", (8, 8), colour)
    path = folder / "pages" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def with_pictures(tmp_path):
    """Ours: a passage of an image, one of both, one of text; a query of each kind."""
    for name, colour in (("p0", "red"), ("p1", "green"), ("q", "blue")):
        picture(tmp_path, name, colour)
    passages = [{"id": "p0", "image": "pages/p0.png"}, {"id": "p1", "image": "pages/p1.png", "text": "green"}]
    write_jsonl(tmp_path / "corpus.jsonl", [*passages, {"id": "p2", "text": "no picture"}])
    rows = [
        {"query_id": "a", "query": "red?", "positives": ["p0"], "negatives": ["p2"]},
        {"query_id": "b", "query": "", "query_image": "pages/q.png", "positives": ["p1"]},
        {"query_id": "c", "query": "both", "query_image": "pages/q.png", "positives": ["p2"]},
    ]
    return ours(tmp_path, Corpus(tmp_path / "corpus.jsonl"), rows)


@pytest.mark.parametrize("name", ["tevatron-v2", "beir"])
def test_images_come_back_the_same_on_both_sides(tmp_path, name):
    source = with_pictures(tmp_path)
    convert_to(name, source, tmp_path / "deep" / "theirs")
    done = convert_from(name, tmp_path / "deep" / "theirs", tmp_path / "back")
    back = Examples(done.examples, done.corpus)
    assert plain(back) == plain(source)
    for before, after in zip(source.corpus, done.corpus, strict=True):
        assert (after.id, after.text, bool(after.image)) == (before.id, before.text, bool(before.image))
        assert not before.image or Path(before.image).samefile(after.image)
    written = [row["query_image"] for row in read_jsonl(done.examples) if "query_image" in row]
    assert written == ["../pages/q.png"] * 2  # so that the folders can move together


def test_tevatron_parquet_with_pictures_in_it_is_read(tmp_path):
    content = picture(tmp_path, "x", "red").read_bytes()
    folder = tmp_path / "theirs"
    folder.mkdir()
    corpus = [{"docid": "1", "image": {"bytes": content, "path": None}, "text": None}]
    pq.write_table(pa.Table.from_pylist(corpus), folder / "corpus-00000-of-00001.parquet")
    ids = {"positive_document_ids": ["1"], "negative_document_ids": []}
    row = {"query_id": "7", "query_text": "red?", "query_image": None, **ids}
    pq.write_table(pa.Table.from_pylist([row]), folder / "train-00000-of-00001.parquet")
    done = convert_from("tevatron-v2", folder, tmp_path / "ours")
    assert Path(done.corpus[0].image).read_bytes() == content
    assert Path(done.corpus[0].image).parent == tmp_path / "ours" / "images"
    assert plain(Examples(done.examples, done.corpus)) == [
        {"query_id": "7", "query": "red?", "positives": ["1"]}
    ]


def test_vidore_becomes_examples(tmp_path):
    content = picture(tmp_path, "x", "red").read_bytes()
    tables = {
        "corpus": [{"corpus-id": n, "image": {"bytes": content, "path": None}} for n in range(2)],
        "queries": [{"query-id": 5, "query": "red?"}],
        "qrels": [{"query-id": 5, "corpus-id": n, "score": n} for n in range(2)],
    }
    for name, rows in tables.items():
        (tmp_path / "v" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "v" / name / "test-00000-of-00001.parquet")
    done = convert_from("vidore", tmp_path / "v", tmp_path / "ours", split="test")
    assert plain(Examples(done.examples, done.corpus)) == [
        {"query_id": "5", "query": "red?", "positives": ["1"], "negatives": ["0"]}
    ]
    with pytest.raises(ConfigError, match="must name a split, one of test"):
        convert_from("vidore", tmp_path / "v", tmp_path / "ours")


def test_formats_without_images_refuse_what_would_be_empty(tmp_path):
    source = with_pictures(tmp_path)
    with pytest.raises(DataError, match=r"ours\.jsonl:2: the query is an image .* format bge"):
        convert_to("bge", source, tmp_path / "x.jsonl")
    source = ours(tmp_path, source.corpus, [{"query": "red?", "positives": ["p1"]}])
    with pytest.raises(DataError, match="passage 'p0' is an image without a text"):
        convert_to("msmarco", source, tmp_path / "x")
