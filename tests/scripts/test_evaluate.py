"""`sleuth evaluate` on a tiny policy: files, resume, controls, a retriever that dies."""

import asyncio
import json
from pathlib import Path

import pytest

from agent.evaluation.compare import compare
from agent.evaluation.records import read_records
from agent.policy import Policy, load_policy
from agent.policy_folder import own_protocol
from agent.protocol import SEARCH_R1
from agent.rollout import Agent
from data.errors import DataError, EngineError
from data.jsonl import write_jsonl
from data.machine.lock import locked
from data.records import Question
from retriever_server.client.search_client import SearchClient
from rl.config import ProtocolConfig
from scripts import __main__ as sleuth
from scripts import wiring
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.running import build_small_index, running_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy that searches for `fox` whatever it is asked, an index, six questions."""
    folder = tmp_path_factory.mktemp("evaluated")
    tokenizer = byte_tokenizer()
    Policy(tiny_model("qwen2", len(tokenizer)), tokenizer).save(folder / "policy", "compact")
    build_small_index(folder)
    rows = [
        {"id": f"q{i}", "question": f"fox {i}?", "golden_answers": ["red"], "metadata": {"kind": f"k{i % 2}"}}
        for i in range(6)
    ]
    write_jsonl(folder / "questions.jsonl", rows)
    return folder


@pytest.fixture
def scripted(monkeypatch):
    """Wires an engine that searches once, then answers, in the place of the real one."""
    from tests.scripted import ScriptedEngine

    turns = ["<think> a </think><search> fox</search>", "<think> b </think><answer> red</answer>"]
    monkeypatch.setattr(
        "agent.engines.hf.HFEngine", lambda model, tokenizer, rows, **_: ScriptedEngine(tokenizer, turns)
    )


def evaluate(folder, out, *options, retriever=None):
    arguments = {
        "policy": folder / "policy",
        "questions": folder / "questions.jsonl",
        "retriever": retriever or folder / "index",
        "out": out,
    }
    argv = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    return sleuth.main(["evaluate", *argv, *options])


def records(out):
    return [json.loads(line) for line in (out / "trajectories.jsonl").read_text().splitlines()]


def test_scores_and_trajectories_are_written_and_shown(folder, scripted, tmp_path, capsys):
    assert evaluate(folder, tmp_path, "--limit", "5") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["n"], scores["em"]["mean"], scores["searches_per_question"]) == (5, 1, 1)
    assert {r["id"] for r in records(tmp_path)} == {f"q{i}" for i in range(5)}
    assert all("fox" in r["searches"][0]["hits"][0]["text"] for r in records(tmp_path))
    shown = capsys.readouterr().out
    assert "1.000 [1.000, 1.000]" in shown and "k1" in shown
    settings = json.loads((tmp_path / "evaluation.json").read_text())
    assert settings["protocol"]["name"] == "compact" and settings["retriever"].startswith("bm25-")


def test_a_real_engine_goes_through_and_stays_within_the_limits(folder, tmp_path):
    limits = ("--protocol.max_turns", "1", "--protocol.max_response_tokens", "6")
    assert evaluate(folder, tmp_path, *limits, "--max_rows", "4", "--temperature", "1") == 0
    for record in records(tmp_path):
        policy = [s["tokens"] for s in record["segments"] if s["kind"] == "policy"]
        assert len(policy) <= 2 and max(policy) <= 6


def test_answers_that_are_all_malformed_are_explained(folder, tmp_path, monkeypatch, capsys):
    from tests.scripted import ScriptedEngine

    monkeypatch.setattr(
        "agent.engines.hf.HFEngine", lambda model, tokenizer, rows, **_: ScriptedEngine(tokenizer, ["Red."])
    )
    out = tmp_path / "scores"
    assert evaluate(folder, out) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("no trajectory is in the form of protocol compact (valid format 0). Most likely")
    assert f"`sleuth warm-start --policy {folder}/policy --protocol compact" in said


def test_a_second_start_asks_only_what_is_missing(folder, scripted, tmp_path):
    evaluate(folder, tmp_path)
    whole = (tmp_path / "trajectories.jsonl").read_bytes()
    kept = whole.splitlines(keepends=True)[:4]
    (tmp_path / "trajectories.jsonl").write_bytes(b"".join(kept) + b'{"cut')
    assert evaluate(folder, tmp_path) == 0
    after = (tmp_path / "trajectories.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:4] == kept and len(after) == 6


@pytest.mark.slow
def test_an_evaluation_of_the_first_version_goes_on_on_its_own_text_only(folder, scripted, tmp_path, capsys):
    """Its evaluation.json of search_r1 says nothing of titles: they had no quotes."""
    for name in ("compact", "search_r1"):
        out, chosen = tmp_path / name, ("--protocol.name", name)
        evaluate(folder, out, *chosen, "--protocol.titles", "unquoted")
        protocol = json.loads((out / "evaluation.json").read_text())["protocol"]
        assert list(protocol) == ["name", "chat", "max_turns", "top_k", "max_response_tokens",
                                  "max_observation_tokens", "max_context_tokens"]  # fmt: skip
        (out / "scores.json").unlink()
        assert evaluate(folder, out, *chosen) == (2 if name == "search_r1" else 0)
        capsys.readouterr()
        assert evaluate(folder, out, *chosen, "--protocol.titles", "unquoted") == 0
    assert evaluate(folder, out, *chosen) == 2
    assert "protocol.titles: 'absent' -> 'quoted'" in capsys.readouterr().err


def test_an_evaluation_goes_on_as_on_the_day_it_began(folder, scripted, tmp_path, day):
    """And what the template is told is one of its settings."""
    policy = load_policy(str(folder / "policy"))
    policy.tokenizer.chat_template = "{{ strftime_now('%d %b') }}{{ tone }}: {{ messages[0].content }}"
    policy.save(tmp_path / "policy", "search_r1")
    told = ("--policy", f"{tmp_path / 'policy'}", "--protocol.chat_template_kwargs", '{"tone": "!"}')
    day(2026, 11, 29)
    assert evaluate(folder, tmp_path / "out", *told) == 0
    path = tmp_path / "out" / "trajectories.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    day(2026, 12, 1)
    assert evaluate(folder, tmp_path / "out", *told) == 0
    prompts = [record["segments"][0]["text"] for record in records(tmp_path / "out")]
    assert len(prompts) == 6 and all(prompt.startswith("29 Nov!: Answer") for prompt in prompts)
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert settings["protocol"]["chat_template_kwargs"] == {"tone": "!"}


def test_a_word_that_the_template_does_not_read_is_refused_before_the_weights_are_read(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("agent.policy.load_policy", None)
    told = ("--protocol.name", "search_r1", "--protocol.chat_template_kwargs", '{"enable_thinking": false}')
    assert evaluate(folder, tmp_path, *told) == 2
    assert "chat_template_kwargs: there is no chat template" in capsys.readouterr().err


def test_other_weights_are_another_evaluation(folder, scripted, tmp_path, capsys):
    evaluate(folder, tmp_path)
    other = tmp_path / "moved"
    (other / "policy").mkdir(parents=True)
    tokenizer = byte_tokenizer()
    Policy(tiny_model("qwen2", len(tokenizer), seed=1), tokenizer).save(folder / "policy", "compact")
    assert evaluate(folder, tmp_path, "--protocol.name", "compact") == 2
    assert "holds another evaluation (weights:" in capsys.readouterr().err
    Policy(tiny_model("qwen2", len(tokenizer)), tokenizer).save(folder / "policy", "compact")


def test_a_policy_by_another_spelling_of_its_path_is_the_same_evaluation(
    folder, scripted, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder)
    for policy in ("policy", str(folder / "policy"), "../" + folder.name + "/policy/"):
        assert evaluate(folder, tmp_path, "--policy", policy) == 0


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(folder, scripted, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years")
    assert evaluate(folder, tmp_path) == 2
    assert f"{tmp_path}: holds other files (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert evaluate(folder, tmp_path / "thesis.tex" / "out") == 2
    assert f"{tmp_path}/thesis.tex/out: cannot be written: Not a directory" in capsys.readouterr().err
    assert evaluate(folder, Path("/proc/x")) == 2
    assert "/proc/x: cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize(("control", "hits"), [("none", 0), ("random", 1)])
def test_controls_search_without_finding(folder, scripted, tmp_path, control, hits):
    retriever = f"random:{folder / 'index'}" if control == "random" else control
    assert evaluate(folder, tmp_path, retriever=retriever) == 0
    assert {len(r["searches"][0]["hits"]) for r in records(tmp_path)} == {hits}
    assert json.loads((tmp_path / "evaluation.json").read_text())["retriever"].startswith(control)


@pytest.mark.slow
def test_the_same_index_behind_another_port_is_the_same_evaluation(folder, scripted, tmp_path, capsys):
    for _ in range(2):
        with running_server(folder / "index") as server:
            assert evaluate(folder, tmp_path, retriever=server.url) == 0


def test_a_retriever_that_is_down_is_one_line_after_the_deadline(folder, scripted, tmp_path, capsys):
    options = ("--deadline_seconds", "0.3")
    assert evaluate(folder, tmp_path, *options, retriever="http://127.0.0.1:9") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sleuth: http://127.0.0.1:9: gave up after")


def test_a_retriever_that_dies_stops_the_evaluation_which_then_goes_on(
    folder, scripted, tmp_path, monkeypatch, capsys
):
    with running_server(folder / "index") as server:
        search, asked = SearchClient.search, []

        async def dies(self, query, k):
            asked.append(query)
            if len(asked) == 4:  # the probe and two questions were answered
                server.process.kill()
                server.process.wait()
            return await search(self, query, k)

        monkeypatch.setattr(SearchClient, "search", dies)
        options = ("--max_rows", "1", "--deadline_seconds", "0.5")
        monkeypatch.setattr(wiring, "Agent", lambda *a, **kw: Agent(*a, **{**kw, "max_live": 1}))
        assert evaluate(folder, tmp_path, *options, retriever=server.url) == 2
    error = capsys.readouterr().err
    assert "searches failed for 1 of 3 questions asked" in error and "go on" in error
    assert not (tmp_path / "scores.json").exists()
    monkeypatch.setattr(SearchClient, "search", search)
    assert evaluate(folder, tmp_path) == 0
    assert [r["stop_reason"] for r in records(tmp_path)] == ["answered"] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol.name", "xml"], "protocol = 'xml': must be one of search_r1, compact, hermes"),
        (["--protocol.top_k", "0"], "protocol.top_k = 0: must be >= 1"),
        (["--temperature", "-1"], "sampling.temperature = -1.0: must be >= 0"),
        (["--max_failed_share", "2"], "max_failed_share = 2.0: must be in [0, 1]"),
    ],
)
def test_a_wrong_value_is_refused_before_a_model_loads(
    folder, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.setattr("agent.policy.load_policy", None)
    assert evaluate(folder, tmp_path, *options) == 2
    assert capsys.readouterr().err.endswith(f"sleuth: {message}\n")


def test_the_protocol_is_the_folders_own_unless_another_is_named(folder, tmp_path):
    policy = str(folder / "policy")
    assert wiring.make_protocol(ProtocolConfig(), policy).name == "compact"
    assert wiring.make_protocol(ProtocolConfig(name="hermes", top_k=7), policy).top_k == 7
    assert own_protocol(str(tmp_path)) == own_protocol("org/name") == SEARCH_R1
    (tmp_path / "sleuth.json").write_text("[]")
    with pytest.raises(DataError, match=r"sleuth.json: must be like"):
        own_protocol(str(tmp_path))


def test_a_failure_inside_a_rollout_is_raised_as_it_is():
    class Broken:
        async def generate(self, *_):
            raise EngineError("out of memory")

        async def release(self, trajectory_id):
            pass

    agent = Agent(Broken(), byte_tokenizer(), None, wiring.get_protocol("compact"))
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(agent.rollout([Question(str(i), "?", ()) for i in range(3)]))


@pytest.mark.parametrize(("normalizer", "f1"), [(None, 0.0), ("unicode", 0.8)])
def test_answers_of_a_script_without_spaces_are_compared_as_told(
    folder, monkeypatch, tmp_path, normalizer, f1
):
    from tests.scripted import ScriptedEngine

    turns = ["<think> b </think><answer> 東京都</answer>"]
    monkeypatch.setattr(
        "agent.engines.hf.HFEngine", lambda model, tokenizer, rows, **_: ScriptedEngine(tokenizer, turns)
    )
    write_jsonl(tmp_path / "ja.jsonl", [{"id": "1", "question": "首都は?", "golden_answers": ["東京"]}])
    options = ["--questions", str(tmp_path / "ja.jsonl")] + (
        ["--normalizer", normalizer] if normalizer else []
    )
    assert evaluate(folder, tmp_path / "out", *options) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["f1"]["mean"] == pytest.approx(f1) and scores["em"]["mean"] == 0


# ---- samples, judge, controls ------------------------------------------------------------------


def test_several_samples_are_asked_of_each_question_and_only_at_a_temperature(
    folder, scripted, tmp_path, capsys
):
    assert evaluate(folder, tmp_path / "out", "--samples", "2") == 2
    assert "temperature = 0.0: must be > 0 for 2 samples" in capsys.readouterr().err
    assert evaluate(folder, tmp_path / "out", "--samples", "2", "--temperature", "1", "--limit", "3") == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["n"], scores["samples"], scores["pass"]["2"]["mean"]) == (3, 2, 1.0)
    assert {r["id"] for r in records(tmp_path / "out")} == {f"q{i}{n}" for i in range(3) for n in ("", "~2")}


def test_the_judge_is_asked_of_each_answer_and_scores_say_who_it_was(folder, scripted, tmp_path, capsys):
    from tests.agent.evaluation.test_judge import Server

    server = Server()
    server.reply = "NO"
    try:
        assert evaluate(folder, tmp_path / "out", "--judge.url", server.url, "--judge.model", "m") == 0
    finally:
        server.http.shutdown()
        server.http.server_close()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["em"]["mean"], scores["judge"]["mean"], scores["verdicts"]) == (1, 0, {"incorrect": 6})
    verdict = json.loads((tmp_path / "out" / "judgements.jsonl").read_text().splitlines()[0])
    assert (verdict["model"], verdict["rubric"], verdict["reply"]) == ("m", "yes_no", "NO")
    assert len(verdict["prompt"]) == 16 and "judge" in capsys.readouterr().out


def test_answers_that_a_judge_did_not_judge_are_counted_with_the_reason(folder, scripted, tmp_path, capsys):
    from tests.agent.evaluation.test_judge import Server

    server = Server()
    server.reply = lambda request: "YES" if "fox 0?" in request["messages"][0]["content"] else "Perhaps"
    try:
        assert evaluate(folder, tmp_path / "out", "--judge.url", server.url) == 0
    finally:
        server.http.shutdown()
        server.http.server_close()
    out = capsys.readouterr().out
    assert "5 not judged" in out and "5 answers could not be judged (judge" in out and "'Perhaps'" in out
    runs = dict.fromkeys("ab", read_records(tmp_path / "out"))
    assert "judge" not in compare(runs)["measures"]  # only where all have a verdict


def test_a_folder_that_another_process_evaluates_into_is_refused(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock", "another"):
        assert evaluate(folder, tmp_path / "out") == 2
    assert "out is being written by process" in capsys.readouterr().err


def test_controls_are_evaluations_of_their_own_and_compared_with_the_run(folder, scripted, tmp_path, capsys):
    assert evaluate(folder, tmp_path / "out", "--controls", "orakel") == 2
    assert "controls: 'orakel'" in capsys.readouterr().err
    options = ("--controls", "true,max_searches_0", "--limit", "2")
    assert evaluate(folder, tmp_path / "out", *options) == 0
    out = capsys.readouterr().out
    assert (
        "closed_book" in out and "no control oracle: it needs --corpus" in out and "answer_in_question" in out
    )
    written = json.loads((tmp_path / "out" / "controls.json").read_text())
    assert set(written["controls"]) == {"closed_book", "random", "single_search", "max_searches_0"}
    assert written["controls"]["closed_book"]["difference"]["mean"] == 0
    closed = records(tmp_path / "out" / "controls" / "closed_book")
    assert all(not r["searches"][0]["hits"] for r in closed)
    assert evaluate(folder, tmp_path / "out", *options) == 0  # all is there


def test_run_files_are_written_beside(folder, scripted, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert evaluate(folder, tmp_path / "out", "--limit", "2", "--run_files", str(tmp_path / "file")) == 2
    assert "is a file, must be a folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert evaluate(folder, tmp_path / "out", "--limit", "2", "--run_files", str(tmp_path / "runs")) == 0
    assert len(list((tmp_path / "runs").glob("run_q*.json"))) == 2
