"""Document expansion: an injected generator writes more words for every passage, once, into a new corpus.

A generator takes passages and gives a text for each, such as the queries that it might answer (docT5query,
Nogueira and Lin 2019). It becomes `metadata.expansion`; a passage_template with {expansion} encodes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.formats.rows import passage_row
from data.jsonl import append_in_batches, read_json, write_json
from data.machine.device import choose_dtype
from data.models.hub import find_model
from data.records import Passage


@runtime_checkable
class Generator(Protocol):
    """Passages in, a text for each out."""

    def __call__(self, passages: Sequence[Passage]) -> Sequence[str]: ...


Progress = Callable[[range], Iterable[int]]


class Seq2SeqQueries:
    """Queries that a passage might answer, by a sequence-to-sequence model such as a docT5query.

    count: how many are sampled (of the `top` most probable words each time); the order of the texts and
    seed decide them.
    """

    def __init__(
        self,
        model: str,
        count: int = 10,
        top: int = 10,
        max_tokens: int = 64,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        found = find_model(model, "model")
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(found)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(found, dtype=choose_dtype("auto", device))
        self.model.to(device).eval()
        self.count, self.top, self.max_tokens, self.seed = count, top, max_tokens, seed

    def __call__(self, passages: Sequence[Passage]) -> list[str]:
        """The queries of each passage, joined by spaces."""
        import torch

        given = self.tokenizer(
            [f"{each.title} {each.text}".strip() for each in passages],
            return_tensors="pt", padding=True, truncation=True, max_length=512,
        ).to(self.model.device)  # fmt: skip
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(self.seed)
            ids: Any = self.model.generate(
                **given, do_sample=True, top_k=self.top, max_new_tokens=self.max_tokens,
                num_return_sequences=self.count,
            )  # fmt: skip
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(texts[i : i + self.count]) for i in range(0, len(texts), self.count)]


def expand(
    corpus: Corpus,
    generate: Generator,
    out: str | Path,
    passages_at_once: int = 32,
    progress: Progress = iter,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the corpus with the expansions to `out`; one that is there already stays as it is.

    settings: those of the generator, kept with the corpus' hash in `out`.settings.json. Killed, it goes on
    after the last whole batch. Raises ConfigError where `out` is of another corpus or of other settings,
    DataError where the generator gives not one text a passage.
    """
    out = Path(out)
    wanted = {**(settings or {}), "passages_at_once": passages_at_once, "corpus": corpus.content_hash}
    _check_settings(wanted, out)
    if out.exists():
        return out

    def rows(batch: range) -> Iterator[dict[str, Any]]:
        passages = [corpus[i] for i in batch]
        texts = list(generate(passages))
        if len(texts) != len(passages):
            raise DataError(f"the generator gave {len(texts)} texts for {len(passages)} passages")
        expanded = (
            replace(passage, metadata={**passage.metadata, "expansion": text})
            for passage, text in zip(passages, texts, strict=True)
        )
        return (passage_row(passage, out.parent) for passage in expanded)

    append_in_batches(out, len(corpus), passages_at_once, rows, progress)
    return out


def _check_settings(settings: dict[str, Any], out: Path) -> None:
    """ConfigError unless what was begun is of these settings, which are kept beside it."""
    kept = out.with_name(f"{out.name}.settings.json")
    if out.exists() or out.with_name(f"{out.name}.part").exists():
        found = read_json(kept) if kept.exists() else dict.fromkeys(settings)
        if odd := sorted(name for name in found if found[name] != settings.get(name)):
            was = f"{odd[0]} {found[odd[0]]}, not {settings.get(odd[0])}"
            raise ConfigError(f"{out}: was made with {was}; remove it, or give another --out")
    write_json(kept, settings)
