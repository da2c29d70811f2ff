"""A corpus of small pages, one colour and place each, and models that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data.jsonl import write_jsonl
from data.records import Item

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "brown", "pink", "lime"]
PLACES = ["left", "right"]


def write_pages(folder: Path) -> Path:
    """20 pages, a block of a colour on the left or right; half also have a text. Queries name both."""
    (folder / "pages").mkdir(parents=True, exist_ok=True)
    passages, examples = [], []
    for i, (colour, place) in enumerate((c, p) for c in COLOURS for p in PLACES):
        page = Image.new("RGB", (64, 32), "white")
        x = 0 if place == "left" else 32
        ImageDraw.Draw(page).rectangle((x, 0, x + 31, 31), fill=colour)
        page.save(folder / f"pages/{i}.png")
        text = {"title": colour, "text": f"a {colour} block"} if i % 2 else {}
        passages.append({"id": str(i), "image": f"pages/{i}.png", **text})
        others = [str((i + 1) % 20), str((i + 2) % 20)]
        row = {"query_id": f"q{i}", "query": f"{colour} {place}", "positives": [str(i)], "negatives": others}
        examples.append(row)
    write_jsonl(folder / "corpus.jsonl", passages)
    write_jsonl(folder / "examples.jsonl", examples)
    write_jsonl(folder / "texts.jsonl", [{"id": e["query_id"], "text": e["query"]} for e in examples])
    write_jsonl(folder / "dev.jsonl", [{"id": e["query_id"], "question": e["query"]} for e in examples])
    lines = "".join(f"q{i}\t{i}\t1\n" for i in range(20))
    (folder / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    return folder


def page(folder: Path, number: int, text: str = "") -> Item:
    """The item of a page."""
    return Item(str(folder / f"pages/{number}.png"), text)


def vlm(folder: Path) -> dict[str, Any]:
    """A vision-language model of one layer of 32 that sees a page as four tokens."""
    vision = {"image_size": 16, "patch_size": 4}
    config = {"model_type": "idefics3", "hidden_size": 32, "num_hidden_layers": 1, "vision_config": vision}
    return {
        "config": config,
        "corpus": str(folder / "texts.jsonl"),
        "vocabulary": 300,
        "folder": str(folder / "vlm"),
    }


def towers(folder: Path) -> dict[str, Any]:
    """A text tower and a vision tower, of one layer of 32."""
    one = {"hidden_size": 32, "num_hidden_layers": 1}
    bert = {"model_type": "bert", **one, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vit = {"model_type": "vit", **one, "image_size": [8, 16], "patch_size": [8, 4]}
    text = {"config": bert, "corpus": str(folder / "texts.jsonl"), "vocabulary": 300}
    return {
        "base": {**text, "folder": str(folder / "bert")},
        "image_base": {"config": vit, "folder": str(folder / "vit")},
    }
