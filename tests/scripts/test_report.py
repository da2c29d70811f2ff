"""report.html: complete, harmless whatever a passage says, and alive in a real browser."""

import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from agent.evaluation.compare import paired_difference
from agent.evaluation.measures import evaluation_record
from agent.evaluation.records import read_records
from agent.evaluation.report.choice import Choice
from agent.evaluation.report.page import render_report, write_report
from agent.evaluation.scores import score
from agent.protocol import COMPACT, HERMES, SEARCH_R1
from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.errors import DataError
from data.jsonl import write_json, write_jsonl
from data.records import Hit, Passage, Question
from data.run_dir import RunDir
from scripts.__main__ import main as sleuth
from tests.vision import draw_pages

EVIL = "</script><script>document.title='broken out'</script><img src=x onerror=\"document.title='x'\">&amp;"
KINDS = ("one_hop", "two_hop", "comparison")


def make_question(i):
    kind = KINDS[i % 3]
    text = f"What is the capital of land {i}" if kind == "one_hop" else f"Who borders the land of city {i}"
    return Question(
        f"test-{i}", text, (f"City {i}", f"The City {i}"), {"kind": kind, "cluster": f"land{i // 2}"}
    )


def policy(text):
    return Segment(SegmentKind.POLICY, list(range(len(text) // 4)), text, None)


def make_trajectory(question, correct, searches=1, protocol=COMPACT):
    """A trajectory as `agent/rollout.py` makes it, with whole turns, hits and observations."""
    segments = [Segment(SegmentKind.PROMPT, [1], protocol.prompt(question.text))]
    records = []
    for turn in range(searches):
        query = f'land "{question.id}" {turn}'
        inside = (
            json.dumps({"name": "search", "arguments": {"query": query}}) if protocol is HERMES else query
        )
        tag = protocol.search_tag
        segments.append(policy(f"<think>I look for part {turn + 1}.</think><{tag}>{inside}</{tag}>"))
        passages = [
            Passage(f"p{question.id}-{i}", f"Land {i} has a capital city and many rivers. " * 3, f"Land {i}")
            for i in range(turn, turn + protocol.top_k)
        ]
        observation = protocol.render_observation(protocol.render_passages(passages))
        segments.append(Segment(SegmentKind.OBSERVATION, [2], observation))
        records.append(SearchRecord(query, [Hit(p, 9.5 - i, "gen1") for i, p in enumerate(passages)], 0.002))
    answer = question.gold_answers[0] if correct else f"Nowhere {question.id}"
    segments.append(policy(f"<think>So it is this.</think><answer>{answer}</answer>"))
    return Trajectory(question, segments, StopReason.ANSWERED, answer, records, valid_format=True)


def odd_trajectories():
    """One of each kind of failure, in this order: malformed, no answer, failed search, hostile text."""
    a, b, c, d = (make_question(9000 + i) for i in range(4))
    prompt = Segment(SegmentKind.PROMPT, [1], "Question: ...")
    malformed = [
        prompt,
        policy("loose words <think>never closed <search>half"),
        Segment(SegmentKind.OBSERVATION, [2], COMPACT.invalid),
        policy("<answer>x"),
    ]
    failed = SearchRecord("q", [], 1.0, "RetrieverUnavailable: nobody answers")
    hostile = make_trajectory(replace(d, text=f"Who? {EVIL}", gold_answers=(EVIL, "gold")), True)
    hit = Hit(Passage("evil", EVIL, EVIL), 1.0, "gen1")
    hostile = replace(hostile, searches=[replace(hostile.searches[0], hits=[hit])])
    return [
        Trajectory(a, malformed, StopReason.TURN_LIMIT, None, [], 2),
        Trajectory(b, [prompt, policy("<think>hm")], StopReason.TOKEN_LIMIT, None),
        Trajectory(c, [prompt, policy("<search>q</search>")], StopReason.SEARCH_FAILED, None, [failed]),
        hostile,
    ]


def make_run(path, count=60, protocol=COMPACT, steps=40):
    """A finished run with two evaluations of the same questions; `after` is better on two hops."""
    chance = random.Random(0)
    notes = ["Copying is wired in by initialisation: <b>layer 0</b> looks one token back."]
    with RunDir(path, {"algorithm": {"learning_rate": 5e-4}, "note": EVIL}, notes=notes) as run:
        for step in range(steps):
            rise = 1 - 0.97**step
            metrics = {"reward/mean": 0.1 + 0.6 * rise, "rollout/em": 0.1 + 0.62 * rise}
            metrics |= {"rollout/searches": 1 + rise, "policy/entropy": 1.2 - rise, "policy/kl": float("nan")}
            metrics |= {"policy/grad_norm": 0.5, "policy/clip_fraction": 0.02, "stops/answered": 0.9}
            run.log(step, {key: value + chance.gauss(0, 0.02) for key, value in metrics.items()})
            if step % 10 == 9:
                run.log(step, {"dev/em": 0.1 + 0.6 * rise})
    questions = [make_question(i) for i in range(count)]
    for name, two_hop, searches in (("before", 0.02, 1), ("after", 0.65, 2)):
        items = []
        for question in questions:
            one_hop = question.metadata["kind"] == "one_hop"
            correct = chance.random() < (0.72 if one_hop else two_hop)
            items.append(make_trajectory(question, correct, 1 if one_hop else searches, protocol))
        write_evaluation(path / "evaluations" / name, items + odd_trajectories())
    write_json(path / "phases.json", {"seconds": {"warm start": 130.25, "train": 305.0, "evaluate": 41.0}})
    return path


def write_evaluation(folder, items):
    write_jsonl(folder / "trajectories.jsonl", [evaluation_record(item) for item in items])
    write_json(folder / "scores.json", score(items))


class Page(HTMLParser):
    """The elements and texts of a page as a browser's parser would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.data = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and not self.data:
            self.data = data
        self.text.append(data)


# ---- without a browser --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("finished") / "run")


def test_the_command_writes_one_file_that_fetches_nothing(finished, capsys):
    assert sleuth(["report", str(finished)]) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    html = (finished / "report.html").read_text()
    page = Page(html)
    targets = {value for name, value in page.attributes if name in ("src", "href", "srcset")}
    assert targets == {"data:,"}
    assert "default-src 'none'" in html and "@import" not in html and "url(" not in html


def test_the_table_shows_the_scores_and_the_paired_difference(finished):
    html = render_report(finished)
    before, after = (read_records(finished / "evaluations" / name) for name in ("before", "after"))
    for records in (before, after):
        em = score(records)["em"]
        assert f"<b>{em['mean']:.3f}</b> <small>[{em['low']:.3f}, {em['high']:.3f}]</small>" in html
    by_kind = paired_difference(before, after)["by_kind"]["two_hop"]["em"]
    assert (
        f"{by_kind['mean']:+.3f}</b> <small>[{by_kind['low']:+.3f}, {by_kind['high']:+.3f}]</small>" in html
    )
    assert "2 min 10 s" in html and "&lt;b&gt;layer 0&lt;/b&gt;" in html


def test_no_text_breaks_out_of_the_page(finished):
    page = Page(render_report(finished))
    assert page.tags.count("script") == 2 and "img" not in page.tags
    payload = json.loads(page.data)
    hostile = next(q for q in payload["questions"] if q["id"] == "test-9003")
    assert hostile["text"] == f"Who? {EVIL}" and hostile["gold"][0] == EVIL
    assert ["evil", EVIL, EVIL] in payload["passages"]


@pytest.mark.parametrize("protocol", [COMPACT, SEARCH_R1, HERMES], ids=lambda p: p.name)
def test_each_search_stands_behind_the_turn_that_asked_it(tmp_path, protocol):
    items = [make_trajectory(make_question(1), True, searches=2, protocol=protocol)]
    RunDir(tmp_path, {}).close()
    write_evaluation(tmp_path / "evaluations" / "x", items)
    payload = json.loads(Page(render_report(tmp_path)).data)
    parts = payload["questions"][0]["runs"][0]["parts"]
    assert [kind for kind, _ in parts] == ["policy", "search", "policy", "search", "policy"]
    assert [c["query"] for k, c in parts if k == "search"] == [s.query for s in items[0].searches]
    assert payload["texts"] == [protocol.prompt("{question}")]


def test_passages_are_stored_once_and_the_page_stays_small(tmp_path):
    make_run(tmp_path, count=200, steps=3)
    html = render_report(tmp_path)
    assert len(html.encode()) < 850_000
    assert json.loads(Page(html).data)["left_out"] == 0 and html.count('"ptest-1-0"') == 1


def test_a_page_that_would_be_too_big_says_what_it_leaves_out(tmp_path):
    make_run(tmp_path, count=100, steps=3)
    html = render_report(tmp_path, Choice(megabytes=0.06))
    payload = json.loads(Page(html).data)
    assert payload["left_out"] > 0 and len(payload["questions"]) + payload["left_out"] == 104
    assert len(json.dumps(payload)) < 70_000


def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path):
    RunDir(tmp_path, {}).close()
    html = write_report(tmp_path).read_text()
    assert "No evaluation yet" in html
    assert json.loads(Page(html).data)["metrics"] == {}


def test_an_unfinished_evaluation_is_marked_and_not_compared(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "evaluations" / "after"
    (folder / "scores.json").unlink()
    path = folder / "trajectories.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:30]) + '{"id": "cut')
    html = render_report(tmp_path)
    assert "unfinished" in html and "No paired difference: after: missing 34 questions" in html


def test_what_is_no_run_or_malformed_is_a_one_line_error(finished, tmp_path, capsys):
    assert sleuth(["report", str(tmp_path / "absent")]) == 2
    assert "is no run folder" in capsys.readouterr().err
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    scores = tmp_path / "evaluations" / "after" / "scores.json"
    for wrong in ([], {"em": {"mean": 1.0}}):
        kept = scores.read_text()
        write_json(scores, wrong)
        with pytest.raises(DataError, match=r"after/scores\.json: holds no scores"):
            render_report(tmp_path)
        scores.write_text(kept)
    (tmp_path / "phases.json").write_text('{"seconds": 3}')
    with pytest.raises(DataError, match=r"phases\.json: must be"):
        render_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\nno\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        render_report(tmp_path)


# ---- in a browser -------------------------------------------------------------------------------


def chromium(tmp_path, url, *arguments):
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium: apt-get install chromium")
    flags = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync enable-logging=stderr virtual-time-budget=5000"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [binary, "--headless", *(f"--{flag}" for flag in flags.split()), profile, *arguments, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = re.findall(r"CONSOLE.*", done.stderr)
    assert not console, f"the page complains: {console}"
    return done.stdout


@pytest.fixture(scope="module")
def report(finished):
    return write_report(finished)


def dom(tmp_path, report, fragment=""):
    return chromium(tmp_path, f"file://{report}{fragment}", "--dump-dom")


def rows(html):
    return re.findall(r'class="row" role="option" id="row-\d+" data-id="([^"]+)"', html)


@pytest.mark.slow
def test_in_a_browser_curves_and_all_trajectories_are_drawn(tmp_path, report):
    html = dom(tmp_path, report)
    assert len(rows(html)) == 64
    assert "64 of 64 questions" in html
    curves = re.findall(r'<figure data-metric="([^"]+)">', html)
    assert curves[:3] == ["reward/mean", "rollout/em", "dev/em"] and "stops/answered" in curves
    assert "policy/kl" not in curves  # it was never a number
    drawn = re.findall(r'<path class="raw[^"]*" d="M([^"]+)"', html)
    assert len(drawn) == len(curves) and drawn[0].count("L") == 39 and "NaN" not in html
    assert html.count('class="run" data-eval=') == 2


@pytest.mark.slow
def test_in_a_browser_the_address_filters_the_list(tmp_path, report):
    records = read_records(report.parent / "evaluations" / "before")
    wrong = [r["id"] for r in records if r["metadata"]["kind"] == "two_hop" and not r["em"]]
    html = dom(tmp_path, report, "#eval=before&verdict=wrong&kind=two_hop")
    assert rows(html) == wrong and wrong
    after = {r["id"]: r["em"] for r in read_records(report.parent / "evaluations" / "after")}
    fixed = [r["id"] for r in records if not r["em"] and after[r["id"]]]
    assert rows(dom(tmp_path, report, "#verdict=fixed")) == fixed and fixed
    assert rows(dom(tmp_path, report, "#stop=search_failed")) == ["test-9002"]
    assert rows(dom(tmp_path, report, "#text=nowhere+test-7&id=test-7"))[0] == "test-7"
    assert "No trajectory matches" in dom(tmp_path, report, "#text=no+such+words")


@pytest.mark.slow
def test_in_a_browser_thoughts_searches_passages_and_answers_are_told_apart(tmp_path, report):
    html = dom(tmp_path, report, "#id=test-1")
    detail = html[html.index('id="detail"') :]
    for name in ("think", "search", "passages", "answer (?:right|wrong)"):
        assert re.search(rf'<div class="block {name}"><span class="label">', detail), name
    malformed = dom(tmp_path, report, "#id=test-9000")
    for words in ("thought (never closed)", "search (never closed)", "told by the protocol", "none given"):
        assert words in malformed


@pytest.mark.slow
def test_in_a_browser_hostile_text_stays_text(tmp_path, report):
    html = dom(tmp_path, report, "#id=test-9003")
    assert "<title>run · Sleuth</title>" in html and "<img" not in html
    assert "&lt;/script&gt;&lt;script&gt;" in html


USE = """
const send = (node, name, more) => node.dispatchEvent(
  new (more?.key ? KeyboardEvent : PointerEvent)(name, {bubbles: true, ...more}));
const selected = () => document.querySelector('[aria-selected="true"]').dataset.id;
const results = [selected()], active = () => byId("list").getAttribute("aria-activedescendant");
for (const key of ["ArrowDown", "j", "ArrowUp"]) {
  send(byId("list"), "keydown", {key});
  results.push(selected());
}
results.push(location.hash);
const plot = document.querySelector("figure svg"), box = plot.getBoundingClientRect();
send(plot, "pointermove", {clientX: box.right - 1, clientY: box.top + 5});
results.push(document.querySelector("figure output").textContent.split(":")[0]);
results.push(byId("curves").className);
byId("smooth").click();
results.push(byId("curves").className);
const kind = document.querySelector("[name=kind]"); kind.value = "comparison"; send(kind, "input");
results.push(location.hash, shown.every((question) => question.kind === "comparison"));
send(document.querySelector("#detail summary"), "keydown", {key: "ArrowUp"});
results.push(document.activeElement.id, active()); state.text = "no such words"; renderList();
results.push(active()); document.title = JSON.stringify(results);
"""


@pytest.mark.slow
def test_in_a_browser_keys_filters_pointer_and_smoothing_work(tmp_path, report):
    html = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text())  # it would refuse our script, rightly
    acted = tmp_path / "acted.html"
    acted.write_text(html.replace("</body>", f"<script>{USE}</script></body>"))
    found = re.search("<title>(.*?)</title>", chromium(tmp_path, f"file://{acted}", "--dump-dom"))
    assert found and json.loads(unescape(found[1])) == [
        *("test-0", "test-1", "test-2", "test-1"),
        "#id=test-1",
        "step 39",
        "smoothing",
        "",
        "#kind=comparison&id=test-2",
        *(True, "list", "row-0", ""),
    ]


@pytest.mark.slow
def test_in_a_browser_the_page_runs_no_script_but_its_own(tmp_path, report):
    forged = tmp_path / "forged.html"
    forged.write_text(
        report.read_text().replace("</body>", "<script>document.title = 'forged'</script></body>")
    )
    with pytest.raises(AssertionError, match="Content Security Policy"):
        dom(tmp_path, forged)


@pytest.mark.slow
def test_in_a_browser_an_empty_run_has_no_errors(tmp_path):
    RunDir(tmp_path / "run", {}).close()
    html = dom(tmp_path, write_report(tmp_path / "run"))
    assert "No metrics yet" in html and "No trajectories yet" in html


SEEN = """
const all = (choice) => [...document.querySelectorAll(choice)];
all("#detail .gold, #detail h3, #detail .body").map((each) => each.append("x".repeat(999)));
const ends = all("html, .results td b").map((e) => Math.max(e.scrollWidth, e.getBoundingClientRect().right));
parent.postMessage(`${Math.max(...ends) <= innerWidth} at ${innerWidth}`, "*");"""


@pytest.mark.slow
def test_in_a_browser_on_a_phone_figures_are_in_sight_and_long_words_are_broken(tmp_path, report):
    html = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text())
    (tmp_path / "page.html").write_text(html.replace("</body>", f"<script>{SEEN}</script></body>"))
    told = "<title></title><script>onmessage = (event) => { document.title = event.data; };</script>"
    (phone := tmp_path / "phone.html").write_text(f'{told}<iframe src="page.html" width="390"></iframe>')
    assert "<title>true at 390</title>" in dom(tmp_path, phone)


def test_a_page_that_was_found_is_shown_small_and_a_lost_one_by_its_text(tmp_path):
    there, lost = draw_pages(tmp_path / "pages", 1)[0], str(tmp_path / "lost.png")
    trajectory = make_trajectory(make_question(0), True)
    hits = [Hit(Passage(str(i), "text", "T", image=image), 1.0, "g") for i, image in enumerate([there, lost])]
    trajectory = replace(trajectory, searches=[replace(trajectory.searches[0], hits=hits)])
    RunDir(tmp_path / "run", {}).close()
    write_evaluation(tmp_path / "run" / "evaluations" / "after", [trajectory])
    page = render_report(tmp_path / "run")
    found = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["passages"]
    assert [len(row) for row in found] == [4, 3]
    assert found[0][3].startswith("data:image/jpeg;base64,") and str(tmp_path) not in page
