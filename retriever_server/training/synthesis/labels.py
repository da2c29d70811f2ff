"""Positive and negatives of a draft, out of its candidates and what believed judges say of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from data.corpus import Corpus
from retriever_server.training.synthesis.config import LabelRules
from retriever_server.training.synthesis.drafts import Draft, draw_seed
from retriever_server.training.synthesis.judges import fuse


def label(draft: Draft, rules: LabelRules, judges: Sequence[str], corpus: Corpus, seed: int) -> Draft:
    """The draft with positive, negatives and labels. `judges`: those believed for this kind of query.

    A judge that gave no number for one of the candidates does not count for this draft.
    """
    hits = [id_ for id_, _ in draft.hits]
    everyone = {*hits, *([draft.seed] if draft.seed else [])}
    judges = [name for name in judges if everyone <= set(draft.scores.get(name, ()))]
    known = [draft.scores[name] for name in judges]
    fused = fuse([{id_: scores[id_] for id_ in everyone} for scores in known])
    ranked = sorted(
        fused, key=lambda id_: (-fused[id_], id_ != draft.seed, hits.index(id_) if id_ in hits else -1)
    )
    positive = ranked[0] if ranked and rules.positive == "best" else draft.seed
    same = _text(corpus, positive)
    others = [i for i in (ranked or hits) if i != positive and i != draft.seed and _text(corpus, i) != same]
    negatives = _negatives(others, hits, rules, random.Random(draw_seed(seed, "negatives", draft.id)))
    labels = known[0] if len(known) == 1 else fused
    kept = {id_: round(labels[id_], 6) for id_ in (positive, *negatives) if id_ in labels}
    by = tuple(judges) if kept else ()
    return replace(draft, positive=positive, negatives=tuple(negatives), labels=kept, labelled_by=by)


def _negatives(others: list[str], hits: list[str], rules: LabelRules, rng: random.Random) -> list[str]:
    if rules.negative == "far":
        return others[::-1][: rules.negatives]
    if rules.negative == "sampled":
        return rng.sample(others, min(rules.negatives, len(others)))
    if rules.negative == "ranks":
        return [i for i in hits[rules.first_rank - 1 :] if i in set(others)][: rules.negatives]
    return []


def _text(corpus: Corpus, id_: str) -> str:
    passage = corpus.get(id_) if id_ else None
    return " ".join(passage.text.lower().split()) if passage is not None else ""
