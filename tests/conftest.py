"""Fixtures of several files: the toy world that trains in seconds, and torch as the last test found it.

Nothing heavy is imported on loading: the process that only hands out tests loads this file, too.
"""

import gc
import os
import sys
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import settings


def pytest_configure(config):
    """Try twenty examples of a property, and fifteen times as many where slow tests run."""
    settings.register_profile("fast", max_examples=20, deadline=None)
    settings.register_profile("full", max_examples=300, deadline=None)
    settings.load_profile("fast" if "not slow" in config.option.markexpr else "full")


def pytest_collection(session):
    """Let every other worker load the tests from the last to the first, and find what the others compiled."""
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579":
        folders = [Path(argument) for argument in session.config.args if Path(argument).is_dir()]
        files = [file.resolve() for folder in folders for file in folder.rglob("test_*.py")]
        for file in sorted(files, reverse=True):
            with suppress(pytest.skip.Exception):
                import_module(".".join(file.relative_to(session.config.rootpath).with_suffix("").parts))


def pytest_collection_finish():
    """Leave modules and tests out of every later collection of garbage: they took half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def certificates_are_read_once():
    """Not for every client and request of a test."""
    import httpx._transports.default as transports

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "create_ssl_context", cache(transports.create_ssl_context))
        yield


@pytest.fixture(autouse=True, scope="module")
def modules_loaded_meanwhile_are_left_out_too():
    yield
    pytest_collection_finish()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the toy's policy, questions and index."""
    from tests.toy import build_toy

    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def determinism_ends_with_the_test():
    yield
    if torch := sys.modules.get("torch"):
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def day(monkeypatch):
    """Lets chat templates believe that it is another day."""

    def turn_to(*date):
        class Clock:
            @staticmethod
            def now():
                return datetime(*date)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    return turn_to
