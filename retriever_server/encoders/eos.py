"""Texts that end in the end-of-sequence token, whose vector stands for them in many decoders.

The tokenizer itself appends it (its post-processor, saved in `tokenizer.json`): after it has cut a text to
its length, so that no long text loses it, in whatever program loads the folder. An EOS that is written
behind the text before it is cut is lost exactly where texts are long, and nothing complains.
"""

from __future__ import annotations

import tempfile
from typing import Any

from data.errors import ConfigError, DataError

_SHORT, _LONG = ("a river", "no"), "one two three four five six seven eight "


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
    if _ends(tokenizer) == tokenizer.convert_tokens_to_ids(token):
        return
    if {"add_bos_token", "add_eos_token"} & set(tokenizer.init_kwargs):
        tokenizer.add_eos_token = True  # such a tokenizer makes its post-processor anew when it is loaded
        tokenizer.init_kwargs["add_eos_token"] = True
    else:
        backend, known = tokenizer.backend_tokenizer, [(token, tokenizer.convert_tokens_to_ids(token))]
        last = TemplateProcessing(["$A", token], ["$A", token, "$B:1", f"{token}:1"], special_tokens=known)
        before = backend.post_processor
        backend.post_processor = Sequence([before, last]) if before is not None else last
    _check_saved(tokenizer, token)


def _check_saved(tokenizer: Any, token: str) -> None:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
    if not _ends(tokenizer) == _ends(again) == tokenizer.convert_tokens_to_ids(token):
        raise ConfigError(f"{type(tokenizer).__name__}: does not append {token} to a text, or not once saved")


def _ends(tokenizer: Any) -> int | None:
    """The special token that the tokenizer puts behind every text."""
    last = {ids[-1] if ids else None for ids in tokenizer([*_SHORT, ""])["input_ids"]}
    special = last & {*tokenizer.all_special_ids, tokenizer.pad_token_id} - {None}
    return special.pop() if len(last) == 1 and special else None


def appends_eos(model: Any) -> bool:
    """Whether a model of sentence-transformers pools the vector of a token that its tokenizer appends."""
    return bool(_pools_last(model) and _ends(model.tokenizer) is not None)


def _pools_last(model: Any) -> bool:
    modes = [getattr(module, "pooling_mode", None) for module in model]
    return any("lasttoken" in ((mode,) if isinstance(mode, str) else mode or ()) for mode in modes)


def prove_eos(model: Any) -> None:
    """Raise DataError unless what is pooled is the vector of the appended token, of every text.

    For a model of sentence-transformers that pools the last token; for others nothing. Texts are empty,
    short, and longer than the model reads; the vectors must be the same padded left and padded right.
    """
    if not _pools_last(model):
        return
    import torch

    tokenizer, limit = model.tokenizer, model.max_seq_length or 0
    if (eos := _ends(tokenizer)) is not None and 0 < limit < 1_000_000:
        ids = model.preprocess([_LONG * (limit // 8 + 1)])["input_ids"][0]
        if int(ids[-1]) != eos:
            raise DataError(
                f"a text longer than {limit} tokens loses {tokenizer.decode([eos])!r} when it is cut"
            )
    texts = [*_SHORT, *([""] if eos is not None else []), _LONG]
    vectors, side = [], tokenizer.padding_side
    try:
        for tokenizer.padding_side in ("left", "right"):
            features = model.preprocess(texts)
            with torch.no_grad():
                features = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in features.items()}
                vectors.append(model(features)["sentence_embedding"].float())
    finally:
        tokenizer.padding_side = side
    least = torch.nn.functional.cosine_similarity(*vectors).min()
    if not least > 0.999:
        raise DataError(f"the vector pooled depends on the side of the padding (cosine {least:.4f})")
