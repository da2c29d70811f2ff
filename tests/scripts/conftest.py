"""Fixtures of the tests of commands: the small world that retrievers are trained in."""

from pathlib import Path

import pytest

from tests.retriever_server.training.recipes import world


@pytest.fixture(scope="module")
def rivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, examples and dev questions of rivers, on disk."""
    return world(tmp_path_factory.mktemp("rivers"))
