"""Names of earlier versions find what they name."""

import importlib
import sys
from unittest.mock import patch

import pytest

from data.objects.moved import MOVED, MOVED_CLASSES, current_name
from data.objects.plugins import find_plugin


@pytest.mark.parametrize("module", sorted(MOVED.values()))
def test_every_new_name_is_a_module(module):
    assert importlib.import_module(module)


@pytest.mark.parametrize("name", sorted(MOVED_CLASSES))
def test_every_class_that_moved_alone_is_found(name):
    assert find_plugin(name, "class_path").__name__ == name.rpartition(".")[2]


def test_a_class_is_found_by_its_old_name():
    from retriever_server.retrievers.fuse import Fuse

    assert find_plugin("retriever_server.compose.Fuse", "class_path") is Fuse
    assert current_name("mine.Retriever") == "mine.Retriever"


DOCUMENTED = """
from data.answers import exact_match
from data.images import ImageLimits
from data.modalities import register
from agent.evaluate import format_estimate, paired_difference, read_records, score
from retriever_server.client import SearchClient, connect
from retriever_server.training.examples import Examples, as_dataset
from retriever_server.training.m3 import M3Loss, m3
from retriever_server.training.models import check_base, colbert, dense
from rl.algorithm import AlgorithmConfig
from rl.learner import Learner
from rl.rewards import combine
import rl.algorithm.rewards
assert combine is rl.algorithm.rewards.combine and rl.algorithm.rewards.__name__ == "rl.algorithm.rewards"
"""


def test_python_imports_what_earlier_versions_documented():
    """As in a new process: nothing of ours is imported before by its new name."""
    ours = ("data", "retriever_server", "agent", "rl", "scripts")
    others = {name: module for name, module in sys.modules.items() if name.split(".")[0] not in ours}
    with patch.dict(sys.modules, others, clear=True):
        exec(DOCUMENTED, {})


def test_what_is_nowhere_is_still_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"rl\.nothing"):
        importlib.import_module("rl.nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from rl.learner import nothing")
