"""What is proved of a model before it encodes, or is trained: it attends, ends and pools as it says."""

from __future__ import annotations

from typing import Any

from data.errors import DataError
from retriever_server.encoders.eos import appends_eos, prove_eos
from retriever_server.encoders.two_way import is_two_way, prove_attention, transformers_in


def prove(model: Any) -> None:
    """Raise DataError unless a model of sentence-transformers does what it was made for.

    Two-way attention where its configuration asks for it, the EOS token of every text where the last
    token is pooled, and the whole prompt, no word of the text, left out where prompts are not pooled.
    """
    prove_attention(model)
    prove_eos(model)
    prove_prompts(model)


def prove_prompts(model: Any) -> None:
    """Raise DataError if leaving a prompt out of the pooling would leave out tokens of the text, too.

    So many first tokens are left out as the prompt has alone. Where its end melts into the text (a blank
    that becomes part of the first word), that is one too many.
    """
    if all(getattr(module, "include_prompt", True) for module in model):
        return
    for role, prompt in model.prompts.items():
        if prompt:
            alone = _real_tokens(model, [prompt])[: model[0]._get_prompt_length(prompt)]
            for text in ("river", "The end", "7"):
                if _real_tokens(model, [prompt + text])[: len(alone)] != alone:
                    raise DataError(
                        f"{role} prompt {prompt!r}: its end melts into the text, and the first word would "
                        "be left out of the pooling with it; let it end in a line break"
                    )


def _real_tokens(model: Any, texts: list[str]) -> list[int]:
    features = model.preprocess(texts)
    return features["input_ids"][0][features["attention_mask"][0].bool()].tolist()


def describe_first(model: Any) -> list[str]:
    """What an EncodingSpec says of the first module of a model.   -> ["two-way"], ["eos"] or both"""
    own = type(model[0]).__name__ if getattr(model[0], "pooling_mode", None) else ""
    says = [f"{own}({model[0].pooling_mode})"] if own else []
    two_way = any(map(is_two_way, transformers_in(model)))
    return says + ["two-way"] * two_way + ["eos"] * appends_eos(model)
