"""Several texts in one row of a batch, each attending to itself alone: short queries without padding.

Padding a batch of questions to its longest costs a third of the work. For trunks of BERT's kind, which take
a mask of pairs and positions that start anew, rows are filled with texts instead; the vectors of the tokens
are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def packable(model: Any) -> bool:
    """Whether the trunk of a sentence-transformers model is a BERT: MiniLM, BGE, E5, GTE and more."""
    trunk: Any = getattr(model[0], "auto_model", None)
    return type(trunk).__name__ == "BertModel" and not trunk.config.is_decoder


def fill_rows(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and first column of each text, and the number of rows, as long as the longest text (first fit).

    lengths (N,), longest first -> (N,), (N,), R.   [5, 3, 2, 2] -> rows [0, 1, 1, 2], columns [0, 0, 3, 0]
    """
    width, room = int(lengths[0]), []
    rows, columns = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for i, length in enumerate(lengths.tolist()):
        row = next((row for row, free in enumerate(room) if free >= length), len(room))
        if row == len(room):
            room.append(width)
        rows[i], columns[i] = row, width - room[row]
        room[row] -= length
    return rows, columns, len(room)


def packed_forward(model: Any, features: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Run the model on the features of texts, longest first; -> its output, the number of tokens computed."""
    import torch

    mask = features["attention_mask"].bool()
    lengths = mask.sum(1).cpu().numpy()
    rows, columns, count = fill_rows(lengths)
    width = int(lengths[0])
    text, at = mask.nonzero(as_tuple=True)  # of each token: its text, its place in it
    row, column = (
        torch.from_numpy(rows).to(at.device)[text],
        torch.from_numpy(columns).to(at.device)[text] + at,
    )

    def packed(values: Any) -> Any:
        out = torch.zeros((count, width), dtype=torch.long, device=at.device)
        out[row, column] = values
        return out

    owner = packed(text + 1)
    pairs = (owner[:, :, None] == owner[:, None, :])[:, None]  # (R, 1, T, T)
    ids = {name: packed(features[name][mask]) for name in ("input_ids", "token_type_ids") if name in features}
    trunk, *rest = model
    hidden = trunk({**ids, "attention_mask": pairs, "position_ids": packed(at)})["token_embeddings"]
    tokens = hidden.new_zeros((*mask.shape, hidden.shape[-1]))
    tokens[mask] = hidden[row, column]
    out = {**features, "token_embeddings": tokens}
    for module in rest:
        out = module(out)
    return out, count * width
