"""Names of earlier versions find what they name."""

import importlib

import pytest

from data.moved import MOVED, MOVED_CLASSES, current_name
from data.plugins import find_plugin


@pytest.mark.parametrize("module", sorted(MOVED.values()))
def test_every_new_name_is_a_module(module):
    assert importlib.import_module(module)


@pytest.mark.parametrize("name", sorted(MOVED_CLASSES))
def test_every_class_that_moved_alone_is_found(name):
    assert find_plugin(name, "class_path").__name__ == name.rpartition(".")[2]


def test_a_class_is_found_by_its_old_name():
    from retriever_server.retrievers.fuse import Fuse

    for module in ("retriever_server.compose", "retriever_server.retrievers.compose"):
        assert find_plugin(f"{module}.Fuse", "class_path") is Fuse
    assert current_name("mine.Retriever") == "mine.Retriever"
