"""Small worlds on disk, once for a file of tests: rivers with dev questions, topics for recipes."""

from pathlib import Path

import pytest

from tests.retriever_server.training import recipes


@pytest.fixture(scope="module")
def rivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, examples and dev questions of rivers."""
    return recipes.world(tmp_path_factory.mktemp("rivers"))


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and examples of topics."""
    return recipes.topics(tmp_path_factory.mktemp("topics"))
