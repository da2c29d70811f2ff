"""Batches without duplicates: over all processes, every example once an epoch, as few as there can be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset

from data.corpus import Corpus
from data.errors import DataError
from data.examples import Examples
from data.jsonl import write_jsonl
from retriever_server.training.batch_samplers import NoDuplicates
from retriever_server.training.examples import as_dataset


def sampler(columns: dict[str, list[Any]], size: int, processes: int = 1, seed: int = 0) -> NoDuplicates:
    return NoDuplicates(Dataset.from_dict(columns), size, False, processes=processes, seed=seed)


def skewed(count: int, negatives: int = 0) -> dict[str, list[str]]:
    """Questions over a fifth as many passages, some far more often asked for; negatives from these, too."""
    rng = np.random.default_rng(0)
    chosen = rng.geometric(15 / count, count) % (count // 5)
    columns = {"anchor": [f"q{i}" for i in range(count)], "positive": [f"d{d}" for d in chosen]}
    for n in range(1, negatives + 1):
        drawn = [f"d{d}" for d in rng.integers(1, count // 5, count)]
        own = columns["positive"]
        columns[f"negative_{n}"] = [d if d != p else "d0" for d, p in zip(drawn, own, strict=True)]
    return columns


@pytest.mark.parametrize(("processes", "negatives"), [(1, 0), (1, 3), (4, 0), (4, 3)])
def test_no_positive_is_anybodys_negative_over_all_processes(processes: int, negatives: int) -> None:
    columns = skewed(1200, negatives)
    made = sampler(columns, 8, processes)
    for epoch in range(3):
        made.set_epoch(epoch)
        batches = list(made)
        assert len(batches) == len(made) and len(batches) % processes == 0
        for at in range(0, len(batches), processes):
            together = batches[at : at + processes]
            assert len({len(batch) for batch in together}) == 1 and 0 < len(together[0]) <= 8
            rows = [row for batch in together for row in batch]
            positives = [columns["positive"][row] for row in rows]
            assert len(set(positives)) == len(rows) == len({columns["anchor"][row] for row in rows})
            others = {columns[f"negative_{n}"][row] for row in rows for n in range(1, negatives + 1)}
            assert not others & set(positives)
        drawn = [row for batch in batches for row in batch]
        assert set(drawn) == set(range(1200)) and len(drawn) < 1200 * (1 if processes == 1 else 1.05) + 1


def test_batches_are_as_few_as_full_ones_would_be() -> None:
    rng = np.random.default_rng(0)
    passages = [f"d{d}" for d in rng.integers(0, 1300, 6528)]
    made = sampler({"anchor": [f"q{i}" for i in range(6528)], "positive": passages}, 32)
    assert len(made) == 6528 // 32 == len(list(made))


def test_an_epoch_of_many_questions_over_few_answers_is_all_of_them(caplog: Any) -> None:
    columns = {"anchor": [f"q{i}" for i in range(200)], "positive": [f"d{i % 5}" for i in range(200)]}
    with caplog.at_level(logging.WARNING):
        made = sampler(columns, 32)
    assert "an epoch of all 200 examples is 40 batches of 5.0, not of 32" in caplog.text
    assert "one text is in 40 examples" in caplog.text
    assert len(made) == 40 and sorted(row for batch in made for row in batch) == list(range(200))
    caplog.clear()
    sampler({"anchor": list("abcdefghij")}, 4)
    assert not caplog.records


def test_every_process_gets_every_batch_whole() -> None:
    columns = {"anchor": [f"q{i}" for i in range(50)], "positive": [f"d{i % 20}" for i in range(50)]}
    made: Any = sampler(columns, 8, 2)
    made.batch_size = None
    shards = [list(BatchSamplerShard(made, 2, rank)) for rank in range(2)]
    assert len(shards[0]) == len(shards[1]) == len(made) // 2
    assert {row for shard in shards for batch in shard for row in batch} == set(range(50))


def test_what_cannot_be_shared_out_is_refused() -> None:
    columns = {"anchor": [f"q{i}" for i in range(9)], "positive": ["d", "e", "d"] * 3}
    with pytest.raises(DataError, match=r"4 processes: a batch of . examples, without a text twice, cannot"):
        sampler(columns, 8, 4)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    made, again = sampler(skewed(300), 8), sampler(skewed(300), 8)
    epochs = []
    for epoch in range(3):
        made.set_epoch(epoch)
        epochs.append(list(made))
    again.set_epoch(2)
    assert list(again) == epochs[2] and epochs[0] != epochs[1] != epochs[2]
    assert list(sampler(skewed(300), 8, seed=1)) != epochs[0]


def test_the_same_text_under_two_ids_is_one_and_no_epoch_reads_or_renders_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    rows = [{"id": str(i), "text": "the same  Text" if i < 6 else f"text {i}"} for i in range(12)]
    write_jsonl(tmp_path / "c.jsonl", [*rows, {"id": "12", "text": "The same text"}])
    write_jsonl(tmp_path / "e.jsonl", [{"query": f"q{i}", "positives": [str(i)]} for i in range(13)])
    rendered: list[Any] = []
    examples = Examples(tmp_path / "e.jsonl", Corpus(tmp_path / "c.jsonl"))
    data = as_dataset(examples, lambda passage: rendered.append(passage) or passage.text)
    made = NoDuplicates(data, 4, False, seed=0)
    monkeypatch.setattr(Corpus, "__getitem__", lambda *_: pytest.fail("a passage is read"))
    monkeypatch.setattr(Examples, "__getitem__", lambda *_: pytest.fail("an example is read"))
    batches = list(made)
    assert len(batches) == 7 and not rendered
    same = {0, 1, 2, 3, 4, 5, 12}
    assert all(len(same & set(batch)) == 1 for batch in batches)
