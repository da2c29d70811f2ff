"""Decoders that end in EOS and attend both ways, and the checks that a model does what its spec says.

EOS is appended by the tokenizer itself, after it has cut a text to its length. Two-way attention is
`config.is_causal = False` (transformers 5.2 and later); both are saved with the model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from data.errors import ConfigError, DataError, require
from data.pages.modalities import modalities, samples
from data.records import Input, Item
from retriever_server.encoders.read_spec import appends_eos, is_two_way, last_token, outer_transformers
from retriever_server.encoders.spec import Encoder, EncodingSpec, rows_of, similarities

TEXTS = ("river", "The capital of a country is not always its largest city.", "one two " * 40)
"""Short, middling and long: what encoders are tested with."""
_LONG = "one two three four five six seven eight "


def append_eos(tokenizer: Any, eos: str | None = None) -> None:
    """Let a tokenizer of transformers end every text in its EOS token, also when saved; `eos` becomes that.

    One without a padding token pads with it. Raises ConfigError where there is no such token.
    """
    from tokenizers.processors import Sequence, TemplateProcessing

    token = eos or tokenizer.eos_token
    if token is None or token not in tokenizer.get_vocab():
        raise ConfigError(f"eos {token!r}: is no token of the tokenizer")
    tokenizer.eos_token = token
    tokenizer.pad_token = tokenizer.pad_token or token
    id_ = tokenizer.convert_tokens_to_ids(token)
    if last_token(tokenizer) == id_:
        return
    if {"add_bos_token", "add_eos_token"} & set(tokenizer.init_kwargs):
        tokenizer.add_eos_token = True  # such a tokenizer makes its post-processor anew when it is loaded
        tokenizer.init_kwargs["add_eos_token"] = True
    else:
        backend = tokenizer.backend_tokenizer
        last = TemplateProcessing(
            ["$A", token], ["$A", token, "$B:1", f"{token}:1"], special_tokens=[(token, id_)]
        )
        before = backend.post_processor
        backend.post_processor = Sequence([before, last]) if before is not None else last
    if last_token(tokenizer) != id_:
        raise ConfigError(f"{type(tokenizer).__name__}: does not append {token} to a text")


def make_two_way(model: Any) -> None:
    """Let the tokens of a decoder of transformers see those after them, from now on and when saved."""
    model.config.get_text_config().is_causal = False


def check_model(model: Any) -> None:
    """Raise DataError unless a model of sentence-transformers attends, ends and pools as it says.

    Vectors that depend on padding or on the other texts of a batch are found by `spec.self_test`.
    """
    for transformer in filter(is_two_way, outer_transformers(model)):
        check_two_way(transformer)
    check_eos(model)
    check_prompts(model)


def check_two_way(model: Any) -> None:
    """Raise DataError unless the first token of a text sees the last one.

    One text without padding: kernels that take "no mask" for a causal one fail just there (llm2vec#74, #79).
    """
    import torch

    vocabulary, training = model.config.get_text_config().vocab_size, model.training
    ids = torch.randint(vocabulary, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % vocabulary
    model.eval()
    with torch.no_grad():
        a, b = (
            model(input_ids=each.to(model.device), output_hidden_states=True).hidden_states[-1][:, 0].float()
            for each in (ids, other)
        )
    model.train(training)
    if (a - b).abs().max() <= 1e-4 * a.abs().max():
        kernel = model.config.get_text_config()._attn_implementation
        name = f"{type(model).__name__} ({kernel} attention)"
        raise DataError(f"{name}: attends to earlier tokens alone, not both ways")


def check_eos(model: Any) -> None:
    """Raise DataError where a text that is cut loses the EOS token whose vector is pooled."""
    limit = model.max_seq_length or 0
    if not appends_eos(model) or not 0 < limit < 1_000_000:
        return
    eos = last_token(model.tokenizer)
    ids = model.preprocess([_LONG * (limit // 8 + 1)])["input_ids"][0]
    if int(ids[-1]) != eos:
        lost = model.tokenizer.decode([eos])
        raise DataError(f"a text longer than {limit} tokens loses {lost!r} when it is cut")


def check_prompts(model: Any) -> None:
    """Raise DataError if leaving a prompt out of the pooling would leave out tokens of the text, too.

    So many first tokens are left out as the prompt has alone. Where its end is joined with the text (a blank
    that becomes part of the first word), that is one too many.
    """
    if all(getattr(module, "include_prompt", True) for module in model):
        return
    for role, prompt in model.prompts.items():
        if prompt:
            alone = _real_tokens(model, prompt)[: model[0]._get_prompt_length(prompt)]
            for text in ("river", "The end", "7"):
                if _real_tokens(model, prompt + text)[: len(alone)] != alone:
                    raise DataError(
                        f"{role} prompt {prompt!r}: the tokenizer joins its end with the text, whose first "
                        "word would be left out of the pooling, too; let it end in a line break"
                    )


def _real_tokens(model: Any, text: str) -> list[int]:
    features = model.preprocess([text])
    return features["input_ids"][0][features["attention_mask"][0].bool()].tolist()


def limit_tokens(model: Any, max_tokens: int | None) -> None:
    """Cut texts at `max_tokens` from now on; None: where the model was saved to cut them.

    Raises ConfigError above the rows of its table of positions, if it has one.
    """
    if max_tokens is None:
        return
    for name, module in model.named_modules():
        if "vision" in name or not re.search(r"\b(position_embeddings?|wpe)$", name):
            continue
        if positions := getattr(module, "num_embeddings", 0):
            offset = getattr(module, "padding_idx", None)  # RoBERTa counts from behind it
            positions -= 0 if offset is None else offset + 1
            allowed = f"<= {positions}, the model's positions"
            require(max_tokens <= positions, "max_tokens", max_tokens, allowed)
    model.max_seq_length = max_tokens


def self_test(encoder: Encoder, like: Encoder | None = None) -> None:
    """Raise DataError unless vectors depend neither on their batch nor on its padding, and fit the spec.

    like: an encoder whose vectors they must equal: the model before it was saved and loaded again.
    """
    for role in ("query", "passage"):
        inputs = _samples(encoder, role)
        together = encoder.encode(inputs, role)
        others = together if like is None else like.encode(inputs, role)
        for i, each in enumerate(inputs):
            rows, model = rows_of(together, i), encoder.spec.model
            alone = similarities(rows_of(encoder.encode([each], role), 0), rows).min()
            if not alone > 0.999:
                shown = repr(each[:20]) if isinstance(each, str) else f"{each.modality} + {each.text[:20]!r}"
                raise DataError(
                    f"{model}: {role} vectors depend on the batch they are encoded in "
                    f"(cosine {alone:.4f} for {shown} alone and in a batch)"
                )
            _check_fits(encoder.spec, rows)
            if not (least := similarities(rows, rows_of(others, i)).min()) > 0.99999:
                raise DataError(f"{model}: {role} vectors changed when it was saved (cosine {least:.6f})")


def _samples(encoder: Encoder, role: str) -> list[Input]:
    """Texts, and where the encoder is given images in this role (or audio), some of these."""
    inputs = encoder.spec.inputs if role == "passage" else ""
    if inputs == "text" or encoder.takes == {"text"}:
        return list(TEXTS)
    names = [inputs.removeprefix("text+")] if inputs else [m for m in modalities() if m in encoder.takes]
    held = [Item(file, modality=name) for name in names for file in samples(name)]
    if inputs in names or "text" not in encoder.takes:
        return list(held)
    beside = zip(held, TEXTS, strict=False) if inputs else ()
    return [*TEXTS, *held, *(replace(item, text=text) for item, text in beside)]


def _check_fits(spec: EncodingSpec, rows: np.ndarray) -> None:
    if rows.shape[1] != spec.dimension:
        raise DataError(
            f"{spec.model}: vectors of {rows.shape[1]} dimensions, its spec says {spec.dimension}"
        )
    lengths = np.linalg.norm(rows, axis=1)
    if spec.normalise and np.abs(lengths - 1).max() > 1e-2:
        raise DataError(f"{spec.model}: vectors of length {lengths.max():.3f}, its spec says 1")
