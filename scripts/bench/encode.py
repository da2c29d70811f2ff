"""Encoding, and `sleuth index --encoder`, against `SentenceTransformer.encode`: speed on mixed lengths.

    python -m scripts.bench.encode --model MODEL_FOLDER --corpus corpus.jsonl --count 400

Half of the texts are whole passages, half are cut to sentence length. All take turns, `rounds` times;
seconds are of the CPU on a CPU (so that a busy machine matters less), else of the clock. The index is built
whole each time, its files written.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np


def main(model: str, corpus: str, count: int = 400, rounds: int = 3, device: str = "auto") -> None:
    """Print seconds of both, their ratio, padded tokens a real one, and the least cosine between them."""
    from sentence_transformers import SentenceTransformer

    from data.corpus import Corpus
    from data.jsonl import write_jsonl
    from data.machine.device import resolve_device
    from retriever_server.encoders.loading import load_encoder
    from retriever_server.encoders.spec import similarities
    from retriever_server.indexes.manifest import index_kind

    device = resolve_device(device)
    texts = mixed_lengths([passage.text for passage in islice(Corpus(corpus), count)])
    ours, theirs = load_encoder(model, device=device), SentenceTransformer(model, device=device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "index": []}
    found = {}
    tokens = {"padded": 0, "real": 0}

    def note(module: object, inputs: tuple) -> None:
        mask = inputs[0]["attention_mask"]
        tokens["padded"] += mask.numel()
        tokens["real"] += int(mask.sum())

    theirs[0].register_forward_pre_hook(note)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "corpus.jsonl", Path(folder) / "index"
        write_jsonl(path, ({"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)))
        build = index_kind("flat").build
        calls: dict[str, Callable] = {
            "ours": lambda: ours.encode(texts, "passage"),
            "theirs": lambda: theirs.encode_document(texts),
            "index": lambda: build(Corpus(path), out, ours, overwrite=True).close(),
        }
        for _ in range(rounds):
            for name, call in calls.items():
                start = clock()
                found[name] = call()
                seconds[name].append(clock() - start)
    mine, other, index = (min(seconds[name]) for name in ("ours", "theirs", "index"))
    print(f"{count} texts on {device}: ours {mine:.2f} s, sentence-transformers {other:.2f} s")
    waste = ours.padded_tokens / ours.real_tokens, tokens["padded"] / tokens["real"]
    print(f"{other / mine:.2f} times as fast, padded/real tokens {waste[0]:.3f} against {waste[1]:.3f}")
    print(f"sleuth index, all of it: {index:.2f} s, {other / index:.2f} times as fast")
    print(f"least cosine {float(np.min(similarities(found['ours'], found['theirs']))):.7f}")


def mixed_lengths(texts: list[str], seed: int = 0) -> list[str]:
    """Every other text cut to 20 to 300 characters."""
    rng = random.Random(seed)
    return [text[: rng.randint(20, 300)] if i % 2 else text for i, text in enumerate(texts)]


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
