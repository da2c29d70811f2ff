"""Model builders for decoders: E5-mistral, RepLLaMA, LLM2Vec, Qwen3-Embedding, PromptReps, yes/no rerankers.

As in `models.py`: what a recipe's `model.class_path` names, and what takes `(base, **options)`.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from data.errors import ConfigError
from retriever_server.encoders.eos import append_eos
from retriever_server.encoders.loading import limit_tokens
from retriever_server.encoders.proofs import prove
from retriever_server.encoders.two_way import make_two_way
from retriever_server.retrievers.rerank import QUESTION
from retriever_server.training.models import Base, _assemble, _load, _similarity, _transformer

SYSTEM = "You are an AI assistant that can understand human language."
ASKED = (
    '{role}: "{text}". Use one word to represent the {name} in a retrieval task. '
    "Make sure your word is in lowercase."
)
SAID = 'The word is "'
"""The prompt of PromptReps' README."""


def decoder(
    base: Base,
    pooling: Literal["eos", "mean"] = "eos",
    two_way: bool = False,
    normalise: bool = True,
    query_prompt: str = "",
    passage_prompt: str = "",
    pool_prompt: bool = True,
    eos: str | None = None,
    dropout: float = 0.0,
    max_tokens: int | None = None,
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    dtype: str = "float32",
) -> Any:
    """One vector a text from a decoder (Llama, Qwen, Mistral, SmolLM ...), proved to be what is asked for.

    pooling: the vector of an EOS token, appended after truncation (E5-mistral, RepLLaMA, Qwen3-Embedding),
    or the mean of all (LLM2Vec). two_way: tokens attend to those after them. pool_prompt: whether the
    prompt counts in the mean. eos: another token than the tokenizer's own. dropout: of attention, while
    it trains (unsupervised SimCSE lives by it). Raises ConfigError, DataError if a proof fails.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    kernels: Any = {"attn_implementation": attention}
    transformer = _transformer(
        base, max_tokens, dtype, model_kwargs=kernels, config_kwargs={"attention_dropout": dropout}
    )
    if two_way:
        make_two_way(transformer.model)
    tokenizer = transformer.tokenizer
    if pooling == "eos":
        append_eos(tokenizer, eos)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    mode = "lasttoken" if pooling == "eos" else "mean"
    pool = Pooling(transformer.get_embedding_dimension(), mode, pool_prompt)
    modules = [transformer, pool, *([Normalize()] if normalise else [])]
    model = _assemble(SentenceTransformer, modules, query_prompt, passage_prompt, _similarity(normalise))
    prove(model)
    return model


def promptreps(
    base: Base,
    representation: Literal["dense", "sparse"] = "dense",
    top_tokens: int = 128,
    max_tokens: int | None = 512,
    dtype: str = "float32",
) -> Any:
    """A language model's next word as dense or sparse vectors (`encoders/promptreps.py`); needs no training.

    The prompts are in the chat template of the model, or plain where it has none; they can be replaced
    by other templates with {text} (`sleuth index --query_prompt`). max_tokens: of the prompt and the text.
    """
    from sentence_transformers import SentenceTransformer, SparseEncoder

    from retriever_server.encoders.promptreps import PromptReps

    module = _load(
        base,
        lambda name: PromptReps(
            name, representation=representation, top_tokens=top_tokens, model_kwargs={"dtype": dtype}
        ),
    )
    limit_tokens(module, max_tokens)
    prompts = [_ask(module.tokenizer, role) for role in ("Query", "Passage")]
    of, similarity = (SentenceTransformer, "cosine") if representation == "dense" else (SparseEncoder, "dot")
    return _assemble(of, [module], prompts[0], prompts[1], similarity)


def _ask(tokenizer: Any, role: str) -> str:
    asked = ASKED.replace("{role}", role).replace("{name}", role.lower())
    turns = [("system", SYSTEM), ("user", asked), ("assistant", SAID)]
    if not tokenizer.chat_template:
        return "\n".join(content for _, content in turns)
    messages = [{"role": speaker, "content": content} for speaker, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)


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
    `rerank.py`, or in plain sentence-transformers. A passage that is too long is cut, the question is not.
    """
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.modules import LogitScore

    read: dict[str, Any] = {"method": "forward", "method_output_name": "logits"}
    of: Any = {"text": read, "message": {**read, "format": "flat"}}
    transformer = _transformer(
        base, max_tokens, dtype, transformer_task="text-generation", modality_config=of,
        module_output_name="causal_logits",
    )  # fmt: skip
    tokenizer = transformer.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (yes, no)]
    if answers[0] == answers[1]:
        raise ConfigError(f"yes = {yes!r}, no = {no!r}: begin with the same token")
    tokenizer.chat_template = pair_template(tokenizer, prompt)
    return CrossEncoder(modules=[transformer, LogitScore(*answers)], device="cpu")


def pair_template(tokenizer: Any, prompt: str) -> str:
    """A chat template that puts messages of the roles query and document into `prompt`, others as before."""
    before, found, rest = _chat(tokenizer, prompt).partition("{query}")
    between, found_too, after = rest.partition("{passage}")
    if not (found and found_too):
        raise ConfigError("prompt: must hold {query} and, after it, {passage}")
    parts = (json.dumps(part, ensure_ascii=False) for part in (before, between, after))
    first, second, third = parts
    of = '(messages | selectattr("role", "eq", "{}") | map(attribute="content") | first)'
    pair = f"{{{{ {first} ~ {of.format('query')} ~ {second} ~ {of.format('document')} ~ {third} }}}}"
    plain = "{% for message in messages %}{{ message.content }}{% endfor %}"
    is_pair = '{% if messages | selectattr("role", "eq", "query") | list %}'
    return f"{is_pair}{pair}{{% else %}}{tokenizer.chat_template or plain}{{% endif %}}"


def _chat(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
