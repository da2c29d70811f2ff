"""The search page in a headless browser: a person types, picks a backend and reads ranked passages."""

import json
import os
import shutil
import subprocess

import pytest
from PIL import Image

from data.corpus import Corpus
from data.jsonl import write_jsonl
from data.records import Hit, Passage
from retriever_server.indexes.flat import FlatIndex
from retriever_server.retriever import Retriever
from retriever_server.server.app import create_app
from retriever_server.server.backends import HotSwappable
from tests.retriever_server.running import serving
from tests.retriever_server.server.test_image_requests import Colours

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


class Named(Retriever):
    """Finds three passages with markup in them; fails on "fail"."""

    def __init__(self, generation: str) -> None:
        self.generation = generation

    def search(self, queries, k, where=None):
        if "fail" in queries:
            raise ZeroDivisionError("oops")
        texts = [f"<b>{i}</b> of {self.generation}" for i in range(min(k, 3))]
        return [[Hit(Passage(t, t, f"{q} {t}"), 1.0, self.generation) for t in texts] for q in queries]


class Browser:
    """Chromium at the other end of a pipe: JSON messages, each ended by a zero byte."""

    def __init__(self, profile) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def as_3_and_4() -> None:  # where Chromium expects them
            os.dup2(os.dup2(theirs_in, 30), 3)
            os.dup2(os.dup2(theirs_out, 40), 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *options, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=as_3_and_4,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self._number, self._rest, self._session = 0, b"", {}
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._in, 1 << 16)
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, script: str):
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        self.evaluate(
            f"new Promise((done, fail) => {{ const until = Date.now() + 30000; (function look() {{"
            f"if ({condition}) done(); else if (Date.now() > until) fail(document.body.innerText);"
            "else setTimeout(look, 20); })() })"
        )

    def type(self, text: str) -> None:
        self.evaluate("document.getElementById('query').select()")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.process.kill()
    browser.process.wait(timeout=20)


STATUS = "document.getElementById('status').textContent"
TITLES = "[...document.querySelectorAll('#hits h2')].map(title => title.textContent)"


def test_a_person_types_picks_a_backend_and_reads(browser):
    app = create_app({"bm25": HotSwappable(Named("g1")), "flat": HotSwappable(Named("g2"))})
    with serving(app) as url:
        browser.call("Page.navigate", url=url)
        browser.wait_for("document.getElementById('backend')?.options.length == 2")
        browser.type("river")
        browser.wait_for(f"{STATUS}.includes('from bm25 (g1)')")
        assert browser.evaluate(TITLES) == [f"{i + 1}. river <b>{i}</b> of g1" for i in range(3)]
        assert browser.evaluate("document.querySelectorAll('#hits b').length") == 0  # text, not markup
        browser.evaluate("document.getElementById('backend').value = 'flat'")
        browser.type("sea")
        browser.wait_for(f"{STATUS}.includes('from flat (g2)')")
        assert browser.evaluate(TITLES)[0] == "1. sea <b>0</b> of g2"
        browser.type("fail")
        browser.wait_for(f"{STATUS}.includes('ZeroDivisionError: oops')")
        assert browser.evaluate(TITLES) == []


def test_a_token_is_asked_for_where_one_is_needed(browser):
    with serving(create_app(Named("g1"), token="t")) as url:
        browser.call("Page.navigate", url=url)
        browser.wait_for("document.getElementById('token')?.hidden === false")
        browser.evaluate("document.getElementById('token').value = 't'")
        browser.type("river")
        browser.wait_for(f"{STATUS}.startsWith('3 passages')")


def test_pages_are_shown_and_a_picture_is_searched_with(browser, tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (400, 300), colour).save(tmp_path / f"{name}.png")
    write_jsonl(tmp_path / "c.jsonl", [{"id": n, "title": n, "image": f"{n}.png"} for n in ("red", "blue")])
    index = FlatIndex.build(Corpus(tmp_path / "c.jsonl"), tmp_path / "flat", Colours())
    with serving(
        create_app({"flat": HotSwappable(index), "text": HotSwappable(Named("g1"))}, token="t")
    ) as url:
        browser.call("Page.navigate", url=url)
        browser.wait_for("document.getElementById('token')?.hidden === false")
        browser.evaluate("document.getElementById('token').value = 't'")
        browser.type("red")
        browser.wait_for(f"{STATUS}.startsWith('2 passages')")
        browser.wait_for("[...document.querySelectorAll('#hits img')].every(i => i.naturalWidth == 400)")
        assert browser.evaluate(TITLES) == ["1. red", "2. blue"]
        assert browser.evaluate("document.getElementById('pick').hidden") is False
        browser.call("DOM.getDocument")
        place = browser.call("Runtime.evaluate", expression="document.getElementById('image')")["result"]
        browser.call("DOM.setFileInputFiles", files=[str(tmp_path / "blue.png")], objectId=place["objectId"])
        browser.wait_for("document.querySelector('#preview img')?.naturalWidth == 400")
        browser.type("nothing")
        browser.wait_for(f"{TITLES}[0] == '1. blue'")
        select = "document.getElementById('backend')"
        browser.evaluate(f"{select}.value = 'text'; {select}.dispatchEvent(new Event('change'))")
        assert browser.evaluate("document.getElementById('pick').hidden") is True
