"""`sleuth atlas`: write the embedded world's corpus and questions."""

from __future__ import annotations

from data.atlas.build import build_atlas


def main(out: str = "runs/atlas") -> None:
    """Write the embedded world: a corpus and train, dev and test questions.

    Args:
        out: folder to write corpus.jsonl, train.jsonl, dev.jsonl and test.jsonl into.
    """
    made = build_atlas(out)
    print(f"{out}: {made['passages']:,} passages of {made['words_per_passage']:.1f} words")
    for split, kinds in made["questions"].items():
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        print(f"{split:>6}: {sum(kinds.values()):,} questions ({counts})")
    floors = ", ".join(f"{kind} {share:.3f}" for kind, share in made["majority_baseline"].items())
    print(f"EM of the commonest training answer to each relation: {floors}")
