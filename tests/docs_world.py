"""Stand-ins for a reader's own files, and for models of the hub, under the names that the docs print."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from data.atlas.build import build_atlas
from data.corpus import Corpus
from data.jsonl import write_jsonl
from retriever_server.indexes.bm25 import BM25Index
from tests.retriever_server.tiny_encoders import tiny_model

PASSAGES = [
    {"id": "1", "title": "Loire", "text": "The Loire is the longest river in France."},
    {"id": "2", "title": "Rhine", "text": "The Rhine flows from the Alps to the North Sea."},
    {"id": "3", "title": "Seine", "text": "The Seine is a river that flows through Paris."},
    {"id": "4", "title": "Emma", "text": "Emma is a novel by Jane Austen."},
]
QUESTIONS = [
    {"id": f"q{i}", "question": text, "golden_answers": [answer], "metadata": {"supporting_ids": [passage]}}
    for i, (text, answer, passage) in enumerate(
        [
            ("Which river flows through Paris?", "Seine", "3"),
            ("Which is the longest river in France?", "Loire", "1"),
            ("Who wrote Emma?", "Jane Austen", "4"),
        ],
        start=1,
    )
]
MODELS = {
    "sentence-transformers/all-MiniLM-L6-v2": "dense",
    "intfloat/e5-base-v2": "dense",
    "naver/splade-cocondenser-ensembledistil": "sparse",
    "lightonai/GTE-ModernColBERT-v1": "multi",
    "cross-encoder/ms-marco-MiniLM-L6-v2": "cross",
}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def stand_ins(folder: Path, root: Path, page: str) -> None:
    """Fill the folder in which the blocks of a page run: the repository's own folders by link, then data.

    What the page makes itself is left to it.
    """
    demo = "runs/demo/corpus.jsonl <<" not in page
    for name in ("scripts", "agent", "rl", "retriever_server", "data", "docs", "pyproject.toml", ".venv"):
        (folder / name).symlink_to(root / name)
    policies = ["POLICY", "Qwen/Qwen2.5-3B"]
    policies += ["runs/mine/checkpoints/step-000100"] * ("out: runs/mine" not in page)
    policies += ["runs/quickstart/policy"] * ("quickstart.sh" not in page)
    for name in policies:
        shutil.copytree(root / "agent" / "seed_policy", folder / name)
    for name, kind in MODELS.items():
        saved = Path(tiny_model(folder / "made" / name, kind, positions=512))
        shutil.copytree(saved, folder / name)
    (folder / "squad").mkdir()
    for at in (folder, folder / "squad"):
        write_jsonl(at / "corpus.jsonl", PASSAGES)
        for name in ("train", "dev", "questions", "queries"):
            write_jsonl(at / f"{name}.jsonl", QUESTIONS)
    build_atlas(folder / "runs" / "atlas")
    if demo:
        write_jsonl(folder / "runs" / "demo" / "corpus.jsonl", PASSAGES[:3])
    write_jsonl(folder / "runs" / "corpus.jsonl", PASSAGES)
    for at in (folder / "runs", *(folder / "runs" / "demo",) * demo, folder / "runs" / "atlas"):
        BM25Index.build(Corpus(at / "corpus.jsonl"), at / "index", title_boost=3 if at.name == "atlas" else 1)
    recipe = ["policy: POLICY", "questions: train.jsonl", "retriever: runs/index", "out: runs/my-recipe"]
    (folder / "my_recipe.yaml").write_text("\n".join(recipe))
    rows = [("q1", "3"), ("q2", "1"), ("q3", "4")]
    table = "".join(f"{query}\t{passage}\t1\n" for query, passage in rows)
    (folder / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{table}")
    pairs = [(q["question"], PASSAGES[int(p) - 1]["text"]) for q, (_, p) in zip(QUESTIONS, rows, strict=True)]
    (folder / "pairs.tsv").write_text("query\tpositive\n" + "".join(f"{a}\t{b}\n" for a, b in pairs))
    (folder / "pairs.csv").write_text("query,positive\n" + "".join(f'"{a}","{b}"\n' for a, b in pairs))
