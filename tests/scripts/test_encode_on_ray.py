"""`sleuth index --ray`: a cluster writes the same index as one process, and outlives a dead worker."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from data.errors import ConfigError, RunStopped
from data.jsonl import write_jsonl
from retriever_server.indexes.base import open_index
from retriever_server.indexes.encoded import EncodedIndex
from retriever_server.indexes.manifest import read_manifest
from scripts.on_ray import encode
from tests.retriever_server.running import run_index
from tests.retriever_server.tiny_encoders import WORDS, FakeEncoder, tiny_model


def write_corpus(path: Path) -> str:
    write_jsonl(path, [{"id": str(i), "text": f"{WORDS[i % 17]} {WORDS[i % 5]} {i}"} for i in range(90)])
    return str(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ray": "127.0.0.1:{}"}, r"--ray 127.0.0.1:\d+: no Ray cluster answers there \(.*refused"),
        ({"ray": "ray://127.0.0.1:1"}, r"--ray ray://127.0.0.1:1: must be local, auto or HOST:PORT"),
        ({"ray": "head"}, r"--ray head: must be local, auto or HOST:PORT"),
        ({"ray": "local"}, r"--ray local: needs Ray: pip install 'sleuth-rl\[ray\]'"),
        ({"ray": "local", "shard": "1/2"}, r"--shard 1/2: has no meaning with --ray"),
        ({"ray": "local", "encoder": None}, r"--ray local: has a meaning only with --encoder"),
    ],
)
def test_a_cluster_that_there_is_not_is_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("retriever_server.encoders.loading.load_encoder", lambda *_, **__: FakeEncoder())
    monkeypatch.setitem(sys.modules, "ray", None)
    options = {**options, "ray": options["ray"].format(free_port())}
    corpus = write_corpus(tmp_path / "c.jsonl")
    with pytest.raises(ConfigError, match=message):
        run_index(corpus, str(tmp_path / "i"), **{"encoder": "atlas", **options})


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, and a GPU for those that ask."""
    utils = pytest.importorskip("ray.cluster_utils")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    two = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    two.add_node(num_cpus=1)
    yield two
    two.shutdown()


def kill_a_worker(killed: list[int]) -> None:
    """SIGKILL to the first process that encodes a shard."""
    while not killed:
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and b"ray::encode_shard" in _command_line(entry):
                os.kill(int(entry.name), signal.SIGKILL)
                killed.append(int(entry.name))
                return
        time.sleep(0.02)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_two_nodes_write_what_one_process_writes_though_a_worker_is_killed(
    cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(EncodedIndex, "passages_per_shard", 15)
    corpus, model = write_corpus(tmp_path / "c.jsonl"), tiny_model(tmp_path / "m", "dense")
    run_index(corpus, str(tmp_path / "alone"), model, device="cpu")
    arguments = {"ray": cluster.address, "device": "cpu", "encoder": model}
    killed: list[int] = []
    threading.Thread(target=kill_a_worker, args=(killed,), daemon=True).start()
    run_index(corpus, str(tmp_path / "i"), **arguments)
    assert killed
    assert f"indexed 90 passages in {tmp_path / 'i'}" in capsys.readouterr().out
    alone, together = (read_manifest(tmp_path / name) for name in ("alone", "i"))
    assert alone.checksums == together.checksums and alone.generation == together.generation
    assert open_index(tmp_path / "i").search(["river"], 3)
    monkeypatch.setattr(encode, "connect_ray", lambda _: pytest.fail("it is there already"))
    run_index(corpus, str(tmp_path / "i"), **arguments)


@pytest.mark.slow
def test_a_shard_that_always_fails_is_named_and_the_others_are_kept(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(EncodedIndex, "passages_per_shard", 30)
    corpus, model = write_corpus(tmp_path / "c.jsonl"), tiny_model(tmp_path / "m", "dense")
    monkeypatch.setattr(encode, "encode_shard", failing_once_in_three)
    arguments = {"ray": cluster.address, "device": "cpu", "encoder": model}
    with pytest.raises(RunStopped, match=r"1 of 3 shards are missing: 00001 \(00001: OSError: broken"):
        run_index(corpus, str(tmp_path / "i"), **arguments)
    assert not (tmp_path / "i").exists()
    [folder] = tmp_path.glob(".i.encoding-*")
    assert len(list(folder.glob("*.tried"))) == encode.ATTEMPTS
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.done")}
    monkeypatch.undo()
    monkeypatch.setattr(EncodedIndex, "passages_per_shard", 30)
    seen: list[int] = []
    real = encode._finished
    monkeypatch.setattr(encode, "_finished", lambda *a: (seen.append(p) or p for p in real(*a)))
    run_index(corpus, str(tmp_path / "i"), **arguments)
    assert len(before) == 2 and seen == list(range(30, 60))  # the others were not encoded again
    assert len(open_index(tmp_path / "i").corpus) == 90


def failing_once_in_three(plan, shard, encode=encode.encode_shard) -> None:
    """Encodes, but for shard 1, of which it only notes that it was tried."""
    if shard == 1:
        Path(plan.folder).mkdir(exist_ok=True)
        (Path(plan.folder) / f"{os.urandom(4).hex()}.tried").touch()
        raise OSError("broken disk")
    encode(plan, shard)


@pytest.mark.slow
def test_a_task_takes_a_gpu_where_the_cluster_has_one(cluster, tmp_path, monkeypatch):
    def only_say_where(plan, shard):
        import ray

        raise OSError(f"device {plan.device}, GPUs {ray.get_gpu_ids()}")

    monkeypatch.setattr(encode, "encode_shard", only_say_where)
    corpus, model = write_corpus(tmp_path / "c.jsonl"), tiny_model(tmp_path / "m", "dense")
    with pytest.raises(RunStopped, match=r"OSError: device cuda, GPUs \[0\]"):
        run_index(corpus, str(tmp_path / "i"), model, ray=cluster.address)
    with pytest.raises(RunStopped, match=r"OSError: device cpu, GPUs \[\]"):
        run_index(corpus, str(tmp_path / "i"), model, ray=cluster.address, device="cpu")
