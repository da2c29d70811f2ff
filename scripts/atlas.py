"""`sleuth atlas`: write the embedded world's corpus and questions."""

from __future__ import annotations

from data.atlas.build import build_atlas, build_invented
from data.errors import ConfigError
from data.questions import load_questions
from data.text import counted


def main(out: str | None = None, hard: bool = False, invented: int | None = None) -> None:
    """Write the embedded world: a corpus and train, dev and test questions.

    Args:
        out: Folder to write corpus.jsonl, train.jsonl, dev.jsonl and test.jsonl into. Default: runs/atlas, or
            runs/atlas_hard or runs/atlas_invented.
        hard: A passage a fact, told in words that no question uses, so that a retriever has something to
            learn, and demonstrations.jsonl to warm a policy up with. Tells how many of the passages needed
            BM25 finds.
        invented: Seed of an invented world in place of the real one, to test on: 400 questions of each kind,
            none to train on.
    """
    if hard and invented is not None:
        raise ConfigError("hard, invented: give one of them, not both")
    out = out or "runs/atlas" + "_hard" * hard + "_invented" * (invented is not None)
    made = build_atlas(out, hard=hard) if invented is None else build_invented(out, invented)
    print(f"{out}: {counted(made['passages'], 'passage')} of {made['words_per_passage']:.1f} words")
    for split, kinds in made["questions"].items():
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        print(f"{split:>6}: {counted(sum(kinds.values()), 'question')} ({counts})")
    if invented is not None:
        return
    floors = ", ".join(f"{kind} {share:.3f}" for kind, share in made["majority_baseline"].items())
    print(f"EM of the commonest training answer to each relation: {floors}")
    if hard:
        _print_headroom(out)


def _print_headroom(out: str) -> None:
    """Print how many of the test questions' passages BM25 finds, asked for one at a time in plain words."""
    from tempfile import TemporaryDirectory

    from data.atlas.hard import steps
    from data.atlas.world import load_world
    from data.corpus import Corpus
    from retriever_server.indexes.bm25 import BM25Index

    world = load_world()
    needed = [step for q in load_questions(f"{out}/test.jsonl") for step in steps(world, q).items()]
    with TemporaryDirectory() as folder:
        index = BM25Index.build(Corpus(f"{out}/corpus.jsonl"), f"{folder}/index")
        found = index.search([asked for _, asked in needed], 2)
    ranks = [[hit.passage.id for hit in hits] for hits in found]
    at = [
        sum(id_ in ids[:k] for (id_, _), ids in zip(needed, ranks, strict=True)) / len(needed) for k in (1, 2)
    ]
    print(f"passages needed that BM25 finds, asked for one by one: {at[0]:.3f} at 1, {at[1]:.3f} at 2")
