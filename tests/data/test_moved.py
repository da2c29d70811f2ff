"""Names of earlier versions find what they name."""

import importlib

import pytest

from data.moved import MOVED, current_name
from data.plugins import find_plugin


@pytest.mark.parametrize("module", sorted(MOVED.values()))
def test_every_new_name_is_a_module(module):
    assert importlib.import_module(module)


def test_a_class_is_found_by_its_old_name():
    from retriever_server.retrievers.compose import Fuse

    assert find_plugin("retriever_server.compose.Fuse", "class_path") is Fuse
    assert current_name("mine.Retriever") == "mine.Retriever"
