"""A model or data set is seen to be there before anything slow; without a hub nobody waits for it."""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from data.errors import ConfigError
from data.models import hub
from data.models.hub import find_dataset, find_model
from tests.processes import PATIENCE_SECONDS, Forked


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    """A process that has not asked the hub yet, with an empty cache."""
    monkeypatch.setattr(hub, "_offline", [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def a_hub(monkeypatch):
    """A hub that has org/there alone, and counts what it is asked."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            there, ill = self.path.endswith("/org/there"), self.path.endswith("/org/ill")
            body = json.dumps({"id": "org/there", "error": "no"}).encode()
            expired = self.path.endswith("/org/expired")
            self.send_response(200 if there else 503 if ill else 401 if expired else 404)
            if expired:
                self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            elif not (there or ill):
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_hub(monkeypatch):
    """A hub whose port is closed."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield


def model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def refused(name, what="policy"):
    with pytest.raises(ConfigError) as caught:
        find_model(name, what)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_and_a_short_name_ask_no_hub(a_hub, tmp_path):
    model(tmp_path / "mine")
    assert find_model("mine", "policy") == "mine"
    assert (find_model("atlas", "encoder")).endswith("seed_policy")
    (tmp_path / "weights.gguf").touch()
    assert "'weights.gguf': is a file, must be the folder of a model" in refused("weights.gguf")
    assert a_hub == []


def test_the_hub_is_asked_once_whether_it_has_a_name(a_hub):
    assert find_model("org/there", "policy") == "org/there"
    assert len([path for path in a_hub if "org/there" in path]) == 1
    assert "policy = 'org/gone': no folder, no short name" in refused("org/gone")
    assert "the hub has no such model" in refused("org/gone")
    with pytest.raises(ConfigError, match=r"no file .* the hub has no such dataset"):
        find_dataset("org/gone", "questions")
    assert not constants.HF_HUB_OFFLINE


def test_where_the_hub_wants_another_token_the_command_to_log_in_is_named(a_hub):
    assert "401 Unauthorized" in refused("org/expired") and "(`hf auth login`)" in refused("org/expired")
    assert "no such model, or it is private (`hf auth login`)" in refused("org/gone")
    assert "hf auth login" not in refused("org/ill")


@pytest.mark.parametrize(
    "name", ["", "/absent", "./absent", "a/b/c", "https://example.org/model", "with blank"]
)
def test_what_can_be_no_name_of_the_hub_never_asks_it(a_hub, name):
    assert "no name of the hub" in refused(name)
    assert a_hub == []


def test_a_misspelt_name_is_told_what_is_spelt_alike(no_hub, tmp_path):
    model(tmp_path / "runs" / "retriever")
    assert refused("atlass").endswith("; did you mean atlas?")
    assert refused("runs/retreiver").endswith("; did you mean runs/retriever?")
    assert refused(str(tmp_path / "runs" / "retrievr")).endswith(f"; did you mean {tmp_path}/runs/retriever?")
    assert "did you mean" not in refused("zzz")


def test_a_folder_that_is_no_model_names_the_models_in_it(tmp_path):
    model(tmp_path / "run" / "model")
    assert (
        refused("run") == "policy = 'run': holds no config.json, so it is no model; did you mean run/model?"
    )


def test_the_folder_of_a_run_is_told_its_last_checkpoints(tmp_path):
    for step in range(5):
        model(tmp_path / "run" / "checkpoints" / f"step-{step}")
    hint = "; did you mean run/checkpoints/step-2 or run/checkpoints/step-3 or run/checkpoints/step-4?"
    assert refused("run").endswith(hint)


@pytest.mark.parametrize("at", [".", "actor", "actor/huggingface"])
def test_shards_of_verl_are_told_how_to_become_a_model(tmp_path, at):
    (tmp_path / "actor" / "huggingface").mkdir(parents=True)
    (tmp_path / "actor" / "model_world_size_2_rank_0.pt").touch()
    (tmp_path / "actor" / "huggingface" / "config.json").touch()
    told = f"holds the shards of verl's trainer; .* --local_dir {tmp_path / 'actor'} --target_dir DIR`$"
    with pytest.raises(ConfigError, match=told):
        find_model(str(tmp_path / at), "policy")
    (tmp_path / "actor" / "huggingface" / "model.safetensors").touch()  # verl's own whole model
    assert find_model(str(tmp_path / "actor" / "huggingface"), "policy")


def test_an_adapter_whose_base_is_nowhere_is_refused_by_name(no_hub, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "'adapter': base_model_name_or_path = 'org/base': no folder" in refused("adapter")


def test_without_a_hub_the_reason_stays_and_nobody_asks_again(no_hub, monkeypatch):
    assert "the hub cannot be reached (" in refused("org/name")
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"  # for what is started from here
    monkeypatch.setattr(hub, "_ask_hub", lambda *_: pytest.fail("asked again"))
    assert "the hub cannot be reached (" in refused("org/other")


@pytest.mark.parametrize("name", ["org/name", "org/ill"])
def test_what_is_in_the_cache_is_taken_where_the_hub_does_not_answer(a_hub, tmp_path, name):
    if name == "org/name":
        constants.HF_HUB_OFFLINE = True
    assert refused(name)
    snapshot = tmp_path / "hub-cache" / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
    model(snapshot)
    assert find_model(name, "policy") == name and constants.HF_HUB_OFFLINE


def test_a_hub_that_never_answers_is_given_up_after_seconds(monkeypatch):
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "the hub cannot be reached" in refused("org/name")


def load_from(endpoint):
    """Print the seconds that libraries sleep before they give up a hub."""
    from transformers import AutoConfig, AutoTokenizer

    constants.ENDPOINT, constants.HF_HUB_OFFLINE = endpoint, False
    find_model("atlas", "policy")
    asleep = []
    time.sleep = asleep.append
    for load in (AutoConfig.from_pretrained, AutoTokenizer.from_pretrained):
        with suppress(OSError):
            load("org/name")
    print(sum(asleep))


def test_libraries_that_ask_the_hub_by_themselves_do_not_retry_for_minutes():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        process = Forked(load_from, f"http://127.0.0.1:{taken.getsockname()[1]}")
        out, said = process.communicate(PATIENCE_SECONDS)
    assert float(out.split()[-1]) <= 2.0
    assert "Retrying" not in said
