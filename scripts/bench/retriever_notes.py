"""Notes of `scripts.bench.retrievers` on a row besides its scores."""

from __future__ import annotations

from itertools import islice
from typing import Any

from retriever_server.training.recipe import RetrieverRecipe
from scripts.bench.retriever_world import Work


def sparsity(work: Work, recipe: RetrieverRecipe) -> dict[str, Any]:
    """Terms a passage and MRR@10 of each checkpoint of the SPLADE of `recipe`, while FLOPS warms up."""
    from safetensors.torch import load_file

    from retriever_server.encoders.read_spec import read_spec
    from retriever_server.encoders.sentence import SentenceEncoder
    from retriever_server.evaluation import judge, means, parse_metrics, rank_all
    from retriever_server.indexes.inverted import InvertedIndex
    from retriever_server.training.build_components import build_model

    found = {}
    asked, qrels = work.questions("squad")
    for folder in sorted((work.folder / "models" / "splade" / "checkpoints").glob("step-*")):
        model = build_model(recipe).model
        weights = load_file(folder / "weights.safetensors")
        known = {name.removeprefix("model."): value for name, value in weights.items()}
        model.load_state_dict(known, strict=False)
        encoder = SentenceEncoder(model, read_spec(folder.name, model, "{title}\n{text}"))
        passages = [encoder.spec.render(passage) for passage in islice(work.corpus("squad"), 0, None, 30)]
        terms = encoder.encode(passages, "passage").nnz / len(passages)
        index = InvertedIndex.build(
            work.corpus("squad"), work.folder / "indexes" / f"splade-{folder.name}", encoder, overwrite=True
        )
        measured = judge(rank_all(index, asked[:200], 10), qrels, parse_metrics("RR@10", 10))
        found[folder.name] = f"{terms:.0f} terms a passage, MRR@10 {means(measured)['RR@10']:.3f}"
    return found
