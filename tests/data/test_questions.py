"""Question sets: every layout, merged sets with ids that differ, and what is said of a wrong row."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from data.errors import ConfigError, DataError
from data.jsonl import write_json, write_jsonl
from data.questions import load_questions
from data.records import Question

SHARED = Path(__file__).parents[3] / "shared" / "data"
OURS = {"id": "q1", "question": " Who? ", "golden_answers": ["Ann", "Ann ", "", "A. B."]}


def search_r1_row(index, question="who wrote it?", source="nq", split="train", target=("Ann",)):
    """A row as Search-R1's scripts write it, but for the wording of the instructions."""
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"Answer. Question: is not here yet. Question: {question}\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(target)}},
        "extra_info": {"split": split, "index": index},
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        write_json(path, rows)
    else:
        write_jsonl(path, rows)
    return str(path)


def ids(source, **options):
    return [question.id for question in load_questions(str(source), **options)]


def refuse_the_hub(monkeypatch, error):
    def load_dataset(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


FILES = ["set/dev.jsonl", "set/dev.jsonl.gz", "set/dev.json", "set/dev.parquet", "set/dev.feather"]


@pytest.mark.parametrize("name", FILES)
def test_our_rows_from_every_kind_of_file(tmp_path, name):
    metadata = {"hops": 2, "none": None, "cluster": "ann"}
    rows = [{**OURS, "kind": None, "metadata": metadata}, {**OURS, "kind": "bridge", "id": "q2"}]
    first, second = load_questions(write(tmp_path / name, rows))
    metadata = {"data_source": "set", "hops": 2, "cluster": "ann"}  # a None beside it erases nothing
    assert first == Question("q1", "Who?", ("Ann", "A. B."), metadata)
    assert second.metadata == {"data_source": "set", "kind": "bridge"}


@pytest.mark.parametrize("name", FILES)
def test_search_r1_rows_from_every_kind_of_file(tmp_path, name):
    rows = [search_r1_row(0), search_r1_row(1, "and this", target=["B", "C"])]
    assert load_questions(write(tmp_path / name, rows)) == [
        Question("nq/train/0", "who wrote it?", ("Ann",), {"data_source": "nq"}),
        Question("nq/train/1", "and this", ("B", "C"), {"data_source": "nq"}),
    ]


def test_json_lines_in_a_json_file_are_read(tmp_path):
    (tmp_path / "a.json").write_text(f"\n{json.dumps(OURS)}\n")
    assert ids(tmp_path / "a.json") == ["q1"]


@pytest.mark.parametrize(
    ("answers", "golds"),
    [
        ({"golden_answers": "Ann"}, ("Ann",)),
        ({"gold_answers": ["Ann"]}, ("Ann",)),
        ({"answers": {"text": ["Ann", "Ann"], "answer_start": [1, 1]}}, ("Ann",)),
        ({"answer": "Ann"}, ("Ann",)),
        ({"answers": [1988, 2.5]}, ("1988", "2.5")),
        ({"golden_answers": [], "reward_model": {"ground_truth": {"target": "Ann"}}}, ("Ann",)),
        ({"reward_model": {"ground_truth": ["Ann", "Bo"]}}, ("Ann", "Bo")),
    ],
)
def test_gold_answers_under_each_name(tmp_path, answers, golds):
    [question] = load_questions(write(tmp_path / "a.jsonl", [{"id": "1", "question": "x", **answers}]))
    assert question.gold_answers == golds


def test_a_prompt_may_be_the_json_of_its_messages_and_metadata_a_map(tmp_path):
    prompt = [{"role": "user", "content": "Answer. Question: why?\n"}]
    row = {"id": "1", "prompt": json.dumps(prompt), "answer": "x"}
    assert load_questions(write(tmp_path / "a.jsonl", [row]))[0].text == "why?"
    with pytest.raises(DataError, match=r'b.jsonl:1: "prompt" must be a text, or messages'):
        load_questions(write(tmp_path / "b.jsonl", [row | {"prompt": str(prompt)}]))
    columns = {"id": ["1"], "question": ["why?"], "answer": ["x"]}
    maps = pyarrow.array([[("kind", "one_hop")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    pyarrow.parquet.write_table(pyarrow.table(columns | {"metadata": maps}), tmp_path / "c.parquet")
    assert load_questions(str(tmp_path / "c.parquet"))[0].metadata["kind"] == "one_hop"


def test_metadata_that_json_cannot_hold_are_refused_where_they_are_read(tmp_path):
    row = {"id": "1", "question": "why?", "answer": "x"}
    for number, more in enumerate(({"metadata": {"raw": b"x"}}, {"kind": b"x"})):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | more]), path)
        with pytest.raises(DataError, match=r'parquet: row 1: "metadata" must be JSON .*bytes'):
            load_questions(str(path))
    with pytest.raises(DataError, match='jsonl:1: "kind, cluster, data_source" holds nan'):
        load_questions(write(tmp_path / "a.jsonl", [row | {"kind": float("nan")}]))


def test_what_flashrag_left_in_a_search_r1_row_is_kept(tmp_path):
    row = {**search_r1_row(3, "other"), "id": "train_3", "question": "the real one", "golden_answers": ["G"]}
    [question] = load_questions(write(tmp_path / "a.parquet", [row]))
    assert (question.id, question.text, question.gold_answers) == ("train_3", "the real one", ("G",))


def test_indices_that_start_again_in_merged_sets_give_ids_that_differ(tmp_path):
    rows = [search_r1_row(i, source=source) for source in ("nq", "hotpotqa") for i in range(2)]
    assert ids(write(tmp_path / "a.parquet", rows)) == [
        "nq/train/0",
        "nq/train/1",
        "hotpotqa/train/0",
        "hotpotqa/train/1",
    ]


def test_only_ids_that_collide_are_qualified_and_a_limit_changes_none(tmp_path):
    one = write(tmp_path / "one" / "dev.jsonl", [OURS, {**OURS, "id": "x"}])
    two = write(tmp_path / "two" / "dev.jsonl", [OURS, {**OURS, "id": ""}, {**OURS, "id": 7}])
    merged = f"{one}, {two}"
    expected = ["one/dev/q1", "x", "two/dev/q1", "two/dev/1", "7"]
    assert ids(merged) == ids(merged) == expected
    assert ids(merged, limit=1) == expected[:1]
    assert ids(merged, limit=99) == expected


def test_ids_differ_even_when_qualified_names_collide(tmp_path):
    rows = [OURS, OURS, {**OURS, "id": "set/dev/q1"}, OURS]
    found = ids(write(tmp_path / "set" / "dev.jsonl", rows))
    assert len(set(found)) == 4
    assert found[2] == "set/dev/q1"


def test_split_chooses_among_the_rows_that_name_one(tmp_path):
    rows = [search_r1_row(0), search_r1_row(0, split="test"), {**OURS, "id": None}]
    path = write(tmp_path / "a.jsonl", rows)
    assert ids(path, split="test") == ["nq/test/0", f"{tmp_path.name}/test/2"]
    with pytest.raises(DataError, match="no row of split 'dev', only of test, train"):
        load_questions(write(tmp_path / "b.jsonl", rows[:2]), split="dev")


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"id": "1", "golden_answers": ["a"]}, 'no question: "question" is missing or empty'),
        ({"id": "1", "question": " ", "golden_answers": ["a"]}, "no question"),
        ({"id": "1", "question": 5, "golden_answers": ["a"]}, '"question" must be a string, found 5'),
        ({"Question": "", "Answer": "a"}, "no question"),
        ({**search_r1_row(0), "prompt": "no marker"}, "no prompt holds"),
        ({**search_r1_row(0), "prompt": [{"role": "system", "content": "Question: x"}]}, "no question"),
        (
            {"id": "1", "question": "x", "reply": "y"},
            "no gold answer: none of golden_answers, gold_answers, answers, answer holds one; "
            "there are id, question, reply",
        ),
        ({"id": "1", "question": "x", "golden_answers": ["", " "]}, "no gold answer"),
        ({"id": "1", "question": "x", "golden_answers": [["a"]]}, "a gold answer must be a string"),
        ({"id": "1", "question": "x", "answers": [True]}, "a gold answer must be a string, found true"),
        ({"id": [1], "question": "x", "answers": ["a"]}, '"id" must be a string'),
        ({"id": "1", "question": "x", "answers": ["a"], "metadata": "m"}, '"metadata" must be an object'),
    ],
)
def test_wrong_row_is_named(tmp_path, row, wrong):
    path = write(tmp_path / "a.jsonl", [OURS, row])
    with pytest.raises(DataError) as caught:
        load_questions(path, limit=1)
    assert f"{path}:2: " in str(caught.value)
    assert wrong in str(caught.value)


def test_wrong_row_of_a_table_and_of_an_array_is_named(tmp_path):
    rows = [OURS, {**OURS, "question": ""}]
    for name in ("a.parquet", "a.json"):
        with pytest.raises(DataError, match=rf"{name}: row 2: no question"):
            load_questions(write(tmp_path / name, rows))


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("a.txt", b"id,question\n", r"unknown kind of file; \.jsonl"),
        ("a.parquet", b"nonsense", "a.parquet: cannot be read: Parquet"),
        ("a.json", b'[{"id": 1},\n]', "a.json:2: not valid JSON"),
        ("a.json", b"[1]", "a.json: row 1: expected an object"),
        ("a.jsonl", b'{"id": 1\n', "a.jsonl:1: not valid JSON"),
        ("a.jsonl", b"\n", "a.jsonl: no rows"),
    ],
)
def test_file_that_holds_no_questions_is_said(tmp_path, name, content, wrong):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=wrong):
        load_questions(str(tmp_path / name))


def test_arguments_that_ask_for_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="limit = 0: must be >= 1"):
        load_questions(write(tmp_path / "a.jsonl", [OURS]), limit=0)
    with pytest.raises(ConfigError, match="questions = ' , '"):
        load_questions(" , ")


def test_comma_in_the_name_of_a_file_that_exists_does_not_part_it(tmp_path):
    assert ids(write(tmp_path / "a,b.jsonl", [OURS])) == ["q1"]


def test_hub_name_and_configuration_reach_datasets(monkeypatch):
    asked = []
    rows = datasets.Dataset.from_list([search_r1_row(0), search_r1_row(1)])

    def load_dataset(*name):
        asked.append(name)
        return datasets.DatasetDict({"train": rows, "test": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("data.models.hub.find_dataset", lambda *_: None)
    assert ids("org/name", split="train") == ["nq/train/0", "nq/train/1"]
    assert ids("org/name:part", split="test", limit=1) == ["nq/test/0"]
    assert asked == [("org/name", None), ("org/name", "part")]
    with pytest.raises(ConfigError, match="org/name: split = None: must be one of train, test"):
        load_questions("org/name")


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it\nmore"), ValueError("no config")])
def test_hub_out_of_reach_is_one_line_with_the_way_out(monkeypatch, error):
    refuse_the_hub(monkeypatch, error)
    monkeypatch.setattr("data.models.hub.find_dataset", lambda *_: None)
    with pytest.raises(DataError, match=r"org/name: no file here.*needs the network, or a local") as caught:
        load_questions("org/name")
    assert "\n" not in str(caught.value)


def test_missing_file_never_asks_the_hub(tmp_path, monkeypatch):
    refuse_the_hub(monkeypatch, AssertionError("asked the hub"))
    for name in ("runs/questions.jsonl", "set.parquet", "./name", str(tmp_path / "none")):
        with pytest.raises(DataError, match="no such file"):
            load_questions(name)


def test_numpy_targets_are_lists(monkeypatch):
    row = search_r1_row(0)
    row["reward_model"]["ground_truth"]["target"] = np.array(["Ann", "Bo"], dtype=object)
    row["prompt"] = np.array(row["prompt"], dtype=object)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": [row]})
    monkeypatch.setattr("data.models.hub.find_dataset", lambda *_: None)
    [question] = load_questions("org/name")
    assert question.gold_answers == ("Ann", "Bo")


def test_folder_is_read_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "mine" / "train.parquet", [search_r1_row(0, source=None)])
    write(tmp_path / "mine" / "test.parquet", [search_r1_row(5, source=None)])
    assert ids(tmp_path / "mine", split="test") == ["mine/test/5"]


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    saved = datasets.Dataset.from_list([search_r1_row(number) for number in range(2)])
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"dev": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "both")
    assert ids(tmp_path / "one") == ["nq/one/0", "nq/one/1"] and ids(tmp_path / "both", split="test")
    with pytest.raises(ConfigError, match="split = None: must be one of dev, test"):
        ids(tmp_path / "both")
    (tmp_path / "one" / "data-00000-of-00002.arrow").write_bytes(b"x" * 9)
    with pytest.raises(DataError, match=r"data-00000-of-00002.arrow: cannot be read: "):
        ids(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("squad/train", 6525),
        ("squad/dev", 1560),
        ("hotpotqa/train", 300),
        ("hotpotqa/dev", 200),
        ("musique/dev", 498),
        ("2wiki/gold", 568),
        ("qed/dev", 1355),
    ],
)
def test_real_questions_load_whole_under_their_own_ids(name, count):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("shared data is absent")
    questions = load_questions(str(path))
    own_ids = [json.loads(line)["id"] for line in path.read_bytes().splitlines()]
    assert len(questions) == count
    assert [question.id for question in questions] == own_ids
    assert all(question.text and question.gold_answers for question in questions)


def test_the_normalizer_of_answers_is_the_questions_own_or_chosen_for_all(tmp_path):
    rows = [{"id": "1", "question": "a?", "golden_answers": ["x"], "metadata": {"normalizer": "unicode"}}]
    write_jsonl(tmp_path / "q.jsonl", [*rows, {"id": "2", "question": "b?", "golden_answers": ["x"]}])
    source = str(tmp_path / "q.jsonl")
    assert [q.normalizer for q in load_questions(source)] == ["unicode", "squad"]
    assert {q.normalizer for q in load_questions(source, normalizer="unicode_folded")} == {"unicode_folded"}
    write_jsonl(tmp_path / "bad.jsonl", [rows[0] | {"metadata": {"normalizer": "lucene"}}])
    with pytest.raises(DataError, match=r"bad.jsonl:1: normalizer 'lucene': must be one of squad, unicode"):
        load_questions(str(tmp_path / "bad.jsonl"))


def test_a_folder_of_rows_with_other_fields_is_read_and_a_wrong_row_named(tmp_path):
    folder = tmp_path / "set"
    rows = [{**OURS, "metadata": None}, {**OURS, "id": 2, "golden_answers": "B", "metadata": {"kind": "x"}}]
    for name, row in zip("ab", rows, strict=True):
        write(folder / f"{name}.jsonl", [row])
    first, second = load_questions(str(folder))
    assert (first.id, second.id, second.gold_answers, second.metadata["kind"]) == ("q1", "2", ("B",), "x")
    (folder / "b.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(DataError, match=r"b.jsonl:2: not valid JSON"):
        load_questions(str(folder))
    write(folder / "b.jsonl", [{**OURS, "golden_answers": [float("nan")]}])
    with pytest.raises(DataError, match=r'b.jsonl:1: "golden_answers" holds nan'):
        load_questions(str(folder))


def test_the_id_0_is_one_and_collides_with_none(tmp_path):
    rows = [{**OURS, "id": 0}, {**OURS, "id": None}, {**OURS, "id": "1"}, {**OURS, "id": 2.0}]
    assert ids(write(tmp_path / "set" / "dev.jsonl", rows)) == ["0", "set/dev/1", "1", "2"]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables_have_their_lists_and_objects_as_json(tmp_path, kind):
    golds, metadata = '["Lyon", "Lugdunum"]', '{"kind": "x"}'
    fields = [
        ["id", "question", "golden_answers", "metadata", "cluster"],
        ["0", "Which?", golds, metadata, ""],
    ]
    with (tmp_path / f"a.{kind}").open("w", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows(fields)
        else:
            file.writelines("\t".join(row) + "\n" for row in fields)
    [question] = load_questions(str(tmp_path / f"a.{kind}"))
    assert (question.id, question.gold_answers) == ("0", ("Lyon", "Lugdunum"))
    assert question.metadata == {"data_source": tmp_path.name, "kind": "x"}


def test_a_question_that_quotes_the_words_before_it_stays_whole(tmp_path):
    text = "What does the sign 'Question: why?' mean?"
    [question] = load_questions(write(tmp_path / "a.jsonl", [search_r1_row(0, text)]))
    assert question.text == text


def test_golds_out_of_a_parquet_file_of_floats_are_whole_numbers(tmp_path):
    table = pyarrow.table({"id": [0.0, 1.0], "question": ["When?", "How many?"], "answer": [1912.0, 2.5]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = load_questions(str(tmp_path / "a.parquet"))
    assert [(question.id, question.gold_answers) for question in found] == [("0", ("1912",)), ("1", ("2.5",))]


def test_a_table_with_capital_column_names_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("Question,Answer\nWho?,Ada\n")
    [found] = load_questions(str(tmp_path / "a.csv"))
    assert (found.text, found.gold_answers) == ("Who?", ("Ada",))
