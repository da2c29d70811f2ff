"""Two-way attention in a decoder: every token sees every other, and that it does is proved, not believed.

transformers (5.2 and later) makes decoders two-way where `config.is_causal` is False: their mask functions
then leave out the causal half, and the attention kernels are told so, too. It stands in `config.json`, so
that a saved folder is two-way wherever it is loaded. Implementations that changed only one of the two went
on causally without a word: at batch size 1 (llm2vec#74), and under SDPA (llm2vec#79), whose kernel takes
"no mask", which is what a batch without padding has, for a causal one.
"""

from __future__ import annotations

from typing import Any

from data.errors import DataError

_TOKENS, _PADDING = 12, 5


def make_two_way(model: Any) -> None:
    """Let the tokens of a decoder of transformers see those after them, from now on and when saved."""
    model.config.get_text_config().is_causal = False


def is_two_way(model: Any) -> bool:
    """Whether a model of transformers says of itself that it is a decoder with two-way attention."""
    config = getattr(model, "config", None)
    return config is not None and getattr(config.get_text_config(), "is_causal", None) is False


def prove_two_way(model: Any) -> None:
    """Raise DataError unless the model of transformers attends in both directions, whatever the batch.

    By perturbation, for batches of one and of three, without padding and with it on either side: another
    last token must change the vector of the first; another padding token, the padding itself, and the
    other texts of the batch must change nothing. In the precision and with the kernels it was loaded with.
    """
    import torch

    config = model.config.get_text_config()
    name = f"{type(model).__name__} ({config._attn_implementation} attention)"
    training = model.training
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (3, _TOKENS), generator=generator)
    last = ids.clone()
    last[:, -1] = (ids[:, -1] + 1) % config.vocab_size
    model.eval()
    try:
        alone = _hidden(model, ids[:1])
        for count in (1, 3):
            for side in (None, "left", "right"):
                where = f"{name}, batch of {count}, {side or 'no'} padding"
                texts = _hidden(model, ids[:count], side)
                if not _differs(texts[:, :1], _hidden(model, last[:count], side)[:, :1], model, 1e-4):
                    raise DataError(f"{where}: its first token does not see the last one: it is causal")
                if side and _differs(texts, _hidden(model, ids[:count], side, pad=1), model, 1e-4):
                    raise DataError(f"{where}: its tokens see the padding")
                if _differs(texts[:1], alone, model, 1e-2):
                    raise DataError(f"{where}: its vectors are not those of the same text alone")
    finally:
        model.train(training)


def prove_attention(model: Any) -> None:
    """`prove_two_way` for every two-way decoder in a model of sentence-transformers; for others nothing."""
    for transformer in transformers_in(model):
        if is_two_way(transformer):
            prove_two_way(transformer)


def transformers_in(model: Any) -> list[Any]:
    """The outermost models of transformers among the modules of one of sentence-transformers."""
    from transformers import PreTrainedModel

    found: list[Any] = []
    for module in model.modules():
        inside = any(module is each for outer in found for each in outer.modules())
        if isinstance(module, PreTrainedModel) and not inside:
            found.append(module)
    return found


def _hidden(model: Any, ids: Any, side: str | None = None, pad: int = 0) -> Any:
    """The last vectors (or logits) of the texts, without those of the padding.   (B, T) -> (B, T, H)"""
    import torch

    mask, real = torch.ones_like(ids), slice(None)
    if side is not None:
        padding = torch.full((len(ids), _PADDING), pad)
        nothing = torch.zeros_like(padding)
        before = side == "left"
        ids = torch.cat([padding, ids] if before else [ids, padding], 1)
        mask = torch.cat([nothing, mask] if before else [mask, nothing], 1)
        real = slice(_PADDING, None) if before else slice(-_PADDING)
    with torch.no_grad():
        out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    return hidden[:, real].float()


def _differs(a: Any, b: Any, model: Any, tolerance: float) -> bool:
    """Whether vectors differ by more than their precision explains, in relation to their size."""
    import torch

    rough = 10 if tolerance > 1e-3 and model.dtype in (torch.bfloat16, torch.float16) else 1
    return bool((a - b).abs().max() > tolerance * rough * a.abs().max())
