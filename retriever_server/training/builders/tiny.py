"""Tiny random transformers with a tokenizer of their own, for tests and benchmarks: nothing is downloaded.

Where a recipe names a base model, `{config: {model_type: bert, ...}, corpus: FILE}` makes one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from data.atomic import make_once
from data.corpus import Corpus
from data.errors import ConfigError

logger = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "sleuth" / "tiny"
"""Folder where they are kept for the next time, under a hash of what they were made from."""
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
_PASSAGES_READ = 20_000
_MADE = 3  # counts changes of what the same arguments give
_CAUSAL = {"pad_token": "<|pad|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}


def tiny_base(
    config: Mapping[str, Any],
    corpus: str | None = None,
    vocabulary: int = 4000,
    seed: int = 0,
    folder: str | Path | None = None,
) -> str:
    """The folder of a random model of `config` with a tokenizer trained on `corpus`; made once.

    config: model_type (bert, llama, qwen3, ...; idefics3 or vit for images, see `tiny_vision.py`) and what
    of its configuration differs from two layers of 64. vocabulary: at most so many tokens. It is saved
    with its language model head, from which all builders load what they need. The same arguments give
    the same weights. Raises ConfigError.
    """
    settings = {**SMALL, **config}
    reads_text = settings.get("model_type") != "vit"
    if reads_text and corpus is None:
        raise ConfigError("base: corpus: missing; the tokenizer is trained on it")
    passages = Corpus(corpus) if corpus is not None and reads_text else None
    if folder is None:
        source = passages.content_hash if passages is not None else ""
        made_from = json.dumps([_MADE, settings, source, vocabulary, seed], sort_keys=True)
        folder = CACHE / hashlib.sha256(made_from.encode()).hexdigest()[:16]

    def write(building: Path) -> None:
        _write(settings, passages, vocabulary, seed, building)

    return str(make_once(Path(folder), write))


def _write(
    settings: dict[str, Any], passages: Corpus | None, vocabulary: int, seed: int, folder: Path
) -> None:
    name = settings.pop("model_type", None)
    texts = (passage.contents for passage in islice(() if passages is None else passages, _PASSAGES_READ))
    if name in ("vit", "idefics3"):
        from retriever_server.training.builders.tiny_vision import write_vit, write_vlm

        if name == "vit":
            write_vit(settings, seed, folder)
        else:
            write_vlm(settings, byte_pairs(texts, vocabulary), seed, folder)
    else:
        _write_text_model(name, settings, texts, vocabulary, seed, folder)
    logger.info("a random %s is in %s", name, folder)


def _write_text_model(
    name: Any, settings: dict[str, Any], texts: Iterator[str], vocabulary: int, seed: int, folder: Path
) -> None:
    try:
        usual = AutoConfig.for_model(name)
    except ValueError as error:
        raise ConfigError(f"config: model_type {name!r}: must be bert, llama, qwen3 or another") from error
    masked = type(usual) in MODEL_FOR_MASKED_LM_MAPPING
    tokenizer = (_word_pieces if masked else byte_pairs)(texts, vocabulary)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    if hasattr(usual, "num_key_value_heads"):  # by default those of a large model
        settings = {"num_key_value_heads": settings["num_attention_heads"], **settings}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        of: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        try:
            config = AutoConfig.for_model(name, **{**ids, **settings, "vocab_size": len(tokenizer)})
            model = of.from_config(config)
            model(input_ids=torch.zeros((1, 2), dtype=torch.long))
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"config {settings}: no {name} runs with this ({reason})") from error
    model.save_pretrained(folder)
    tokenizer.model_max_length = min(getattr(config, "max_position_embeddings", 512), 512)
    tokenizer.save_pretrained(folder)


def _word_pieces(texts: Iterator[str], vocabulary: int) -> Any:
    """BERT's tokenizer, which lower-cases, puts [CLS] before and [SEP] after, with word pieces of its own."""
    blank: Any = BertTokenizer(do_lower_case=True)
    return blank.train_new_from_iterator(texts, vocabulary, show_progress=False)


def byte_pairs(texts: Iterator[str], vocabulary: int) -> Any:
    """A tokenizer of byte pairs as GPT-2's, which adds no tokens of its own to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(_CAUSAL.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **_CAUSAL)
