"""Measure what encoders of pictures learn from scratch, without OCR: a table with paired 95 % intervals.

    python -m scripts.bench.multimodal --data DATA [--work runs/multimodal] [--only '[dse, colpali]']

As `scripts.bench.retrievers`: rows are kept as WORK/results/ROW.json and go on where they were stopped. All
models are made from configurations, with a tokenizer trained on the training titles; minutes each on a CPU.

(cards)   a small DSE and a small ColPali find 500 held-out title cards by their titles
(emoji)   captions find pictures, and pictures find captions
(figures) GME: the title is only in the text, the figure only in the picture
(speed)   pages drawn and encoded a second, bytes a page of each kind of index
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retriever_server.retriever import Retriever
from scripts.bench.multimodal_speed import speed
from scripts.bench.multimodal_world import PageWork
from scripts.bench.retriever_rows import Make, contrast, part
from scripts.bench.retriever_world import Row, Training, Work
from scripts.bench.row_table import command

SHOWN = ("R@10", "nDCG@10", "RR@10")
COMPARED = ("R@10", "nDCG@10")
ROWS: dict[str, Row] = {}
SIZES = {
    "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PICTURES = {"inputs": "image", "precision": "bfloat16"}
INK = {"image_mean": [1.0] * 3, "image_std": [0.5] * 3}
"""White paper is 0, so that what differs between cards is what the first layer sees."""
BOTH_WAYS = part("MultipleNegativesRankingLoss", {"directions": ["query_to_doc", "doc_to_query"]})


def pages(work: Work) -> PageWork:
    """The work folder, as what it is."""
    assert isinstance(work, PageWork)
    return work


def two_towers(
    work: Work, image_size: tuple[int, int], patch: int, pixels: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """A ViT of two layers and a text tower of one that meet in 64 dimensions."""
    text = {"model_type": "bert", "num_hidden_layers": 1, **SIZES}
    image = {"model_type": "vit", "num_hidden_layers": 2, "image_size": list(image_size), "patch_size": patch}
    return part("two_tower_pages", {
        "base": {"config": text, "corpus": str(work.corpus("titles").path), "vocabulary": 600},
        "image_base": {"config": {**image, **SIZES, **(pixels or {})}},
        "dimension": 64, "max_tokens": 32, **options,
    })  # fmt: skip


def dse(work: Work) -> Training:
    """One vector a card."""
    pages(work).examples("cards")
    model = two_towers(work, (64, 128), 16, INK)
    return Training(model, BOTH_WAYS, "cards", 1200, 128, corpus="cards-train", options=PICTURES)


def colpali(patch: int) -> Callable[[Work], Training]:
    """A vector a patch and token, by MaxSim: 32 patches of 16 pixels, or 128 of 8."""

    def of(work: Work) -> Training:
        pages(work).examples("cards")
        model = two_towers(work, (64, 128), patch, INK, vectors="many")
        loss = contrast(0.5, "maxsim")
        return Training(model, loss, "cards", 1000, 64, corpus="cards-train", options=PICTURES)

    return of


def emoji(work: Work) -> Training:
    """Captions and pictures, either of them the query."""
    pages(work).examples("emoji")
    model = two_towers(work, (64, 64), 16)
    return Training(model, BOTH_WAYS, "emoji", 300, 128, corpus="emoji-train", options={"inputs": "image"})


def vision_language(work: Work, side: int, patch: int) -> dict[str, Any]:
    """A random Idefics3 of two layers: a ViT and a Llama; a picture is (side / patch)^2 of its tokens."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 2}
    config = {
        "model_type": "idefics3", "scale_factor": 1, "text_config": {**sizes, "num_key_value_heads": 4},
        "vision_config": {**sizes, "image_size": side, "patch_size": patch},
    }  # fmt: skip
    return {"config": config, "corpus": str(work.corpus("titles").path), "vocabulary": 600}


def gme(work: Work) -> Training:
    """Texts, pictures and both together in one space; a negative each that differs in what counts."""
    pages(work).examples("figures")
    model = part("gme", {"base": vision_language(work, 64, 16), "instruction": "", "max_tokens": 64})
    return Training(
        model, part("MultipleNegativesRankingLoss"), "figures", 300, 32, corpus="figures-train",
        options={**PICTURES, "inputs": "text+image"}, data={"negatives": 1},
    )  # fmt: skip


def screenshots(work: Work) -> Training:
    """DSE as it is in the paper: the EOS token of a causal vision-language model."""
    pages(work).examples("cards")
    model = part("dse", {"base": vision_language(work, 128, 16), "passage_prompt": "", "max_tokens": 128})
    return Training(model, BOTH_WAYS, "cards", 600, 64, corpus="cards-train", options=PICTURES)


def alone(form: str) -> Make:
    """Return what GME finds where passages have only this."""

    def make(work: Work, on: str) -> Retriever:
        of = f"{on}-{form}" if form != "text+image" else on
        return work.encoded(work.trained("gme", gme(work)), of, f"gme-{form}", inputs=form)

    return make


def learned(name: str, training: Any, **options: Any) -> Make:
    """A trained encoder over a collection."""
    return lambda work, on: over(work, on, work.trained(name, training(work)), name, **options)


def untrained(name: str, training: Any) -> Make:
    """Return the retriever of the model that the training starts from."""
    return lambda work, on: over(work, on, work.untrained(name, training(work)), f"untrained-{name}")


def over(work: Work, on: str, model: Path, tag: str, **options: Any) -> Retriever:
    """The index of a collection: of captions as texts, of all others as pictures."""
    tag = "-".join([tag, *(value.replace(":", "-") for value in options.values())])
    return work.encoded(model, on, tag, inputs="text" if on == "emoji-captions" else "image", **options)


def row(name: str, table: str, make: Make, on: tuple[str, ...], *against: str, **more: Any) -> None:
    """Add a row to the table."""
    ROWS[name] = Row(table, make, on, against, **more)


row("bm25-titles", "cards", lambda work, on: work.bm25("titles-held-out"), ("cards",))
row("untrained-dse", "cards", untrained("dse", dse), ("cards",))
row("dse", "cards", learned("dse", dse), ("cards",), "untrained-dse")
for _name, _colpali in {"colpali": colpali(16), "colpali-fine": colpali(8)}.items():
    row(f"untrained-{_name}", "cards", untrained(_name, _colpali), ("cards",))
    row(_name, "cards", learned(_name, _colpali), ("cards",), f"untrained-{_name}", "dse")
    for _method in ("rows", "kmeans", "hierarchical"):
        _pooled = learned(_name, _colpali, token_pooling=f"{_method}:4")
        row(f"{_name}-{_method}-4", "cards", _pooled, ("cards",), _name)
row("dse-eos", "cards", learned("dse-eos", screenshots), ("cards",), "untrained-dse", "dse")
row("bm25-ocr", "cards", lambda work, on: work.bm25("cards-ocr"), ("cards",), "bm25-titles", "dse", "colpali")
EMOJI = ("emoji", "emoji-captions")
row("untrained-emoji", "emoji", untrained("emoji", emoji), EMOJI)
row("emoji", "emoji", learned("emoji", emoji), EMOJI, "untrained-emoji")
row("gme-text", "figures", alone("text"), ("figures",))
row("gme-image", "figures", alone("image"), ("figures",))
row("gme", "figures", alone("text+image"), ("figures",), "gme-text", "gme-image")
row(
    "speed",
    "speed",
    lambda work, on: work.bm25(on),
    (),
    note=lambda work: speed(work, work.untrained("dse", dse(work))),
)


main = command(ROWS, PageWork, "runs/multimodal", 500, SHOWN, COMPARED)

if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
