"""Rerankers, which read query and passage together: with a head of one number, or a language model's yes."""

from __future__ import annotations

import json
from typing import Any

from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore

from retriever_server.encoders.checks import limit_tokens
from retriever_server.retrievers.rerank import QUESTION, first_tokens, parts_of_prompt
from retriever_server.training.builders.dense import Base, load_base, load_transformer


def cross_encoder(base: Base, max_tokens: int | None = None, dtype: str = "float32") -> Any:
    """A reranker that reads query and passage together and gives one number."""
    model = load_base(
        base, lambda name: CrossEncoder(name, num_labels=1, device="cpu", model_kwargs={"dtype": dtype})
    )
    limit_tokens(model, max_tokens)
    return model


def yes_no_reranker(
    base: Base,
    prompt: str = QUESTION,
    yes: str = "yes",
    no: str = "no",
    max_tokens: int = 512,
    dtype: str = "float32",
) -> Any:
    """A CrossEncoder that scores a pair by a language model's logit of `yes` minus `no` (Qwen3-Reranker).

    The prompt, in the model's own chat template where it has one, is saved as the chat template of pairs,
    so that the folder serves as it was trained: as `CrossEncoder` or as `YesNo` (with this prompt) of
    `retrievers/rerank.py`, or in plain sentence-transformers. A passage that is too long is cut, the question
    is not.
    """
    read: dict[str, Any] = {"method": "forward", "method_output_name": "logits"}
    of: Any = {"text": read, "message": {**read, "format": "flat"}}
    transformer = load_transformer(
        base, max_tokens, dtype, transformer_task="text-generation", modality_config=of,
        module_output_name="causal_logits",
    )  # fmt: skip
    tokenizer = transformer.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers = first_tokens(tokenizer, yes, no)
    tokenizer.chat_template = pair_template(tokenizer, prompt)
    modules: Any = [transformer, LogitScore(*answers)]  # pyright: ignore[reportArgumentType]
    return CrossEncoder(modules=modules, device="cpu")


def pair_template(tokenizer: Any, prompt: str) -> str:
    """A chat template that puts messages of the roles query and document into `prompt`, others as before."""
    parts = parts_of_prompt(tokenizer, prompt)
    first, second, third = (json.dumps(part, ensure_ascii=False) for part in parts)
    of = '(messages | selectattr("role", "eq", "{}") | map(attribute="content") | first)'
    pair = f"{{{{ {first} ~ {of.format('query')} ~ {second} ~ {of.format('document')} ~ {third} }}}}"
    plain = "{% for message in messages %}{{ message.content }}{% endfor %}"
    is_pair = '{% if messages | selectattr("role", "eq", "query") | list %}'
    return f"{is_pair}{pair}{{% else %}}{tokenizer.chat_template or plain}{{% endif %}}"
