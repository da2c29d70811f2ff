"""`sleuth index`: a corpus or a folder of pages in, an index on disk out; or one that is there, changed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError
from data.formats.tables import read_lines
from data.machine.device import check_device
from data.machine.processes import cores
from data.text import counted
from scripts.console import track

_BM25_SETTINGS = ("k1", "b", "analyzer", "title_boost", "language", "scoring")
_BM25_ALONE = (*_BM25_SETTINGS, "processes")
_ENCODER = (
    "query_prompt", "passage_prompt", "passage_template", "max_tokens", "dimension", "inputs",
    "token_pooling", "query_style",
)  # fmt: skip
_ENCODED_ALONE = (*_ENCODER, "dtype", "factory", "terms_per_passage", "shard", "ray", "device", "encode_with")


@dataclass(frozen=True)
class IndexConfig:
    """The corpus, the index, and how one becomes the other."""

    corpus: str | None = None
    """JSON lines file of passages, {"id", "contents"} or {"id", "title", "text"} or with "image"; or a PDF,
    or a folder of PDFs, HTML files and images, whose pages are rendered into OUT-pages."""
    out: str | None = None
    """Folder for the index."""
    encoder: str | None = None
    """A sentence-transformers model, dense, sparse or multi-vector: its name or folder."""
    kind: str | None = None
    """bm25; with an encoder flat or ann (dense), inverted (sparse), maxsim (multi-vector)."""
    k1: float = 0.9
    """bm25: how much a repeated word counts."""
    b: float = 0.4
    """bm25: how much long passages are held back, 0 to 1."""
    analyzer: str = "plain"
    """bm25: plain (lower-cased words), stopwords, english, anserini or multilingual."""
    title_boost: int = 1
    """bm25: how many times the title counts."""
    language: str = "none"
    """bm25: of the stemmer, for the analyzer multilingual."""
    scoring: str = "bm25"
    """bm25: bm25, or tfidf (a cosine; without k1 and b)."""
    processes: int | None = None
    """bm25: count the words in so many processes; one a core if not given."""
    dtype: str = "float16"
    """Type of stored vectors: float32, float16 or int8 (inverted: weights of 8 bits, or float32)."""
    factory: str | None = None
    """ann: a string for faiss.index_factory, such as IVF4096,SQ8; by size if not given."""
    terms_per_passage: int | None = None
    """inverted: keep so many of the largest weights of a passage; all if not given."""
    query_prompt: str | None = None
    """Put before every query, such as "query: "; the model's own if not given."""
    passage_prompt: str | None = None
    """The same for passages."""
    passage_template: str = "{title}\n{text}"
    """The text of a passage, from {title}, {text} and {contents}."""
    max_tokens: int | None = None
    """Longer texts are cut; the model's own limit if not given."""
    dimension: int | None = None
    """Keep the first so many numbers of a dense vector, of a Matryoshka model; all if not given."""
    inputs: str | None = None
    """Parts of a passage that are encoded: text, image, text+image, or another registered modality; by
    default what the model was trained with here, else the image where it reads images."""
    token_pooling: str = ""
    """maxsim: pool the vectors of a passage to about one in so many: rows:4 (patches side by side),
    kmeans:4 or hierarchical:4; not at all if not given."""
    query_style: Literal["query", "question", "history"] | None = None
    """Text that agents ask it in: their query, after its question, or with earlier queries; as the model was
    trained here if not given, else query."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a page that cannot be read, or skip it and say so."""
    shard: str = "1/1"
    """i/n: only encode every n-th shard from the i-th on, beside other machines with the same --out; a run
    without it then builds the index."""
    ray: str | None = None
    """Encode the shards on a Ray cluster whose machines share the folders: HOST:PORT of its head, auto, or
    local for one on this machine."""
    encode_with: str | None = None
    """URL of a server that encodes the passages by the same dense model, which its vectors are compared
    with: one of OpenAI's embeddings (`vllm serve`, TEI), such as http://127.0.0.1:8001/v1."""
    device: str = "auto"
    """cpu, cuda or auto."""
    overwrite: bool = False
    """Replace a different index at `out`."""
    add: str | None = None
    """Add the passages of this file to the index at --out; nothing else is encoded."""
    replace: bool = False
    """With --add: a passage takes the place of the one with its id, which is refused otherwise."""
    delete: str | None = None
    """Delete these passages from the index at --out: a file with an id a line, or ids between commas."""
    compact: str | None = None
    """The folder of an index: merge what was added into it, and drop what was deleted."""
    verify: str | None = None
    """The folder of an index: read every byte of it and of its corpus, and build nothing."""


def main(config: IndexConfig) -> None:
    """Build an index of a corpus. The same corpus and settings at `out` are reused as they are.

    With --encoder the passages become vectors, shard by shard: a run that was killed goes on when it
    is started again. --add and --delete change the index at `out`: a new generation, without a rebuild.
    """
    for alone in ("verify", "compact"):
        if getattr(config, alone) is not None:
            others = [each.name for each in fields(config) if each.name != alone]
            _refuse(config, others, f"without --{alone}")
    if config.verify is not None:
        from retriever_server.indexes.base import verify_index

        whole = verify_index(config.verify)
        _say_change("whole:", whole, config.verify)
    elif config.compact is not None:
        from retriever_server.indexes.living import compact

        _say_change("compacted", compact(Path(config.compact)), config.compact)
    elif config.add is not None or config.delete is not None:
        _change(config)
    elif not config.corpus or not config.out:
        others = "--add or --delete with --out, or --verify or --compact with the folder of an index"
        raise ConfigError(f"--corpus and --out must be given, or {others}")
    elif config.encoder is None:
        _build_bm25(config, config.out)
    else:
        _build_encoded(config, config.encoder, config.out)


def _change(config: IndexConfig) -> None:
    """Add passages to an index, or delete some."""
    if (config.add is None) == (config.delete is None) or config.corpus or not config.out:
        raise ConfigError("--add FILE or --delete IDS: one of them, with --out, the index, and no --corpus")
    built = ("kind", "dtype", "factory", "terms_per_passage", "shard", "ray", "encode_with")
    _refuse(config, (*_BM25_ALONE, *built), "with --corpus")
    from data.corpus import Corpus
    from retriever_server.indexes.living import add, delete
    from retriever_server.indexes.manifest import read_manifest

    place = Path(config.out)
    if config.delete is not None:
        _refuse(config, ("replace",), "with --add")
        deleted = delete(place, ids := _ids(config.delete))
        return _say_change(f"deleted {len(ids):,};", deleted, config.out)
    passages, manifest = Corpus(config.add or ""), read_manifest(place)
    encoder = _encoder_of(config, place, manifest) if config.encoder or manifest.spec else None
    added = add(place, passages, encoder, config.replace, progress=track("encoding passages"))
    _say_change(f"added {len(passages):,};", added, config.out)


def _encoder_of(config: IndexConfig, place: Path, manifest: Any) -> Any:
    """Return the encoder that is given, else the one that built the index."""
    from retriever_server.encoders.loading import load_encoder
    from retriever_server.indexes.manifest import built_spec

    if config.encoder is None:
        _refuse(config, _ENCODER, "with --encoder")
        return load_encoder(built_spec(place, manifest), device=config.device)
    options = {name: getattr(config, name) for name in _ENCODER}
    return load_encoder(config.encoder, device=config.device, **options)


def _ids(given: str) -> list[str]:
    """Return the ids in a file, or those between commas."""
    # Many ids are longer than a name of a file may be; a pipe is refused where it is read.
    is_file = os.path.exists(given) and not os.path.isdir(given)
    listed = (line for _, line in read_lines(Path(given))) if is_file else given.split(",")
    if not (ids := dict.fromkeys(id_.strip() for id_ in listed if id_.strip())):
        raise ConfigError(f"--delete {given}: holds no id")
    return list(ids)


def _say_change(done: str, index: Any, out: str) -> None:
    print(f"{done} {counted(index.corpus_count, 'passage')} in {out} (generation {index.generation})")


def _build_bm25(config: IndexConfig, out: str) -> None:
    if config.kind not in (None, "bm25"):
        raise ConfigError(f"--kind {config.kind}: needs an --encoder (a sentence-transformers model)")
    _refuse(config, _ENCODED_ALONE, "with --encoder")
    from data.corpus import Corpus
    from retriever_server.indexes.bm25 import BM25Index

    passages = Corpus(_corpus(config.corpus, out, config.on_error))
    bar = track("reading passages")
    settings: dict[str, Any] = {name: getattr(config, name) for name in _BM25_SETTINGS}
    processes = cores() if config.processes is None else config.processes
    index = BM25Index.build(
        passages, out, overwrite=config.overwrite, progress=bar, processes=processes, **settings
    )
    _say(index, out, bar.used)


def _build_encoded(config: IndexConfig, encoder_name: str, out: str) -> None:
    _refuse(config, _BM25_ALONE, "with --kind bm25")
    part = _parse_shard(config.shard)
    if config.ray and part != (1, 1):
        raise ConfigError(f"--shard {config.shard}: has no meaning with --ray, which gives out all shards")
    if config.ray and config.encode_with:
        raise ConfigError(
            f"--encode_with {config.encode_with}: has no meaning with --ray, which encodes itself"
        )
    if config.kind == "bm25":
        raise ConfigError("--kind bm25: takes no --encoder")
    asked = {"factory": config.factory, "terms_per_passage": config.terms_per_passage}
    settings: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if settings.get("factory") and config.kind != "ann":
        raise ConfigError(f"--factory {config.factory}: has a meaning only with --kind ann")
    from data.corpus import Corpus
    from data.models.hub import find_model
    from retriever_server.encoders.loading import kind_for, load_encoder
    from retriever_server.encoders.served import ServedEncoder
    from retriever_server.encoders.spec import ENCODERS
    from retriever_server.indexes.generation import building
    from retriever_server.indexes.manifest import index_kind
    from scripts.on_ray.encode import encode_on_ray

    of = index_kind(config.kind) if config.kind else None
    options = {name: getattr(config, name) for name in _ENCODER}
    device = "auto" if config.ray else config.device  # the GPUs may be those of other machines
    check_device(device)
    find_model(encoder_name, "encoder")
    passages = Corpus(_corpus(config.corpus, out, config.on_error))
    own = load_encoder(encoder_name, kind_for(encoder_name, config.kind), device=device, **options)
    encoder = ServedEncoder(own, config.encode_with) if config.encode_with else own
    of = of or index_kind(ENCODERS[encoder.spec.kind].index)
    if "terms_per_passage" in settings and of.kind != "inverted":
        raise ConfigError(f"--terms_per_passage: has a meaning only with --kind inverted, not {of.kind}")
    bar = track("encoding passages")
    settings["on_error"] = config.on_error
    if part != (1, 1):
        shards, _ = of.plan(passages, Path(out), encoder, config.dtype, **settings)
        with building(Path(out), part="{}-of-{}".format(*part)):
            shards.encode(bar, part)
        left = len(shards.missing())
        then = f"{left} of other parts are missing" if left else "run it without --shard to build the index"
        print(f"part {config.shard} is encoded ({counted(len(shards), 'shard')}); {then}")
        return
    if config.ray:
        settings["encode"] = partial(encode_on_ray, address=config.ray, device=config.device)
    index = of.build(passages, out, encoder, config.dtype, config.overwrite, bar, **settings)
    _say(index, out, bar.used)
    if bar.used and not config.ray and not config.encode_with:
        _say_work(own)


def _corpus(given: str | None, out: str, on_error: Literal["stop", "skip"]) -> Path:
    """Return the corpus file: the one given, or that of the pages that a PDF or folder is rendered into."""
    path = Path(given or "")
    if not path.is_dir() and path.suffix.lower() != ".pdf":
        return path
    from scripts.render import main as render

    folder = Path(out).absolute()
    pages = folder.with_name(f"{folder.name}-pages")
    render(str(path), str(pages), on_error=on_error)
    return pages / "corpus.jsonl"


def _say_work(encoder: Any) -> None:
    if encoder.images:
        waited = encoder.waited_seconds / (encoder.model_seconds + encoder.waited_seconds)
        print(f"{counted(encoder.images, 'image')}; the model waited for them {waited:.0%} of the time")
    waste = encoder.padded_tokens / max(1, encoder.real_tokens)
    tokens = f"{encoder.real_tokens:,} tokens, padded/real {waste:.3f}; " if encoder.real_tokens else ""
    print(f"{tokens}spec {encoder.spec.hash}")


def _say(index: Any, out: str, built: bool) -> None:
    done = "indexed" if built else "already there:"
    count, skipped = len(index.corpus), len(getattr(index, "skipped", ()))
    some = f"{count - skipped:,} of " if skipped else ""
    print(f"{done} {some}{counted(count, 'passage')} in {out} (generation {index.generation})")


def _refuse(config: IndexConfig, names: Sequence[str], when: str) -> None:
    """Raise ConfigError for options that would change nothing; `when` they have a meaning."""
    for name in names:
        if (value := getattr(config, name)) != getattr(IndexConfig, name):
            raise ConfigError(f"--{name} {value}: has a meaning only {when}")


def _parse_shard(shard: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard {shard}: must be i/n with 1 <= i <= n")
    return int(found[1]), int(found[2])
