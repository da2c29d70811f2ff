"""`sleuth search`: passages in the terminal, as they are."""

import pytest

from data.errors import ConfigError
from scripts import search
from tests.retriever_server.running import build_small_index


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return str(build_small_index(tmp_path_factory.mktemp("searched")))


def test_passages_are_printed_best_first(index, capsys):
    search.main(query="blue sea", retriever=index, top_k=2)
    shown = capsys.readouterr().out
    assert shown.index("blue fox sea") < shown.index("green sea")
    assert "red fox" not in shown


def test_nothing_found_is_said(index, capsys):
    search.main(query="[bold]unknown", retriever=index)
    assert "nothing found for '[bold]unknown'" in capsys.readouterr().out


def test_a_wrong_retriever_is_refused():
    with pytest.raises(ConfigError, match="must be an http"):
        search.main(query="fox", retriever="nowhere")
