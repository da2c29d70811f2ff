"""Rows of vectors in memory-mapped shards, and the exact best of them for a batch of queries.

fp32, fp16 or int8 with a scale a row (see `shards.quantise`); scores are products in float32. A search needs
memory for a block of rows alone; on a GPU the shards stay in its memory if they fit. On a CPU rows of int8
are first ranked by products of integers, and the best are scored again, one by one in float32: a score is the
same to the last bit however the rows are cut into shards and whatever else is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Of torch.from_numpy: maps are read-only, and nothing here writes to them.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")

_BLOCK_BYTES = {"cpu": 4 << 20, "int8": 64 << 20, "cuda": 1 << 30}
"""Bytes of a block as float32: on a CPU what its caches hold, unless integers are multiplied."""
_SPARE = 16
"""Rows beyond the k-th that are scored again: rounding may have put some of them too low."""


class Rows:
    """N vectors of D dimensions, as stored under `name` and its scales in the files of some folders."""

    def __init__(self, folders: Sequence[Path], name: str = "vectors", device: str = "cpu") -> None:
        self._shards, self._scales = _mapped(folders, name), _mapped(folders, f"{name}-scales")
        self._set_up(device)

    @staticmethod
    def of(array: np.ndarray, device: str = "cpu") -> Rows:
        """Wrap one array, fp32 or fp16, in memory or mapped."""
        rows = object.__new__(Rows)
        rows._shards, rows._scales = [array], []
        rows._set_up(device)
        return rows

    def _set_up(self, device: str) -> None:
        self.dimension = self._shards[0].shape[1]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._device, self._integers = device, bool(self._scales) and device == "cpu"
        self._resident: list[Any] | None = _copies_on(device, self._shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _largest(self) -> float:
        """The largest number in rows of int8."""
        return 127 * max((float(scales.max(initial=0)) for scales in self._scales), default=0.0)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at `positions` as float32.   (N,) -> (N, D)"""
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        if len(shards) and (shards == shards[0]).all():
            return self._decoded(shards[0], positions - self._starts[shards[0]])
        out = np.empty((len(positions), self.dimension), np.float32)
        for shard in np.unique(shards):
            where = np.flatnonzero(shards == shard)
            out[where] = self._decoded(shard, positions[where] - self._starts[shard])
        return out

    def span(self, start: int, end: int) -> np.ndarray:
        """Rows from `start` to before `end` as float32, all in one shard."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        return self._decoded(shard, slice(start - int(self._starts[shard]), end - int(self._starts[shard])))

    def arrays(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows at `positions`, ascending, as `shards.quantise` gave them."""
        cuts = np.searchsorted(positions, self._starts).tolist()
        found: dict[str, np.ndarray] = {}
        for name, shards in {"vectors": self._shards, "vectors-scales": self._scales}.items():
            parts = zip(shards, pairwise(cuts), self._starts.tolist(), strict=False)
            if taken := [shard[positions[a:b] - start] for shard, (a, b), start in parts]:
                found[name] = np.concatenate(taken)
        return found

    def _decoded(self, shard: int, where: Any) -> np.ndarray:
        rows = self._shards[shard][where].astype(np.float32)
        if self._scales:
            rows *= self._scales[shard][where][:, None]
        return rows

    def search(
        self, queries: np.ndarray, k: int, mask: np.ndarray | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the `k` rows with the largest inner product with each query, among those that `mask` allows.

        queries (Q, D), mask (N,) -> for each query positions and scores, best first. Equal scores are in
        order, but where they straddle the k-th place any of them may be there.
        """
        with torch.inference_mode():
            asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
            if self._integers:
                return self._search_int8(asked, k, mask)
            asked = asked.to(self._device)
            spare = _SPARE if self._device == "cpu" else 0
            best, where = self._top(asked, k + spare, mask)
            if not spare:
                return [_by_score(w, s) for s, w in zip(best, where, strict=True)]
            return [self.score(each, query, k) for each, query in zip(where, asked.numpy(), strict=True)]

    def candidates(self, queries: np.ndarray, k: int, mask: np.ndarray | None = None) -> np.ndarray:
        """Return the positions of the rows that `search` would find, but for rounding.   -> (Q, <= k)"""
        with torch.inference_mode():
            asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(self._device)
            return self._top(_in_int8(asked)[0] if self._integers else asked, k, mask)[1]

    def score(
        self, positions: np.ndarray, query: np.ndarray, k: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return these rows and their products with a query, the `k` best first."""
        scores = (self[positions] * query).sum(1)  # `@` rounds by the rows around a row
        positions, scores = _by_score(positions, scores)
        return positions[:k], scores[:k]

    def _search_int8(
        self, queries: Any, k: int, mask: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Search by products of integers, with the queries in int8, too.

        The best by these are scored in float32; more of them, until none left out can be among the `k` best.
        """
        whole, scale = _in_int8(queries)
        # The most that a score is off by: what rounding left of the query, and float32's own.
        off = ((queries - whole * scale).abs() + 1e-6 * queries.abs()).sum(1) * self._largest
        count = 8 * k + 128
        while True:
            rough, where = self._top(whole, count, mask)
            found = [self.score(each, query) for each, query in zip(where, queries.numpy(), strict=True)]
            out_of_reach = (
                len(worst) < count or worst[-1] + most < exact[k - 1]
                for worst, most, (_, exact) in zip(rough * scale.numpy(), off.tolist(), found, strict=True)
            )
            if all(out_of_reach):
                return [(positions[:k], scores[:k]) for positions, scores in found]
            count *= 8

    def _top(self, queries: Any, k: int, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest scores of each query, best first, and their positions.   (Q, <= k) each

        queries (Q, D): float32, or int8 where the rows are multiplied as integers.
        """
        best = torch.empty((len(queries), 0), device=self._device)
        where = torch.empty((len(queries), 0), dtype=torch.int64, device=self._device)
        for positions, rows, scales in self._blocks(mask):
            scores = torch.ops.aten._int_mm(queries, rows.T) if self._integers else queries @ rows.float().T
            scores = scores if scales is None else scores * scales
            if best.shape[1] == k:  # few rows are among the best of any query: the others need no sorting
                beats = (scores > best[:, -1:]).any(0).nonzero()[:, 0]
                scores, positions = scores[:, beats], positions[beats]
            top = torch.topk(scores, min(k, scores.shape[1]))
            best = torch.cat([best, top.values], 1)
            where = torch.cat([where, positions[top.indices]], 1)
            best, order = torch.sort(best, dim=1, descending=True, stable=True)
            best, where = best[:, :k], where.gather(1, order)[:, :k]
        return best.cpu().numpy(), where.cpu().numpy()

    def _blocks(self, mask: np.ndarray | None) -> Iterator[tuple[Any, Any, Any]]:
        """Positions, stored rows and their scales, a block at a time, on the device."""
        of = "int8" if self._integers else self._device.partition(":")[0]
        size = max(1, _BLOCK_BYTES.get(of, 64 << 20) // (4 * self.dimension))
        for shard, rows in enumerate(self._shards):
            for start in range(0, len(rows), size):
                span: Any = slice(start, min(start + size, len(rows)))
                positions = np.arange(span.start, span.stop) + self._starts[shard]
                if mask is not None:
                    kept = np.flatnonzero(mask[positions])
                    if not len(kept):
                        continue
                    if len(kept) < len(positions):
                        positions, span = positions[kept], kept + start
                stored = self._resident[shard] if self._resident else rows
                block = _tensor(stored[span]).to(self._device)
                scales = _tensor(self._scales[shard][span]).to(self._device) if self._scales else None
                yield torch.from_numpy(positions).to(self._device), block, scales


def _in_int8(queries: Any) -> tuple[Any, Any]:
    """Round queries to 8 bits, by the largest number of each.   (Q, D) -> int8 (Q, D), scales (Q, 1)"""
    scales = queries.abs().amax(1, keepdim=True) / 127
    return torch.round(queries / torch.where(scales == 0, 1, scales)).to(torch.int8), scales


def _by_score(positions: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both with the best first, equal scores in order of positions."""
    order = np.lexsort((positions, -scores))
    return positions[order], scores[order]


def _mapped(folders: Sequence[Path], name: str) -> list[np.ndarray]:
    """Return the arrays of this name, plain views of maps: slicing np.memmap itself is slow."""
    files = [file for folder in folders for file in sorted(folder.glob(f"*.{name}.npy"))]
    return [np.load(file, mmap_mode="r").view(np.ndarray) for file in files]


def _tensor(array: Any) -> Any:
    if torch.is_tensor(array):
        return array
    return torch.from_numpy(array if array.flags.aligned else array.copy())


def _copies_on(device: str, shards: list[np.ndarray]) -> list[Any] | None:
    """Return the shards in the memory of a GPU, if they take at most 70 % of what is free there."""
    if not device.startswith("cuda"):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if sum(shard.nbytes for shard in shards) > 0.7 * free:
        return None
    return [torch.from_numpy(shard.copy()).to(device) for shard in shards]
