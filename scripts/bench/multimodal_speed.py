"""The cost of pages: drawn a second, decoded against encoded, bytes a page of each kind of index.

Seconds are of one thread of the processor, whatever else the machine does meanwhile.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from data.jsonl import read_jsonl
from data.pages.images import read_image
from data.pages.rendering import Style, render
from data.records import Item, Passage
from scripts.bench.retriever_world import Work

PAGES, CARDS = 48, 256
PAGE_SIDE = 384


def speed(work: Work, small: Path) -> dict[str, str]:
    """All of it, in words; small: the folder of an encoder of cards."""
    from retriever_server.encoders.loading import load_encoder

    folder = work.folder / "speed"
    shutil.rmtree(folder, ignore_errors=True)  # a page that is there would not be drawn
    rows = islice(read_jsonl(work.data / "squad" / "corpus.jsonl"), PAGES)
    passages = [Passage(row["id"], row["contents"].split("\n", 1)[-1], row["title"]) for row in rows]
    seconds, drawn = _timed(lambda: render(passages, folder, Style()))
    pages = [str(folder / row["image"]) for row in read_jsonl(drawn.corpus)]
    cards = [passage.image for passage in islice(work.corpus("cards"), CARDS)]
    tiny = load_encoder(str(small), inputs="image")
    return {
        "drawing": f"{PAGES / seconds:.0f} pages a second, 800 x 1000 pixels, one core",
        "cards by the small DSE": _ratio(tiny, cards),
        f"pages by a ViT of 22 M at {PAGE_SIDE} x {PAGE_SIDE}": _ratio(_large(work), pages[:16]),
        "bytes a page": ", ".join(_sizes(work.folder / "indexes")),
    }


def _timed(do: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = do()
    return time.process_time() - start, found


def _ratio(encoder: Any, images: list[str]) -> str:
    """Time pages read from disk and decoded, and encoded."""
    items = [Item(image) for image in images]
    encoder.encode(items[:8], "passage")
    decoding, _ = _timed(lambda: [read_image(image) for image in images])
    both, _ = _timed(lambda: encoder.encode(items, "passage"))
    encoding = max(both - decoding, 1e-9)
    return (
        f"decoding {1000 * decoding / len(images):.1f} ms, encoding {1000 * encoding / len(images):.1f} ms "
        f"a page, {encoding / decoding:.1f} to 1"
    )


def _large(work: Work) -> Any:
    """A random encoder as large as ViT-S/16; its speed is that of a trained one."""
    from retriever_server.encoders.read_spec import read_spec
    from retriever_server.encoders.sentence import SentenceEncoder
    from retriever_server.training.builders.vision import two_tower_pages

    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12}
    text = {"model_type": "bert", "num_hidden_layers": 1}
    image = {"model_type": "vit", **sizes, "image_size": PAGE_SIDE, "patch_size": 16}
    model = two_tower_pages(
        {"config": text, "corpus": str(work.corpus("titles").path), "vocabulary": 600}, {"config": image}
    )
    return SentenceEncoder(model, read_spec("ViT-S", model, inputs="image"))


def _sizes(indexes: Path) -> list[str]:
    """Return the bytes of the cards' indexes without the corpus: vectors, and what finds candidates."""
    found = []
    for folder in sorted(indexes.glob("*-cards")):
        sizes = {path.name: path.stat().st_size / 500 for path in folder.glob("*.npy")}
        vectors = sum(size for name, size in sizes.items() if "vectors" in name)
        name = folder.name.removesuffix("-cards")
        found.append(f"{name} {vectors:,.0f} and {sum(sizes.values()) - vectors:,.0f}")
    return found
