"""PromptReps: a language model's own next word as a text's vector, without training (Zhuang et al. 2024).

Asked for the one word that represents a text, what the model is about to say stands for the text: the
vector at the last token (dense), and the scores of the next token, of those that occur in the text
(sparse). One forward pass gives both. The prompts of the model are whole templates that hold {text}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor

from retriever_server.indexes.analyzers import stopwords

_UNSAID = 10  # tokens of a text without any word of its own


class PromptReps(Transformer):
    """The only module of a SentenceTransformer (dense) or SparseEncoder (sparse); `promptreps` builds it.

    representation: dense or sparse, which of the two becomes `sentence_embedding`; features hold both
    as `dense_embedding` (B, H) and `sparse_embedding` (B, V). top_tokens: kept of a text.
    """

    config_keys: ClassVar[list[str]] = [*Transformer.config_keys, "representation", "top_tokens"]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        representation: str = "dense",
        top_tokens: int = 128,
        **options: Any,
    ) -> None:
        if representation not in ("dense", "sparse"):
            raise ValueError(f"representation {representation!r}: must be dense or sparse")
        super().__init__(model_name_or_path, **{**options, "transformer_task": "text-generation"})
        self.representation, self.top_tokens = representation, top_tokens
        tokenizer: Any = self.tokenizer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @property
    def pooling_mode(self) -> str:
        """For the EncodingSpec: which representation, of how many tokens."""
        return self.representation + (f" {self.top_tokens}" if self.representation == "sparse" else "")

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Each text within the template `prompt`, cut so that the whole fits; padded on the left.

        Beside ids and mask (B, T): `own_tokens` (B, N), the ids of the text's words, -1 where it has fewer.
        """
        before, found, after = (prompt or "{text}").partition("{text}")
        if not found:
            raise ValueError(f"prompt {prompt!r}: must hold {{text}}")
        texts = self._cut([str(each) for each in inputs], before + after)
        whole = [before + text + after for text in texts]
        features = self._tokens(whole, padding=True, return_tensors="pt")
        own = [self.own_tokens(text) for text in texts]
        width = max(map(len, own), default=0)
        rows = [[*ids, *[-1] * (width - len(ids))] for ids in own]
        return {**features, "own_tokens": torch.tensor(rows, dtype=torch.long), "modality": "text"}

    def tokens_of(self, text: str, prompt: str | None) -> tuple[int, int]:
        """Tokens of a text within the template, and how many are left once it is cut."""
        before, _, after = (prompt or "{text}").partition("{text}")
        [kept] = self._cut([text], before + after)
        whole, read = (len(self._tokens(before + each + after)["input_ids"]) for each in (text, kept))
        return (whole, read) if kept.split() != text.split() else (read, read)

    def _cut(self, texts: list[str], around: str) -> list[str]:
        """The texts without what does not fit beside `around`."""
        room = max(1, (self.max_seq_length or 512) - len(self._tokens(around)["input_ids"]))
        spans = self._tokens(texts, truncation=True, max_length=room, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        return [text[: each[-1][1] if each else 0] for text, each in zip(texts, spans, strict=True)]

    def own_tokens(self, text: str) -> list[int]:
        """The ids that the text's words begin and go on with, lower-cased, without stop words; sorted."""
        words = sorted(set(stopwords(text)))
        ids = self._tokens(words)["input_ids"] if words else []
        return sorted({each for of_word in ids for each in of_word})

    def _tokens(self, texts: Any, **options: Any) -> Any:
        tokenizer: Any = self.tokenizer
        return tokenizer(texts, add_special_tokens=False, **options)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Sets the two embeddings, and `sentence_embedding` to the one of `representation`."""
        last: list[Tensor] = []
        head: Any = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
        try:
            mask = features["attention_mask"]
            out = self.model(input_ids=features["input_ids"], attention_mask=mask, logits_to_keep=1)
        finally:
            hook.remove()
        features["dense_embedding"] = last[0][:, -1]
        features["sparse_embedding"] = token_weights(
            out.logits[:, -1].float(), features["own_tokens"], self.top_tokens
        )
        features["sentence_embedding"] = features[f"{self.representation}_embedding"]
        return features

    def get_embedding_dimension(self) -> int:
        """Size of the representation: of the model's vectors, or of its vocabulary."""
        config = self.model.config.get_text_config()
        return config.hidden_size if self.representation == "dense" else config.vocab_size


def token_weights(logits: Tensor, own_tokens: Tensor, top_tokens: int = 128) -> Tensor:
    """100 x log(1 + relu(logit)), rounded, of the `top_tokens` best of each text's own tokens, else 0.

    logits (B, V); own_tokens (B, N) ids, -1 for none -> (B, V). A text without any gets the 10 best of all.
    Logits fox 21.62, dog 15.38 -> fox 312, dog 280
    """
    present = own_tokens >= 0
    allowed = torch.zeros_like(logits).scatter_reduce(
        1, own_tokens.clamp(min=0), present.to(logits.dtype), "amax"
    )
    candidates = logits.masked_fill(allowed == 0, -torch.inf)
    wordless = ~present.any(1)
    candidates[wordless] = logits[wordless]
    best = candidates.topk(min(top_tokens, logits.shape[1]), dim=1)  # best first
    kept = best.values.clone()
    kept[wordless, _UNSAID:] = -torch.inf
    weights = (kept.relu().log1p() * 100).round()  # relu(-inf) = 0
    return torch.zeros_like(logits).scatter(1, best.indices, weights)
