"""Masked next-token prediction: a decoder learns to use two-way attention (BehnamGhader et al. 2024).

LLM2Vec's order: two-way attention (`decoder(two_way=True)`), this loss, SimCSE, then supervised pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import ConfigError


class MaskedNextToken(nn.Module):
    """Masks some tokens of each text, and predicts each from the vector of the token *before* it.

    So the language model's head goes on doing what it was trained for. Of the texts in the first column.
    share of the tokens is masked (never the first, nor padding or special tokens): replace "all" of them by
    mask_token, or as "bert" 80 % by it, 10 % by any token, and leave 10 %. The head is that of the model's
    own base: shared with its embeddings where they are tied, else loaded from it, and not trained.
    """

    def __init__(
        self,
        model: Any,
        mask_token: str = "_",
        share: float = 0.2,
        replace: Literal["all", "bert"] = "bert",
    ) -> None:
        super().__init__()
        ids = model.tokenizer(mask_token, add_special_tokens=False)["input_ids"]
        if mask_token not in model.tokenizer.get_vocab() and len(ids) != 1:
            raise ConfigError(f"mask_token {mask_token!r}: must be one token, is {len(ids)}")
        if not 0 < share < 1 or replace not in ("all", "bert"):
            raise ConfigError(
                f"share = {share}, replace = {replace!r}: must be within 0 and 1, and all or bert"
            )
        self.model, self.share, self.replace = model, share, replace
        self.mask_id = ids[0] if len(ids) == 1 else model.tokenizer.convert_tokens_to_ids(mask_token)
        self.special_ids = sorted({*model.tokenizer.all_special_ids} - {self.mask_id})
        self.head = _untied_head(model.transformers_model)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        features = dict(next(iter(sentence_features)))
        ids, mask = features["input_ids"], features["attention_mask"]
        chosen = self._choose(ids, mask)
        features["input_ids"] = self._masked(ids, chosen)
        hidden = self.model(features)["token_embeddings"]
        embeddings = self.model.transformers_model.get_input_embeddings()
        head = embeddings.weight if self.head is None else self.head
        return masked_next_token_loss(hidden, head.to(hidden.dtype), ids, chosen)

    def _choose(self, ids: Tensor, mask: Tensor) -> Tensor:
        special = torch.tensor(self.special_ids, device=ids.device)
        follows = F.pad(mask[:, :-1], (1, 0)).bool()  # has a token before it
        allowed = mask.bool() & follows & ~torch.isin(ids, special)
        return allowed & (torch.rand(ids.shape, device=ids.device) < self.share)

    def _masked(self, ids: Tensor, chosen: Tensor) -> Tensor:
        masked = ids.masked_fill(chosen, self.mask_id)
        if self.replace == "all":
            return masked
        draw = torch.rand(ids.shape, device=ids.device)
        vocabulary = self.model.transformers_model.get_input_embeddings().num_embeddings
        random = torch.randint_like(ids, vocabulary)
        masked = torch.where(chosen & (draw < 0.1), random, masked)
        return torch.where(chosen & (draw >= 0.9), ids, masked)


def masked_next_token_loss(hidden: Tensor, head: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
    """Cross-entropy of the chosen tokens, token i predicted from vector i - 1; 0 where none is chosen.

    hidden (B, T, H), head (V, H), ids (B, T) before masking, chosen (B, T) -> scalar
    """
    logits = hidden[:, :-1][chosen[:, 1:]] @ head.T  # (masked, V)
    return F.cross_entropy(logits.float(), ids[:, 1:][chosen[:, 1:]], reduction="sum") / max(1, len(logits))


def _untied_head(transformer: Any) -> Tensor | None:
    """The weights of the base's language model head; None where it shares the embeddings."""
    config = transformer.config.get_text_config()
    if config.tie_word_embeddings:
        return None
    from transformers import AutoModelForCausalLM

    name = config.name_or_path
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, missing = load(name, output_loading_info=True, dtype="auto")
    if lost := [key for key in missing["missing_keys"] if "head" in key]:
        raise ConfigError(f"{name}: holds no language model head ({lost[0]}) to predict masked tokens with")
    return loaded.get_output_embeddings().weight.detach().to(transformer.device)
