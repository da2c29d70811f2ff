"""Several tools: search finds a passage, open_page reads the document that it is from."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
import yaml
from fastapi import FastAPI

from agent.environment import Environment
from agent.protocol import COMPACT, HERMES, PROTOCOLS, SEARCH_R1, Answer, Invalid
from agent.rollout import Agent
from agent.search_tool import TagSanitizer
from agent.tools import OPEN_PAGE, SEARCH, Call, Search
from agent.trajectory import Ledger, Segment, SegmentKind, StopReason
from agent.transcripts import from_record, to_record
from data.atlas.passages import render_passages
from data.atlas.world import load_world
from data.corpus import Corpus
from data.jsonl import read_jsonl, write_jsonl
from data.run_dir import read_metrics
from retriever_server.client.search_client import SearchClient, connect
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.open_retriever import open_retriever
from retriever_server.server.app import create_app
from scripts import __main__ as sleuth
from tests.fakes import DictSearcher, byte_tokenizer, question
from tests.retriever_server.running import serving
from tests.scripted import ScriptedEngine

BOTH = ("search", "open_page")
every_protocol = pytest.mark.parametrize(
    "protocol", [replace(each, tools=BOTH) for each in PROTOCOLS.values()], ids=PROTOCOLS
)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A part of the embedded world, its passages cut into sentences; questions about how they end."""
    folder = tmp_path_factory.mktemp("atlas")
    pages = render_passages(load_world())[:40]
    rows = [
        {"id": f"{page.id}#{i}", "title": page.title, "text": text}
        for page in pages
        for i, text in enumerate(page.text.split(". "))
    ]
    write_jsonl(folder / "corpus.jsonl", rows)
    BM25Index.build(Corpus(folder / "corpus.jsonl"), folder / "index", title_boost=3)
    asked = [
        {
            "id": page.id,
            "question": f"How does the page about {page.title} end?",
            "golden_answers": [page.text.rstrip(".").split()[-1]],
        }
        for page in pages[:6]
    ]
    write_jsonl(folder / "questions.jsonl", asked)
    return folder


def options(atlas, protocol="compact", **more):
    """Those that all commands take, as a recipe."""
    limits = {"max_turns": 3, "top_k": 1, "max_observation_tokens": 900, "max_context_tokens": 3000}
    return {
        "policy": "atlas",
        "retriever": str(atlas / "index"),
        "protocol": {"name": protocol, "tools": list(BOTH), "max_response_tokens": 200, **limits},
        "engine": {"class_path": "tests.page_reader.PageReader"},
        "device": "cpu",
        **more,
    }


def run(command, folder, recipe, *argv):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return sleuth.main([command, *argv, "--config", str(folder / "recipe.yaml")])


@pytest.mark.parametrize("protocol", ["search_r1", "hermes"])
def test_a_policy_that_opens_pages_is_evaluated(atlas, tmp_path, protocol):
    questions = str(atlas / "questions.jsonl")
    recipe = options(atlas, protocol, questions=questions, out=str(tmp_path / "out"))
    assert run("evaluate", tmp_path, recipe) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["em"]["mean"] == 1 and scores["valid_format_rate"] == 1
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["protocol"]["tools"] == list(BOTH)
    for record in read_jsonl(tmp_path / "out" / "trajectories.jsonl"):
        search, opened = record["searches"]
        assert "tool" not in search and (opened["tool"], opened["query"]) == ("open_page", "1")
        assert search["hits"][0]["text"] in opened["hits"][0]["text"].split("\n")
        assert opened["hits"][0]["title"] in record["question"]


def test_ask_shows_the_page(atlas, tmp_path, capsys):
    [first, *_] = read_jsonl(atlas / "questions.jsonl")
    assert run("ask", tmp_path, options(atlas), first["question"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[:-1]] == [
        *("thought", "search", "found", "thought", "open_page", "found", "thought", "answer")
    ]
    assert lines[-1] == first["golden_answers"]


def test_a_training_step_over_opened_pages(atlas, tmp_path):
    more = {"steps": 1, "rollout": {"questions_per_step": 2, "group_size": 2}}
    recipe = options(atlas, questions=str(atlas / "questions.jsonl"), out=str(tmp_path / "run"), **more)
    assert run("train", tmp_path, recipe) == 0
    [row] = read_metrics(tmp_path / "run")
    assert (row["reward/mean"], row["rollout/searches"], row["rollout/valid_format"]) == (1, 2, 1)
    [folder] = (tmp_path / "run" / "checkpoints").glob("step-*")
    record = json.loads((folder / "sleuth.json").read_text())
    assert record == {"protocol": "compact", "tools": list(BOTH)}
    evaluation = options(atlas, questions=str(atlas / "questions.jsonl"), out=str(tmp_path / "after"))
    evaluation["policy"], evaluation["protocol"] = str(folder), {"max_observation_tokens": 900}
    assert run("evaluate", tmp_path, evaluation) == 0  # the checkpoint remembers its tools
    assert json.loads((tmp_path / "after" / "scores.json").read_text())["searches_per_question"] == 2


def test_a_server_serves_the_same_document(atlas):
    retriever = open_retriever(str(atlas / "index"))
    client = SearchClient(retriever)

    async def document(searcher, place):
        async with searcher:
            return await searcher.document(place)

    [row, *_] = read_jsonl(atlas / "corpus.jsonl")
    here = asyncio.run(document(client, row["id"]))
    with serving(create_app(retriever)) as url:
        there = asyncio.run(document(connect(url), row["id"]))
        assert asyncio.run(document(connect(url), "nothing")) is None
    assert (there.id, there.title, there.text) == (here.id, here.title, here.text)
    assert len(here.text.split("\n")) > 1 and row["text"] in here.text
    assert asyncio.run(document(client, "nothing")) is None


def test_a_retriever_without_documents_is_refused_in_one_line(atlas, tmp_path, capsys):
    app = FastAPI()
    hit = {"document": {"id": "1", "contents": '"T"\nx'}, "score": 1.0}

    @app.post("/retrieve")
    def retrieve(body: dict[str, Any]) -> Any:
        return {"result": [[hit]] * len(body["queries"])}

    with serving(app) as url:
        recipe = options(atlas, retriever=url)
        assert run("ask", tmp_path, recipe, "Who?") == 2
    assert "open_page needs an index in this process or a Sleuth server of one" in capsys.readouterr().err


class Shelf(DictSearcher):
    """One document in three passages."""

    async def document(self, passage_id):
        found = next((p for p in self.retriever.passages if p.id == passage_id), None)
        return found and replace(found, text=f"whole of {found.title}")


def roll_out(protocol, turns, **kwargs):
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>")
    engine = ScriptedEngine(tokenizer, turns)
    agent = Agent(engine, tokenizer, Shelf({"Lyon": "fox one", "Rome": "fox two"}), protocol)
    [trajectory] = asyncio.run(agent.rollout([question()], **kwargs))
    return trajectory


@every_protocol
def test_a_page_is_opened_by_number_or_id_and_what_is_none_is_invalid(protocol):
    protocol = replace(protocol, top_k=2, max_turns=4)
    places = ["2", "0", "99"]
    turns = [protocol.render_turn("t", Search("fox"))]
    turns += [protocol.render_turn("t", Call("open_page", place)) for place in places]
    trajectory = roll_out(protocol, [*turns, protocol.render_turn("t", Answer("x"))])
    assert [(s.tool, s.query, [h.passage.title for h in s.hits]) for s in trajectory.searches] == [
        ("search", "fox", ["Lyon", "Rome"]),
        ("open_page", "2", ["Rome"]),
        ("open_page", "0", ["Lyon"]),  # no number, but an id
    ]
    assert trajectory.invalid_actions == 1 and trajectory.answer == "x" and trajectory.valid_format
    observations = [s.text for s in trajectory.segments if s.kind is SegmentKind.OBSERVATION]
    assert "whole of Rome" in observations[1] and observations[3] == protocol.invalid
    assert from_record(to_record(trajectory)) == trajectory
    for cut in range(len(trajectory.segments) + 1):
        segments = trajectory.segments[:cut]
        done = sum(segment.kind is SegmentKind.OBSERVATION for segment in segments)
        left = [*turns, protocol.render_turn("t", Answer("x"))][done:]
        again = roll_out(protocol, left, ledgers=[Ledger(segments, list(trajectory.searches))])
        assert again.token_ids == trajectory.token_ids and again.invalid_actions == 1


@every_protocol
def test_what_is_not_offered_is_neither_told_nor_an_action(protocol):
    alone = replace(protocol, tools=("search",))
    turn = protocol.render_turn("t", Call("open_page", "1"))
    assert protocol.parse(turn) == Call("open_page", "1") and protocol.is_well_formed(turn)
    assert isinstance(alone.parse(turn), Invalid) and not alone.is_well_formed(turn)
    assert "open_page" not in alone.prompt("Who?")
    assert ("open_page" in protocol.prompt("Who?")) is (protocol.name != "compact")
    assert protocol.prompt("{tools} {question}?").count("{tools} {question}?") == 1
    tags = TagSanitizer(protocol)("<open_page>1</open_page>")
    assert tags == ("<open_page>1</open_page>" if protocol.json_calls else "[open_page]1[/open_page]")


def test_arguments_follow_the_schema_of_the_tool():
    assert OPEN_PAGE.schema["properties"] == {"passage": {"type": ["string", "integer"]}}
    assert SEARCH.schema["required"] == ["query"]
    hermes = replace(HERMES, tools=BOTH)
    call = '<tool_call>{"name": "open_page", "arguments": {"passage": %s}}</tool_call>'
    assert hermes.parse(call % "2") == hermes.parse(call % '"2"') == Call("open_page", "2")
    for wrong in ("true", "[1]", "null", "1.5"):
        assert isinstance(hermes.parse(call % wrong), Invalid)


def test_an_environment_by_itself():
    tokenizer, ledger = byte_tokenizer(), Ledger()
    agent = Agent(ScriptedEngine(tokenizer, []), tokenizer, Shelf({"Lyon": "fox"}), COMPACT)
    world = (tokenizer, agent.searcher, agent.spoken, agent.frame, agent.sanitize, None)
    environment = Environment(*world, ledger)
    prompt = environment.reset(question())

    def step(turn):
        ledger.segments.append(Segment(SegmentKind.POLICY, tokenizer.encode(turn), turn))
        return asyncio.run(environment.step(COMPACT.parse(turn)))

    assert prompt.text == "Question: What is the capital of France?\n"
    assert "Lyon: fox" in step("<search>Lyon</search>").text
    assert environment.score() == {"em": 0, "f1": 0, "cover_em": 0}
    assert step("<answer>Paris</answer>") is StopReason.ANSWERED
    assert environment.score() == {"em": 1, "f1": 1, "cover_em": 1}


def test_an_unknown_tool_is_refused():
    with pytest.raises(ValueError, match=r"protocol.tools = .*'fly'\]: must be search, with or without"):
        replace(SEARCH_R1, tools=("search", "fly"))
