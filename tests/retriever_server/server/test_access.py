"""Access: names, tokens, administrators; what no page of others may do; which pictures are shown."""

import json

import httpx
import pytest
from fastapi.testclient import TestClient

from data.corpus import Corpus
from data.errors import ConfigError
from data.jsonl import write_jsonl
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.server.app import create_app
from retriever_server.server.middleware import Access
from scripts.serve import ServeConfig, build_app
from tests.retriever_server.running import build_small_index, running_server
from tests.retriever_server.server.test_app import Stub
from tests.retriever_server.server.test_image_requests import picture

OWN = ["127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "localhost", "LocalHost.:80", "a.localhost", "192.0.2.7"]
OWN += ["Retriever", "retriever.:8000"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "x",
    "[evil]",
]
FOREIGN += ["retriever.evil.example", "evil.example#127.0.0.1", "0x7f.1"]
PATHS = ["/", "/healthz", "/readyz", "/metrics", "/v1/info", "/openapi.json", "/v1/thumbnail/1", "/mcp"]


@pytest.mark.parametrize("host", OWN)
def test_without_a_token_a_server_answers_by_address_by_loopback_names_and_by_its_own(host):
    with TestClient(create_app(Stub(), hosts={"retriever"})) as server:
        assert server.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_without_a_token_a_server_answers_nothing_under_another_name(host):
    with TestClient(create_app(Stub(), hosts={"retriever"}, with_mcp=True)) as server:
        for path in PATHS:
            assert server.get(path, headers={"Host": host}).status_code == 421
        answer = server.post("/retrieve", json={"queries": ["a"]}, headers={"Host": host})
        assert answer.status_code == 421 and "no name of this server" in answer.json()["detail"]


def test_with_a_token_any_name_will_do_since_no_page_has_it():
    with TestClient(create_app(Stub(), token="t", hosts=set())) as server:
        headers = {"Host": "retriever.example", "X-API-Key": "t"}
        assert server.post("/retrieve", json={"queries": ["a"]}, headers=headers).status_code == 200
        assert server.post("/retrieve", json={"queries": ["a"]}).status_code == 401


def test_sleuth_serve_checks_names_and_takes_more(tmp_path):
    index = build_small_index(tmp_path)
    with running_server(index, "--allowed_hosts", "[retriever.example]") as server:
        for host, status in (("evil.example", 421), ("retriever.example:80", 200), ("localhost", 200)):
            answer = httpx.post(f"{server.url}/retrieve", json={"queries": ["fox"]}, headers={"Host": host})
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("host", "others"), [("0.0.0.0", True), ("127.0.0.1", False), ("name.example", True)]
)
def test_the_name_it_listens_under_is_its_own(tmp_path, monkeypatch, host, others):
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    app = build_app(ServeConfig(str(build_small_index(tmp_path)), host=host))
    name = "name.example" if "name" in host else "node7"
    with TestClient(app) as server:
        found = server.get("/healthz", headers={"Host": f"{name}:8000"}).status_code
        assert found == (200 if others else 421)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer t"}, 200),
        ({"Authorization": "bearer  t"}, 200),
        ({"X-API-Key": "t"}, 200),
        ({"X-Api-Key": "t", "Authorization": "Bearer wrong"}, 200),
        ({"X-API-Key": "wrong"}, 401),
        ({"X-API-Key": "Bearer t"}, 401),
        ({"X-API-Key": ""}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Basic t"}, 401),
        ({"Authorization": "t"}, 401),
        ({"Authorization": "Bearer tt"}, 401),
        ({}, 401),
    ],
)
def test_a_token_comes_as_bearer_or_as_api_key(headers, status):
    with TestClient(create_app(Stub(), token="t")) as server:
        assert server.post("/retrieve", json={"queries": ["a"]}, headers=headers).status_code == status


def test_posting_to_the_place_of_the_page_needs_the_token():
    with TestClient(create_app(Stub(), token="secret")) as server:
        assert server.get("/").status_code == 200
        assert server.post("/", json={"inputs": "a"}).status_code == 401


def asked(token, admin_token, given) -> tuple[int, int]:
    """The statuses of a reload and of a search."""
    headers = {"X-API-Key": given} if given else {}
    with TestClient(create_app(Stub(), token=token, admin_token=admin_token)) as server:
        reload = server.post("/admin/reload", headers=headers).status_code
        return reload, server.post("/retrieve", json={"queries": ["a"]}, headers=headers).status_code


@pytest.mark.parametrize(
    ("token", "admin_token", "given", "statuses"),
    [
        ("t", "a", "t", (403, 200)),
        ("t", "a", "a", (409, 200)),  # 409: there is nothing to reload
        ("t", "a", None, (401, 401)),
        ("t", "a", "x", (401, 401)),
        (None, "a", None, (401, 200)),
        (None, "a", "a", (409, 200)),
        ("t", None, "t", (409, 200)),
        (None, None, None, (403, 200)),
    ],
)
def test_administrators_have_a_token_of_their_own(token, admin_token, given, statuses):
    assert asked(token, admin_token, given) == statuses


def test_tokens_are_in_no_log_and_no_answer(tmp_path, caplog):
    log, given = tmp_path / "log.jsonl", {"Authorization": "Bearer s3cret-a", "X-API-Key": "s3cret-b"}
    caplog.set_level(0)
    app = create_app(Stub(), token="s3cret-t", admin_token="s3cret-a", request_log=log)
    with TestClient(app, raise_server_exceptions=False) as server:
        texts = [
            server.get(path, headers=given).text for path in (*PATHS, "/admin/reload", "/v1/thumbnail/x")
        ]
        texts.append(server.post("/retrieve", json={"queries": ["fail"]}, headers=given).text)
    assert "s3cret" not in "".join([*texts, log.read_text(), repr(Access("s3cret-t", "s3cret-a"))])
    assert "s3cret" not in caplog.text
    assert all(json.loads(line)["path"] for line in log.read_text().splitlines())


def test_no_answer_is_shown_in_a_frame_of_others():
    with TestClient(create_app(Stub(), token="t")) as server:
        for path in ("/", "/healthz", "/v1/info", "/nothing"):
            headers = server.get(path).headers
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
            assert headers.get_list("X-Content-Type-Options") == ["nosniff"]


@pytest.fixture
def places(tmp_path):
    """Pictures in the folder of the corpus, beside it, and beside it by a link."""
    for folder in ("corpus/images", "private", "shared"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "p.png").write_bytes(picture("red"))
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "private")
    (tmp_path / "corpus" / "images" / "twin.png").symlink_to(tmp_path / "corpus" / "images" / "p.png")
    images = {
        "in": "images/p.png",
        "twin": "images/twin.png",
        "round": "images/../images/p.png",
        "up": "../private/p.png",
        "absolute": str(tmp_path / "private" / "p.png"),
        "link": "link/p.png",
        "prefix": "../corpus2/p.png",
        "page": "../private/p.pdf#page=1",
        "shared": "../shared/p.png",
    }
    (tmp_path / "corpus2").mkdir()
    (tmp_path / "corpus2" / "p.png").write_bytes(picture("red"))
    write_jsonl(
        tmp_path / "corpus" / "c.jsonl", [{"id": i, "text": i, "image": f} for i, f in images.items()]
    )
    return tmp_path


@pytest.mark.parametrize("allowed", [False, True])
def test_pictures_outside_of_the_folder_of_their_corpus_are_shown_only_where_allowed(places, allowed, caplog):
    index = BM25Index.build(Corpus(places / "corpus" / "c.jsonl"), places / "index")
    folders = [places / "shared"] if allowed else []
    with TestClient(create_app(index, image_folders=folders)) as server:
        shown = {
            row["id"]: server.get(f"/v1/thumbnail/{row['id']}").status_code
            for row in map(json.loads, (places / "corpus" / "c.jsonl").read_text().splitlines())
        }
    assert {name for name, status in shown.items() if status == 200} == {
        *("in", "twin", "round"),
        *(["shared"] if allowed else []),
    }
    assert set(shown.values()) == {200, 404} and "--image_folders" in caplog.text


def test_what_names_no_token_or_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="image_folders: nowhere: no such folder"):
        ServeConfig("x", image_folders=["nowhere"])
    (tmp_path / "empty").write_text("")
    index = str(build_small_index(tmp_path))
    with pytest.raises(ConfigError, match=r"admin_token_file .*empty: must hold one word"):
        build_app(ServeConfig(index, admin_token_file=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("tokens", "guarded", "open_"),
    [
        ({"token": "t"}, {"/retrieve", "/v1/info", "/admin/reload"}, {"/healthz", "/readyz"}),
        ({"admin_token": "a"}, {"/admin/reload", "/admin/passages"}, {"/retrieve", "/v1/info", "/healthz"}),
        ({}, set(), {"/retrieve", "/admin/reload"}),
    ],
)
def test_the_description_tells_which_routes_need_a_token(tokens, guarded, open_):
    headers = {"X-API-Key": "t"}
    with TestClient(create_app(Stub(), **tokens)) as server:
        page = server.get("/openapi.json", headers=headers).json()
    needing = {
        path for path, each in page["paths"].items() if any("security" in route for route in each.values())
    }
    assert guarded <= needing and not open_ & needing
    assert ("securitySchemes" in page["components"]) == bool(tokens)
