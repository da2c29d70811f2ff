"""Makes the seed policy of the embedded world from nothing: a tokenizer and a small Qwen2.

The policy must copy names that it has never seen from a passage into a query or an answer. A model
of a million parameters does learn that from data, but not within minutes. So the copying circuit of
Olsson et al. 2022 (arXiv 2209.11895, "induction heads") is wired in at initialisation: a head of
layer 0 attends to the previous token, a head of layer 1 attends to what followed the current token
before. Everything else starts random, and all of it is trained. Wherever results of this policy are
shown, `data.models.packaged.WIRED_IN` is shown with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from agent.policy import Policy
from agent.protocol import Protocol


@dataclass(frozen=True)
class SeedConfig:
    """Size of the seed policy; the rest is Qwen2 as it is."""

    vocabulary: int = 1024
    """Tokens of the byte-level BPE, tags included."""
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 5
    heads: int = 4
    head_size: int = 48
    context_tokens: int = 1024
    rope_theta: float = 1e6
    """High, so that half of each head barely turns within a trajectory and can match content."""
    copying: bool = True
    """Wire the copying circuit in; False starts from plain random weights."""


def train_tokenizer(texts: Iterable[str], protocol: Protocol, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `texts`; each control tag is one token, each digit stands alone."""
    tags = [f"<{slash}{tag}>" for tag in protocol.tags for slash in ("", "/")]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(tags),
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens(tags)
    return tokenizer


def make_seed_policy(
    texts: Iterable[str], protocol: Protocol, config: SeedConfig = SeedConfig(), seed: int = 0
) -> Policy:
    """An untrained policy whose tokenizer is made for `texts`."""
    tokenizer = train_tokenizer(texts, protocol, config.vocabulary)
    torch.manual_seed(seed)
    more: dict[str, Any] = {
        "head_dim": config.head_size,  # Qwen2's model reads it, its configuration's signature has it not
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context_tokens,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=None,
            **more,
        )
    )
    if config.copying:
        wire_copying(model)
    return Policy(model.eval(), tokenizer)


@torch.no_grad()
def wire_copying(model: Qwen2ForCausalLM) -> None:
    """Set head 0 of layers 0 and 1 so that the model predicts what followed the current token before.

    The residual stream is shared out in thirds: which token this is, which token came before, and
    what to say next. Head 0 of layer 0 moves the first into the second, one position on, by position
    alone. Head 0 of layer 1 matches the first of now with the second of then, and moves the first of
    then into the third, which the output layer reads. All other writes start at a tenth of their size.
    """
    width = model.config.hidden_size
    size = getattr(model.config, "head_dim")  # noqa: B009
    third = min(width // 3, size)
    token, before, say = (slice(i * third, (i + 1) * third) for i in range(3))
    layers: Any = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_(0.1)
        layer.mlp.down_proj.weight.mul_(0.1)
    embedding = model.model.embed_tokens.weight
    embedding.mul_(0.5)
    embedding[:, token] = torch.randn(len(embedding), third) * 0.1
    model.lm_head.weight.mul_(0.5)
    model.lm_head.weight[:, say] = embedding[:, token]
    first, second = layers[0].self_attn, layers[1].self_attn
    head = slice(0, size)
    eye = torch.eye(third)
    angles = _rope_angles(model, size)
    for projection in (first.q_proj, first.k_proj, first.v_proj, second.q_proj, second.k_proj, second.v_proj):
        projection.weight[head] = 0
    first.k_proj.bias[head] = torch.cat([torch.ones(size // 2), torch.zeros(size // 2)]) * 9
    # Turned back by one position: the dot product of query and key is largest at distance one.
    first.q_proj.bias[head] = torch.cat([angles.cos(), -angles.sin()]) * 9
    first.v_proj.weight[:third, token] = eye
    first.o_proj.weight[before, :third] = eye * 0.5
    slow = _slow_dimensions(angles)
    match = torch.linalg.qr(torch.randn(third, third))[0][: len(slow)] * 3
    second.q_proj.weight[slow, token] = match
    second.k_proj.weight[slow, before] = match
    second.v_proj.weight[:third, token] = eye
    second.o_proj.weight[say, :third] = eye


def _rope_angles(model: Qwen2ForCausalLM, size: int) -> Tensor:
    """Return the angle by which each plane of a head turns a position, in radians (size / 2,)."""
    rope: Any = model.config.rope_parameters
    theta = rope["rope_theta"]
    return theta ** (-torch.arange(0, size, 2) / size)


def _slow_dimensions(angles: Tensor) -> list[int]:
    """Dimensions of a head that turn less than about half a radian within 200 positions."""
    planes = (angles * 200 < 0.6).nonzero()[:, 0].tolist()
    return [*planes, *(plane + len(angles) for plane in planes)]
