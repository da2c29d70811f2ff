"""`sleuth download`: it goes on where it stopped, joins parts, and gives no broken file its name."""

import hashlib
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from scripts import __main__ as sleuth

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Files(ThreadingHTTPServer):
    """Serves `files`; breaks each of the first answers off after `breaks` bytes; counts what it sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.ranges, self.honours_ranges = {"/f": CONTENT}, [], [], True
        self.stalls, self.tags = [], True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Files = self.server  # type: ignore[assignment]
        content, asked = server.files.get(self.path), self.headers.get("range")
        server.ranges.append(asked)
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.honours_ranges else 0
        if self.headers.get("if-range") not in (None, tag):
            start = 0
        if start >= len(content) and start:
            self.send_response(416)
            self.send_header("content-range", f"bytes */{len(content)}")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if server.tags:
            self.send_header("etag", tag)
        self.send_header("content-length", str(len(content) - start))
        self.end_headers()
        end = start + server.breaks.pop(0) if server.breaks else len(content)
        if server.stalls:
            self.wfile.write(content[start : server.stalls.pop()])
            time.sleep(60)  # until the client is killed
        self.wfile.write(content[start:end])

    def log_message(self, format, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    files = Files()
    threading.Thread(target=files.serve_forever, args=(0.01,), daemon=True).start()
    yield files
    files.shutdown()
    files.server_close()


def download(url: str, out, *options) -> int:
    return sleuth.main(["download", url, "--out", str(out), *options])


def test_a_broken_transfer_goes_on_within_one_command(server, tmp_path):
    server.breaks = [1_200_000, 900_000]
    assert download(f"{server.url}/f", tmp_path / "f", "--sha256", DIGEST.upper()) == 0
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert len(server.ranges) == 3 and server.ranges[0] is None
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_the_same_command_again_goes_on_after_the_last_byte(server, tmp_path, capsys):
    server.breaks = [2_000_000, 0]
    assert download(f"{server.url}/f", tmp_path / "f", "--attempts", "1") == 2
    assert "gave up after 1 attempts" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
    have = (tmp_path / "f.part").stat().st_size
    assert have > 0
    assert download(f"{server.url}/f", tmp_path / "f", "--sha256", DIGEST) == 0
    assert server.ranges[-1] == f"bytes={have}-"
    asked = len(server.ranges)
    assert download(f"{server.url}/f", tmp_path / "f", "--sha256", DIGEST) == 0
    assert len(server.ranges) == asked  # it is there


def test_parts_become_one_file(server, tmp_path):
    server.files = {"/aa": CONTENT[:1_000_000], "/ab": CONTENT[1_000_000:]}
    server.breaks = [1_000_000, 700_000, 0]
    both = f"{server.url}/aa,{server.url}/ab"
    assert download(both, tmp_path / "f", "--attempts", "1") == 2
    assert download(both, tmp_path / "f", "--sha256", DIGEST) == 0
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.ranges.count(None) == 2  # neither part was asked for twice from its beginning


def test_a_file_that_became_shorter_is_fetched_anew(server, tmp_path):
    server.breaks, server.tags = [2_000_000, 0], False
    assert download(f"{server.url}/f", tmp_path / "f", "--attempts", "1") == 2
    server.files["/f"] = CONTENT[:1_000_000]
    assert download(f"{server.url}/f", tmp_path / "f", "--attempts", "2") == 0
    assert (tmp_path / "f").read_bytes() == CONTENT[:1_000_000]


def test_a_killed_download_goes_on(server, tmp_path):
    server.stalls = [2_000_000]
    command = [sys.executable, "-m", "scripts", "download", f"{server.url}/f", "--out", str(tmp_path / "f")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    part = tmp_path / "f.part"
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    have = part.stat().st_size
    assert 0 < have <= 2_000_000
    assert download(f"{server.url}/f", tmp_path / "f", "--sha256", DIGEST) == 0
    assert server.ranges == [None, f"bytes={have}-"]


@pytest.mark.parametrize("honours_ranges", [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_anew(honours_ranges, server, tmp_path):
    server.breaks, server.honours_ranges = [2_000_000, 0], honours_ranges
    assert download(f"{server.url}/f", tmp_path / "f", "--attempts", "1") == 2
    server.files["/f"] = CONTENT[::-1]
    assert download(f"{server.url}/f", tmp_path / "f") == 0
    assert (tmp_path / "f").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("{}/f", ["--sha256", "0" * 64], f"has SHA-256 {DIGEST}, not 000"),
        ("{}/absent", [], "/absent: answered 404 Not Found"),
        ("{}/f", ["--sha256", "xyz"], "must be 64 hexadecimal digits"),
        ("ftp://x", [], "url = 'ftp://x': must be http(s) addresses"),
        ("http://:bad/", [], "http://:bad/: nobody answers there (invalid port)"),
        ("{}/f", ["--attempts", "0"], "attempts = 0: must be >= 1"),
        ("{}/f", ["--out", "."], "out = '.': must be the file to write"),
    ],
)
def test_what_went_wrong_is_said_in_one_line(url, options, said, server, tmp_path, capsys):
    assert download(url.format(server.url), tmp_path / "f", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_where_nobody_listens_it_ends_at_once_and_not_after_all_attempts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.machine.listening.PROBE_SECONDS", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/f"
        assert download(url, tmp_path / "f", "--attempts", "10") == 2
    assert capsys.readouterr().err == f"sleuth: {url}: nobody answers there (Connection refused)\n"
    assert not (tmp_path / "f.part").exists()


def test_a_name_that_no_server_has_ends_at_once(tmp_path, capsys, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    assert download("https://no.such.host/f", tmp_path / "f") == 2
    assert "nobody answers there (Name or service not known)" in capsys.readouterr().err
