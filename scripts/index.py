"""`sleuth index`: a corpus or a folder of pages in, an index on disk out; or one that is there, verified."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError

_KIND_OF = {"dense": "flat", "sparse": "inverted", "multi": "maxsim"}
_ONLY_BM25 = {
    "k1": 0.9, "b": 0.4, "analyzer": "plain", "language": "none", "title_boost": 1, "scoring": "bm25",
}  # fmt: skip
_ONLY_ENCODED = {
    "query_prompt": None, "passage_prompt": None, "passage_template": "{title}\n{text}", "max_tokens": None,
    "dtype": "float16", "factory": None, "terms_per_passage": None, "shard": "1/1", "ray": None,
    "device": "auto", "inputs": None, "token_pooling": "", "dimension": None,
}  # fmt: skip
_OF_THE_ENCODER = (
    "query_prompt", "passage_prompt", "passage_template", "max_tokens", "dimension", "inputs",
    "token_pooling",
)  # fmt: skip


def main(
    corpus: str | None = None,
    out: str | None = None,
    encoder: str | None = None,
    kind: str | None = None,
    k1: float = 0.9,
    b: float = 0.4,
    analyzer: str = "plain",
    title_boost: int = 1,
    language: str = "none",
    scoring: str = "bm25",
    dtype: str = "float16",
    factory: str | None = None,
    terms_per_passage: int | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    passage_template: str = "{title}\n{text}",
    max_tokens: int | None = None,
    dimension: int | None = None,
    inputs: str | None = None,
    token_pooling: str = "",
    on_error: Literal["stop", "skip"] = "stop",
    shard: str = "1/1",
    ray: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    verify: str | None = None,
) -> None:
    """Build an index of a corpus. The same corpus and settings at `out` are reused as they are.

    With --encoder the passages become vectors, shard by shard: a run that was killed goes on when it
    is started again.

    Args:
        corpus: JSON lines file of passages, {"id", "contents"} or {"id", "title", "text"} or with "image";
            or a PDF, or a folder of PDFs, HTML files and images, whose pages are rendered into OUT-pages.
        out: Folder for the index.
        encoder: A sentence-transformers model, dense, sparse or multi-vector: its name or folder.
        kind: bm25; with an encoder flat or ann (dense), inverted (sparse), maxsim (multi-vector).
        k1: bm25: how much a repeated word counts.
        b: bm25: how much long passages are held back, 0 to 1.
        analyzer: bm25: plain (lower-cased words), stopwords, english, anserini or multilingual.
        title_boost: bm25: how many times the title counts.
        language: bm25: of the stemmer, for the analyzer multilingual.
        scoring: bm25: bm25, or tfidf (a cosine; without k1 and b).
        dtype: Of stored vectors: float32, float16 or int8 (inverted: weights of 8 bits, or float32).
        factory: ann: a string for faiss.index_factory, such as IVF4096,SQ8; by size if not given.
        terms_per_passage: inverted: keep so many of the largest weights of a passage; all if not given.
        query_prompt: Put before every query, such as "query: "; the model's own if not given.
        passage_prompt: The same for passages.
        passage_template: The text of a passage, from {title}, {text} and {contents}.
        max_tokens: Longer texts are cut; the model's own limit if not given.
        dimension: Keep the first so many numbers of a dense vector, of a Matryoshka model; all if not given.
        inputs: What of a passage is encoded: text, image, text+image, or of another modality that is
            registered; by default what the model was trained with here, else the image
            where it reads images.
        token_pooling: maxsim: pool the vectors of a passage to about one in so many: rows:4 (patches side by
            side), kmeans:4 or hierarchical:4; not at all if not given.
        on_error: What to do with a page that cannot be read: stop, or skip it and say so.
        shard: i/n: only encode every n-th shard from the i-th on, beside other machines with the same
            --out; a run without it then builds the index.
        ray: Encode the shards on a Ray cluster whose machines share the folders: HOST:PORT of its head,
            auto, or local for one on this machine.
        device: cpu, cuda or auto.
        overwrite: Replace a different index at `out`.
        verify: The folder of an index: read every byte of it and of its corpus, and build nothing.
    """
    given = dict(locals())
    if verify is not None:
        from retriever_server.indexes.base import verify_index

        whole = verify_index(verify)
        print(f"whole: {whole.corpus_count:,} passages in {verify} (generation {whole.generation})")
    elif not corpus or not out:
        raise ConfigError("--corpus and --out must be given, or --verify with the folder of an index")
    elif encoder is None:
        _build_bm25(given)
    else:
        _build_encoded(given)


def _build_bm25(given: dict[str, Any]) -> None:
    if given["kind"] not in (None, "bm25"):
        raise ConfigError(f"--kind {given['kind']}: needs an --encoder (a sentence-transformers model)")
    _refuse(given, _ONLY_ENCODED, "--encoder")
    from data.corpus import Corpus
    from retriever_server.indexes.bm25 import BM25Index
    from scripts.console import track

    passages = Corpus(_corpus(given))
    bar = track("reading passages")
    settings = {name: given[name] for name in _ONLY_BM25}
    index = BM25Index.build(
        passages, given["out"], overwrite=given["overwrite"],
        progress=bar, **settings,
    )  # fmt: skip
    _say(index, given["out"], bar.used)


def _build_encoded(given: dict[str, Any]) -> None:
    _refuse(given, _ONLY_BM25, "--kind bm25")
    part = _parse_shard(given["shard"])
    if given["ray"] and part != (1, 1):
        raise ConfigError(f"--shard {given['shard']}: has no meaning with --ray, which gives out all shards")
    if given["kind"] == "bm25":
        raise ConfigError("--kind bm25: takes no --encoder")
    settings = {key: given[key] for key in ("factory", "terms_per_passage") if given[key] is not None}
    if settings.get("factory") and given["kind"] != "ann":
        raise ConfigError(f"--factory {given['factory']}: has a meaning only with --kind ann")
    from data.corpus import Corpus
    from data.device import check_device
    from data.hub import find_model
    from retriever_server.encoders.sentence import load_encoder
    from retriever_server.indexes.base import building, index_kind
    from scripts.console import track
    from scripts.on_ray.encode import encode_on_ray

    of = index_kind(given["kind"]) if given["kind"] else None
    options = {name: given[name] for name in _OF_THE_ENCODER}
    device = "auto" if given["ray"] else given["device"]  # the GPUs may be those of other machines
    check_device(device)
    find_model(given["encoder"], "encoder")
    passages = Corpus(_corpus(given))
    encoder = load_encoder(given["encoder"], device=device, **options)
    of = of or index_kind(_KIND_OF[encoder.spec.kind])
    if "terms_per_passage" in settings and of.kind != "inverted":
        raise ConfigError(f"--terms_per_passage: has a meaning only with --kind inverted, not {of.kind}")
    bar = track("encoding passages")
    settings["on_error"] = given["on_error"]
    if part != (1, 1):
        out = Path(given["out"])
        shards, _ = of.plan(passages, out, encoder, given["dtype"], **settings)
        with building(out, part="{}-of-{}".format(*part)):
            shards.encode(bar, part)
        left = len(shards.missing())
        then = f"{left} of other parts are missing" if left else "run it without --shard to build the index"
        print(f"part {given['shard']} is encoded ({len(shards)} shards); {then}")
        return
    if given["ray"]:
        settings["encode"] = partial(encode_on_ray, address=given["ray"], device=given["device"])
    index = of.build(passages, given["out"], encoder, given["dtype"], given["overwrite"], bar, **settings)
    _say(index, given["out"], bar.used)
    if bar.used and not given["ray"]:
        _say_work(encoder)


def _corpus(given: dict[str, Any]) -> Path:
    """The file of the corpus: the one given, or that of the pages that a PDF or a folder is rendered into."""
    path = Path(given["corpus"])
    if not path.is_dir() and path.suffix.lower() != ".pdf":
        return path
    from scripts.render import main as render

    out = Path(given["out"]).absolute()
    pages = out.with_name(f"{out.name}-pages")
    render(str(path), str(pages), on_error=given["on_error"])
    return pages / "corpus.jsonl"


def _say_work(encoder: Any) -> None:
    if encoder.images:
        waited = encoder.waited_seconds / (encoder.model_seconds + encoder.waited_seconds)
        print(f"{encoder.images:,} images; the model waited for them {waited:.0%} of the time")
    waste = encoder.padded_tokens / max(1, encoder.real_tokens)
    tokens = f"{encoder.real_tokens:,} tokens, padded/real {waste:.3f}; " if encoder.real_tokens else ""
    print(f"{tokens}spec {encoder.spec.hash}")


def _say(index: Any, out: str, built: bool) -> None:
    done = "indexed" if built else "already there:"
    count, skipped = len(index.corpus), len(getattr(index, "skipped", ()))
    passages = f"{count - skipped:,} of {count:,}" if skipped else f"{count:,}"
    print(f"{done} {passages} passages in {out} (generation {index.generation})")


def _refuse(given: dict[str, Any], defaults: dict[str, Any], needs: str) -> None:
    """Options that would change nothing."""
    for name, default in defaults.items():
        if given[name] != default:
            raise ConfigError(f"--{name} {given[name]}: has a meaning only with {needs}")


def _parse_shard(shard: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard {shard}: must be i/n with 1 <= i <= n")
    return int(found[1]), int(found[2])
