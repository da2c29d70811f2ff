"""Fixtures of several files: the toy world that trains in seconds, and torch as the last test found it."""

import pytest
import torch

from tests.toy import build_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the toy's policy, questions and index."""
    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def determinism_ends_with_the_test():
    yield
    torch.use_deterministic_algorithms(False)
