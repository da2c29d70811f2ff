"""The embedded world as files: a corpus and three question sets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.atlas.hard import hard_demonstrations, hard_passages, hard_questions
from data.atlas.invented import invent_world
from data.atlas.passages import render_passages
from data.atlas.questions import KINDS, UNSEEN_SHARE, majority_baseline, make_questions
from data.atlas.world import SPLITS, load_world
from data.jsonl import write_jsonl
from data.records import Passage, Question

INVENTED = {"countries": (200, 200), "places": (3, 6), "elements": (60, 60)}
"""Size of an invented world to test on."""
INVENTED_QUESTIONS = 400
"""Its questions of each kind."""
HARD_DEMONSTRATIONS = 2400
PAIRS = 3200


def build_atlas(directory: str | Path, seed: int = 0, hard: bool = False) -> dict[str, Any]:
    """Write corpus.jsonl, train.jsonl, dev.jsonl and test.jsonl; return what is in them.

    hard: the world of `data.atlas.hard`, where the words of a question do not find its passages, and
    demonstrations.jsonl for a policy that is to read them. The other has pairs.jsonl, to train retrievers.
    -> {"passages", "words_per_passage", "questions": {split: {kind: count}}, "majority_baseline"}.
    Each file appears whole or not at all. Raises StorageError if one cannot be written.
    """
    world = load_world()
    passages = hard_passages(world, seed) if hard else render_passages(world, seed)
    questions = {
        split: hard_questions(world, split, seed)
        if hard
        else make_questions(world, split, unseen_share=UNSEEN_SHARE if split == "test" else 0.0, seed=seed)
        for split in SPLITS
    }
    if hard:
        write_jsonl(Path(directory) / "demonstrations.jsonl", hard_demonstrations(HARD_DEMONSTRATIONS, seed))
    else:
        write_jsonl(Path(directory) / "pairs.jsonl", training_pairs(questions["train"]))
    baseline = majority_baseline(questions["train"], questions["test"])
    return {**_write(Path(directory), passages, questions), "majority_baseline": baseline}


def build_invented(directory: str | Path, seed: int) -> dict[str, Any]:
    """Write corpus.jsonl and test.jsonl of an invented world, whose entities no training has seen.

    The same seed gives the same files. -> as `build_atlas`, without the baseline.
    """
    world = invent_world(random.Random(f"test:{seed}"), **INVENTED)
    asked = make_questions(world, None, dict.fromkeys(KINDS, INVENTED_QUESTIONS), UNSEEN_SHARE, seed)
    return _write(Path(directory), render_passages(world, seed), {"test": asked})


def _write(
    folder: Path, passages: Sequence[Passage], questions: Mapping[str, Sequence[Question]]
) -> dict[str, Any]:
    write_jsonl(folder / "corpus.jsonl", (passage_row(passage) for passage in passages))
    for split, asked in questions.items():
        write_jsonl(folder / f"{split}.jsonl", (question.as_record() for question in asked))
    words = sum(len(passage.text.split()) for passage in passages)
    return {
        "passages": len(passages),
        "words_per_passage": words / len(passages),
        "questions": {
            split: dict(Counter(q.metadata["kind"] for q in asked)) for split, asked in questions.items()
        },
    }


def training_pairs(questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """Yield examples to train a retriever on: one step of a question, and the passage that it needs.

    Every second query is the question alone with its first passage, the others name what to look up, too.
    """
    rng = random.Random(0)
    several = [q for q in questions if q.metadata["kind"] != "comparison"]
    for number, question in enumerate(rng.sample(several, PAIRS)):
        path = list(zip(question.metadata["hops"], question.metadata["entities"], strict=True))
        name, passage = rng.choice(path) if number % 2 else ("", path[0][1])
        query = f"{question.text} [SEP] {name}" if name else question.text
        yield {"query_id": question.id, "query": query, "positives": [passage],
               "provenance": {"style": "question"}}  # fmt: skip


def passage_row(passage: Passage) -> dict[str, str]:
    """A passage as a line of a corpus: id, title, text, and Search-R1's contents."""
    title, text = passage.title, passage.text
    return {"id": passage.id, "title": title, "text": text, "contents": passage.contents}
