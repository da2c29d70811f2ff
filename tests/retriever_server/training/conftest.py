"""A small world of rivers: corpus, examples and dev questions, on disk once for a file of tests."""

from pathlib import Path

import pytest

from tests.retriever_server.training.recipes import world


@pytest.fixture(scope="module")
def rivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("rivers"))
