"""The collections of the bench of pictures are split and drawn as it says; rows go on where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
from data.jsonl import read_jsonl, write_jsonl
from data.records import Hit, Passage
from retriever_server.retriever import Retriever
from scripts.bench import multimodal_world
from scripts.bench.multimodal_world import PageWork
from scripts.bench.retriever_world import Row
from scripts.bench.row_table import markdown, run_rows


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PageWork:
    monkeypatch.setattr(multimodal_world, "HELD_OUT", 4)
    monkeypatch.setattr(multimodal_world, "HELD_OUT_FIGURE_TITLES", 2)
    monkeypatch.setattr(multimodal_world, "FIGURE_TITLES", 3)
    for name, start in (("squad", 0), ("hotpotqa", 5)):  # five titles stand in both
        titles = (f"Title_{i}" for i in range(start, start + 10))
        rows = ({"id": f"{name}-{title}", "contents": "a", "title": title} for title in titles)
        write_jsonl(tmp_path / "data" / name / "corpus.jsonl", rows)
    return PageWork(tmp_path / "work", tmp_path / "data")


def test_no_title_is_both_trained_and_held_out(work: PageWork) -> None:
    train, held_out = work.titles
    assert len(train) == 11 and len(held_out) == 4 and not {*train} & {*held_out}


def test_figures_keep_title_and_shape_apart(work: PageWork) -> None:
    forms = {form: work.corpus(name) for form, name in _FIGURES.items()}
    for form, corpus in forms.items():
        assert {(bool(each.text), bool(each.image)) for each in corpus} == {("text" in form, "image" in form)}
    assert len({tuple(each.id for each in corpus) for corpus in forms.values()}) == 1
    questions, qrels = work.questions("figures")
    texts = {each.id: each.text for each in forms["text"]}
    for question in questions:
        title, _, figure = question.text.partition(": ")
        assert qrels[question.id] == {question.id: 1} and title == texts[question.id]
        assert figure == question.id.split("-", 1)[1].replace("-", " ")


_FIGURES = {"text": "figures-text", "image": "figures-image", "text+image": "figures"}


def test_a_negative_of_a_figure_differs_in_what_is_asked(work: PageWork) -> None:
    work.examples("figures")
    passages = work.corpus("figures-train")
    for row in read_jsonl(work.folder / "examples" / "figures.jsonl"):
        right, wrong = (passages.get(row[key][0]) for key in ("positives", "negatives"))
        assert right and wrong and bool(right.text) == bool(wrong.text)
        same_title, same_figure = (
            part[0] == part[1]
            for part in zip(
                *(each.id.rsplit("-", 1)[0].split("-", 1) for each in (right, wrong)), strict=True
            )
        )
        assert same_title != same_figure if right.text else not same_figure


class First(Retriever):
    """Finds the same passage whatever it is asked."""

    def __init__(self, id_: str) -> None:
        self.id = id_

    def search(self, queries: Any, k: int, where: Any = None) -> list[list[Hit]]:
        return [[Hit(Passage(self.id, ""), 1.0, "g")] for _ in queries]


def test_rows_go_on_where_they_stopped_and_are_compared(work: PageWork) -> None:
    asked = [question.id for question in work.questions("figures")[0]]
    made: list[str] = []

    def row(name: str, id_: str, *against: str) -> Row:
        def make(of: Any, on: str) -> First:
            made.append(name)
            return First(id_)

        return Row("t", make, ("figures",), against)

    rows = {"a": row("a", asked[0]), "b": row("b", "none", "a")}
    assert run_rows(work, rows, ["b"]) == [] and run_rows(work, rows, ["b"]) == []
    assert made == ["a", "b"]
    shown = markdown(work.folder / "results", rows, ("R@10", "nDCG@10"), ("R@10", "nDCG@10"))
    assert f"| b | figures | 0.000 | 0.000 | a | {-1 / len(asked):+.3f}" in shown
