"""Several samples of each question in one evaluation, and pass@k of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.records import Question


def sampled(questions: Sequence[Question], samples: int) -> list[Question]:
    """Each question so many times; the second has the id "ID~2" and names its question in the metadata.

    What a trajectory draws depends on the id, so that they differ and a part of them resumes.
    """
    return [
        question
        if number == 1
        else replace(
            question,
            id=f"{question.id}~{number}",
            metadata={"sample_of": question.id, **question.metadata, "sample": number},
        )
        for number in range(1, samples + 1)
        for question in questions
    ]


def pass_at(k: int, right: np.ndarray, samples: int) -> np.ndarray:
    """The chance that one of `k` of the samples is right: 1 - C(n - c, k) / C(n, k), without bias.

    right (N,): how many samples of each question are right -> (N,) (Chen et al. 2021, eq. 1).
    1 right of 2, k 1 -> .5
    """
    # C(n - c, k) / C(n, k) is the product of (1 - k / m) over m = n - c + 1 ... n.
    products = np.cumprod([1.0, *(max(0.0, 1 - k / m) for m in range(samples, 0, -1))])
    return 1 - products[right.astype(int)]
