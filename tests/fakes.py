"""Fakes that several test files share: a byte tokenizer, tiny models, a retriever over a dict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data.records import Hit, Passage, Question
from retriever_server.retriever import Query, Retriever


def byte_tokenizer(*extra_tokens: str, merges: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A real fast tokenizer, one token a byte, plus whole tokens; `merges` are BPE merges 'a b'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(m.split(" ")) for m in merges]
    vocab = {c: i for i, c in enumerate([*alphabet, *("".join(p) for p in pairs)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(list(extra_tokens))
    return tokenizer


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def tiny_model(kind: str, vocab_size: int, seed: int = 0, **changes) -> PreTrainedModel:
    """A random two-layer model in fp32: kind is qwen2, qwen3, llama or gemma3 (with a window of 16)."""
    torch.manual_seed(seed)
    sizes = {
        **SIZES,
        "vocab_size": vocab_size,
        "eos_token_id": None,
        "pad_token_id": None,
        **changes,
    }
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        config = Gemma3TextConfig(
            **sizes,
            head_dim=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        )
        model = Gemma3ForCausalLM(config)
    with torch.no_grad():  # wider than the usual initialisation, so that distributions are not flat
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


class DictRetriever(Retriever):
    """Finds the passages whose title or text holds the query, in order; records what it was asked."""

    generation = "dict"

    def __init__(self, texts: dict[str, str]) -> None:
        self.passages = [Passage(str(i), text, title) for i, (title, text) in enumerate(texts.items())]
        self.queries: list[Query] = []

    def search(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """The first k passages that hold each query."""
        self.queries += queries
        return [
            [
                Hit(p, 1.0 / (rank + 1), self.generation)
                for rank, p in enumerate([p for p in self.passages if q.lower() in p.contents.lower()][:k])
            ]
            for q in queries
        ]


class DictSearcher:
    """The agent's side of a DictRetriever: one query at a time, no server."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.retriever = DictRetriever(texts)

    async def search(self, query: str, k: int) -> list[Hit]:
        """The first k passages that hold the query."""
        return self.retriever.search([query], k)[0]


def question(text: str = "What is the capital of France?", *gold: str, **metadata) -> Question:
    """A question whose id is its text."""
    return Question(text, text, gold or ("Paris",), metadata)
