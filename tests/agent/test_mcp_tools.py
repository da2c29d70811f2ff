"""Tools of MCP servers: a peer over stdio that behaves well and badly, and our own server over HTTP."""

import asyncio
import json
import re
import sys
from dataclasses import replace

import pytest
import yaml
from mcp.types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)

from agent.mcp_tools import McpConfig, McpServer, read_result
from agent.protocol import COMPACT, HERMES, PROTOCOLS, Answer, Invalid
from agent.rollout import Agent
from agent.tools import Call, Search
from agent.trajectory import SegmentKind, StopReason
from data.errors import ConfigError, ToolUnavailable
from data.jsonl import read_jsonl, write_jsonl
from data.run_dir import read_metrics
from retriever_server.open_retriever import open_retriever
from retriever_server.server.app import create_app
from scripts import __main__ as sleuth
from tests import mcp_server
from tests.fakes import DictSearcher, byte_tokenizer, question
from tests.retriever_server.running import build_small_index, serving
from tests.scripted import ScriptedEngine

PEER = f"{sys.executable} -m tests.mcp_server"
USED = ("add", "slow", "huge", "fail")


@pytest.fixture(scope="module")
def address():
    """The peer in a thread of this process, by HTTP: a process of its own takes a second to start."""
    with serving(mcp_server.server.streamable_http_app(json_response=True, stateless_http=True)) as url:
        yield f"{url}/mcp"


@pytest.fixture(scope="module")
def peer(address):
    """Its tools with limits of a test; connections are opened again in each event loop."""
    return McpServer(McpConfig(address, USED, timeout_seconds=20, max_calls=2, max_bytes=1000))


@pytest.fixture(scope="module")
def mortal():
    """The peer over stdio, which can die."""
    return McpServer(McpConfig(PEER, ("add", "slow", "die"), timeout_seconds=20, max_calls=2))


def speaking(protocol, server, **limits):
    limits = {
        "max_turns": 4,
        "max_observation_tokens": 2000,
        "max_context_tokens": 9000,
        "max_response_tokens": 300,
    } | limits
    return replace(protocol, servers=(server,), tools=("search", *server.names), **limits)


def roll_out(protocol, actions):
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>")
    turns = [a if isinstance(a, str) else protocol.render_turn("t", a) for a in actions]
    agent = Agent(ScriptedEngine(tokenizer, turns), tokenizer, DictSearcher({"Lyon": "fox"}), protocol)
    [trajectory] = asyncio.run(agent.rollout([question()]))
    return trajectory, [s.text for s in trajectory.segments if s.kind is SegmentKind.OBSERVATION]


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_what_a_tool_returns_is_an_observation(peer, protocol):
    spoken = speaking(protocol, peer)
    calls = [Call("add", '{"a": 2, "b": 3}'), Call("fail", "no luck"), Search("fox"), Call("add", "{}")]
    trajectory, read = roll_out(spoken, [*calls, Answer("5")])
    assert "the sum is 5 [/" in read[0] or "the sum is 5 </information>[" in read[0]  # it cannot speak for us
    assert "no luck" in read[1] and "fox" in read[2]
    assert read[3] == protocol.invalid  # a third call is one too many
    assert (trajectory.answer, trajectory.invalid_actions, trajectory.valid_format) == ("5", 1, True)
    assert [(s.tool, len(s.hits)) for s in trajectory.searches] == [("add", 1), ("fail", 1), ("search", 1)]


def test_arguments_that_are_none_are_an_invalid_action(peer):
    spoken = speaking(HERMES, peer)
    call = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
    assert spoken.parse(call % ("slow", "1")) == spoken.parse(call % ("slow", '{"second": 1}'))
    assert spoken.parse(call % ("slow", '{"seconds": 1}')) == Call("slow", "1")
    assert isinstance(spoken.parse(call % ("unknown", "{}")), Invalid)
    assert isinstance(spoken.parse(call % ("add", "[1]")), Invalid)
    tags = speaking(COMPACT, peer)
    assert isinstance(tags.parse("<add> two and two </add>"), Invalid)
    _, [read] = roll_out(tags, ["<add>{}</add>", Answer("x")])
    assert read == COMPACT.invalid or "validation" in read


def test_a_result_is_cut_and_the_budget_holds(peer):
    trajectory, [read] = roll_out(speaking(COMPACT, peer), [Call("huge", "é"), Answer("x")])
    assert trajectory.searches[0].hits[0].passage.text == "é" * 500
    _, [read] = roll_out(
        speaking(COMPACT, peer, max_observation_tokens=100), [Call("huge", "a"), Answer("x")]
    )
    assert len(read) <= 100


@pytest.mark.slow
def test_a_server_that_died_is_started_again(mortal, tmp_path):
    spoken = speaking(COMPACT, mortal)
    trajectory, [read] = roll_out(spoken, [Call("die", str(tmp_path / "once")), Answer("x")])
    assert "alive" in read and trajectory.answer == "x"


@pytest.mark.slow
def test_trajectories_share_a_server_that_dies_under_them(mortal, tmp_path):
    spoken = speaking(COMPACT, mortal)
    tokenizer = byte_tokenizer()
    turns = [spoken.render_turn("t", Call("die", str(tmp_path / "once"))), "<answer>x</answer>"]
    agent = Agent(ScriptedEngine(tokenizer, turns), tokenizer, DictSearcher({}), spoken)
    trajectories = asyncio.run(agent.rollout([question()] * 8))
    assert {t.searches[0].hits[0].passage.text for t in trajectories} == {"alive"}


@pytest.mark.slow
def test_a_server_that_does_not_answer_ends_the_trajectory_after_a_bounded_time(mortal):
    hasty = McpServer(replace(mortal.config, timeout_seconds=6))
    for call in (Call("die", "never"), Call("slow", "60")):
        trajectory, read = roll_out(speaking(COMPACT, hasty), [call, Answer("x")])
        assert trajectory.stop_reason is StopReason.SEARCH_FAILED and not read
        assert f"ToolUnavailable: {PEER}: {call.tool}: no answer in 6 s" in trajectory.searches[0].error


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (
            McpConfig("{address}", ("fly",)),
            ConfigError,
            "tools: 'fly': must be one of add, answer, die, fail",
        ),
        (McpConfig("http://127.0.0.1:9/mcp", timeout_seconds=5), ToolUnavailable, "http://127.0.0.1:9/mcp: "),
        (McpConfig("no-such-command"), ToolUnavailable, "tools.mcp no-such-command: "),
    ],
)
def test_a_server_that_cannot_serve_is_refused_in_one_line(config, error, says, address):
    with pytest.raises(error, match=says) as caught:
        McpServer(replace(config, mcp=config.mcp.format(address=address)))
    assert "\n" not in str(caught.value)


PAGED = """
import json, sys

def say(number, **result):
    print(json.dumps({"jsonrpc": "2.0", "id": number, "result": result}), flush=True)

schemas = [{"type": "object", "required": ["zz"]}, {"type": "object", "properties": None}]
for asked in map(json.loads, sys.stdin):
    if asked.get("method") == "initialize":
        version = asked["params"]["protocolVersion"]
        server = {"name": "paged", "version": "1"}
        say(asked["id"], protocolVersion=version, capabilities={"tools": {}}, serverInfo=server)
    elif asked.get("method") == "tools/list":
        page = int((asked.get("params") or {}).get("cursor") or 0) % 2
        say(asked["id"], tools=[{"name": f"t{page}", "inputSchema": schemas[page]}], nextCursor=str(page + 1))
    elif "id" in asked:
        error = {"code": -32601, "message": "unknown"}
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": error}), flush=True)
"""


def test_all_pages_of_tools_are_read_once_and_odd_schemas_are_tools(tmp_path):
    (tmp_path / "paged.py").write_text(PAGED)
    server = McpServer(McpConfig(f"{sys.executable} {tmp_path / 'paged.py'}"))
    assert server.names == ("t0", "t1")
    assert [tool.parameters["type"] for tool in server.tools] == ["object", "object"]


ODD = """
import json, os, sys

def say(number, **result):
    print(json.dumps({"jsonrpc": "2.0", "id": number, "result": result}), flush=True)

place = {"type": "object", "properties": {"city": {"type": "string"}, "zips": {"type": "array", "items": {}}}}
parts = {"from": {"$ref": "#/$defs/Place"}, "days": {}}
trip = {"type": "object", "$defs": {"Place": place}, "properties": parts}
results = {
    "odd": {"content": [{"type": "hologram"}]},
    "lies": {"content": [{"type": "text", "text": "2"}], "structuredContent": {"sum": "two"}},
}
tools = [{"name": name, "inputSchema": trip, "description": "Go on. " * 1000} for name in (*results, "dies")]
tools[1]["outputSchema"] = {"type": "object", "properties": {"sum": {"type": "integer"}}}
for asked in map(json.loads, sys.stdin):
    method = asked.get("method")
    if method == "initialize":
        version, server = asked["params"]["protocolVersion"], {"name": "odd", "version": "1"}
        print("starting ...", flush=True)
        say(asked["id"], protocolVersion=version, capabilities={"tools": {}}, serverInfo=server)
    elif method == "tools/list":
        say(asked["id"], tools=tools)
    elif method == "tools/call":
        name = asked["params"]["name"]
        say(asked["id"], **results[name]) if name in results else os._exit(3)
    elif "id" in asked:
        error = {"code": -32601, "message": "unknown"}
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": error}), flush=True)
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A server whose results fit no protocol, and that dies; its descriptions are long."""
    (path := tmp_path_factory.mktemp("odd") / "odd.py").write_text(ODD)
    return McpServer(McpConfig(f"{sys.executable} {path}", timeout_seconds=8))


def test_a_long_description_is_cut_and_says_so(odd):
    assert {len(tool.does) for tool in odd.tools} == {1000 + len(" [cut]")}
    assert all(tool.does.endswith(" [cut]") for tool in odd.tools)


def test_what_a_server_prints_besides_is_no_traceback(odd, caplog):
    McpServer(odd.config)
    noted = [record for record in caplog.records if "parse" in record.getMessage()]
    assert noted and not any(record.exc_info for record in noted)


def test_the_example_of_a_call_shows_the_parts_of_an_object(odd):
    assert json.loads(odd.tools[0].example) == {"from": {"city": "...", "zips": ["..."]}, "days": "..."}


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        ("odd", "odd: .* validation errors? for CallToolResult$"),
        ("lies", "lies: Invalid structured content returned by tool lies"),
        pytest.param("dies", r"dies: no answer in 8 s \(Connection closed\)$", marks=pytest.mark.slow),
    ],
)
def test_what_kept_a_tool_from_an_answer_is_told(odd, tool, says):
    called = next(each for each in odd.tools if each.name == tool)
    with pytest.raises(ToolUnavailable, match=says) as caught:
        asyncio.run(odd.call(called, "{}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "structured", "text"),
    [
        ([TextContent(text="a"), TextContent(text="b")], {"c": 1}, "a\nb"),
        ([], {"sum": 5, "of": ["é"]}, '{"sum": 5, "of": ["é"]}'),
        ([ImageContent(data="AA", mime_type="image/png")], None, "[image/png: not shown]"),
        (
            [TextContent(text="a"), AudioContent(data="AA", mime_type="audio/wav")],
            None,
            "a\n[audio/wav: not shown]",
        ),
        (
            [EmbeddedResource(resource=TextResourceContents(uri="file:///a", text="in a file"))],
            None,
            "in a file",
        ),
        (
            [EmbeddedResource(resource=BlobResourceContents(uri="file:///a", blob="AA"))],
            None,
            "[resource: not shown]",
        ),
        (
            [ResourceLink(name="n", uri="https://e.org/a", description="about")],
            None,
            "n https://e.org/a about",
        ),
        ([], None, "[nothing]"),
    ],
)
def test_a_result_without_text_is_read_as_what_it_is(content, structured, text):
    assert read_result(CallToolResult(content=content, structured_content=structured)) == text


def test_wrong_limits_and_names_that_are_taken_are_refused(address):
    with pytest.raises(ConfigError, match=r"tools.max_calls = 0: must be >= 1"):
        McpConfig(PEER, max_calls=0)
    taken = McpServer(McpConfig(address, ("answer",)))
    with pytest.raises(ConfigError, match="each name once, and none of"):
        speaking(COMPACT, taken)
    with pytest.raises(ConfigError, match="each name once"):
        replace(HERMES, servers=(taken, taken), tools=("search", "answer", "answer"))


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (
            {"mcp": "x", "tool": ["a"]},
            r"protocol\.tools\.tool: unknown key; a server of tools takes mcp",
        ),
        ({"mcp": "x", "timeout_seconds": "soon"}, "timeout_seconds: got 'soon', expected float"),
        ({"mcp": "x", "timeout_seconds": 0}, r"tools\.timeout_seconds = 0.0: must be > 0"),
        ({"tools": ["a"]}, "missing: mcp"),
    ],
)
def test_a_wrong_key_of_a_server_is_named_in_one_line(server, says, tmp_path, capsys):
    (config := tmp_path / "ask.yaml").write_text(json.dumps({"protocol": {"tools": ["search", server]}}))
    assert sleuth.main(["ask", "x", "--config", str(config), "--policy", "atlas", "--retriever", "none"]) == 2
    told = capsys.readouterr().err
    assert re.search(says, told) and told.count("\n") == 1


@pytest.mark.slow
def test_our_own_server_is_a_peer_by_recipe(tmp_path, capsys):
    build_small_index(tmp_path)
    retriever = open_retriever(str(tmp_path / "index"))
    write_jsonl(
        tmp_path / "dev.jsonl",
        [{"id": "q", "question": "How does the page about fox end?", "golden_answers": ["sea"]}],
    )
    with serving(create_app(retriever, with_mcp=True)) as url:
        tools = ["search", {"mcp": f"{url}/mcp", "tools": ["fetch"], "max_calls": 1}]
        recipe = {
            "policy": "atlas",
            "retriever": str(tmp_path / "index"),
            "questions": str(tmp_path / "dev.jsonl"),
            "protocol": {"name": "hermes", "tools": tools, "max_response_tokens": 200},
            "engine": {"class_path": "tests.page_reader.PageReader", "init_args": {"opens": "fetch"}},
            "out": str(tmp_path / "out"),
            "device": "cpu",
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert sleuth.main(["evaluate", "--config", str(tmp_path / "recipe.yaml")]) == 0
        once = {"questions_per_step": 1, "group_size": 2}
        trained = {**recipe, "out": str(tmp_path / "run"), "steps": 1, "rollout": once}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(trained))
        assert sleuth.main(["train", "--config", str(tmp_path / "train.yaml")]) == 0
        tools[1].pop("tools")
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "out": str(tmp_path / "other")}))
        assert sleuth.main(["evaluate", "--config", str(tmp_path / "recipe.yaml")]) == 2
    said = capsys.readouterr().err
    assert "'search': must be one of fetch" in said and "swap of the retriever" not in said
    [row] = read_metrics(tmp_path / "run")
    assert row["rollout/searches"] == 2  # a search and a call
    [folder] = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert json.loads((folder / "sleuth.json").read_text()) == {
        "protocol": "hermes"
    }  # a URL is no one's habit
    [record] = read_jsonl(tmp_path / "out" / "trajectories.jsonl")
    assert record["searches"][1]["tool"] == "fetch"
    assert "blue fox sea" in json.dumps(record["searches"][1]["hits"])
