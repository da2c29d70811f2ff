"""Protocols: the Search-R1 strings exactly, and what every protocol keeps."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol import COMPACT, HERMES, PROTOCOLS, SEARCH_R1, Answer, Invalid, get_protocol
from agent.tools import Call, Search
from data.errors import ConfigError
from data.records import Passage

every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def test_the_search_r1_prompt_is_exact():
    assert SEARCH_R1.prompt(" who wrote Hamlet ") == (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first ev"
        "ery time you get new information. After reasoning, if you find you lack some knowledge, yo"
        "u can call a search engine by <search> query </search> and it will return the top searched"
        " results between <information> and </information>. You can search as many times as your wa"
        "nt. If you find no further external knowledge needed, you can directly provide the answer "
        "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beiji"
        "ng </answer>. Question: who wrote Hamlet?\n"
    )


def test_the_search_r1_observations_are_exact():
    passages = [Passage("1", "Text one.", "A"), Passage("2", "Text two.", "B")]
    rendered = SEARCH_R1.render_observation(SEARCH_R1.render_passages(passages))
    assert rendered == (
        '\n\n<information>Doc 1(Title: "A") Text one.\nDoc 2(Title: "B") Text two.</information>\n\n'
    )
    assert SEARCH_R1.invalid == (
        "\nMy previous action is invalid. If I want to search, I should put the query between <search> and "
        "</search>. If I want to give the final answer, I should put the answer between <answer> and "
        "</answer>. Let me try again.\n"
    )


def test_the_search_r1_limits_are_exact():
    assert SEARCH_R1.top_k == 3
    assert SEARCH_R1.max_turns == 4
    assert SEARCH_R1.max_response_tokens == SEARCH_R1.max_observation_tokens == 500
    assert SEARCH_R1.max_context_tokens == 4096


@pytest.mark.parametrize(
    ("turn", "action"),
    [
        ("<think>x</think><search> a b </search>", Search("a b")),
        ("<answer>\nParis\n</answer>", Answer("Paris")),
        ("<search>a</search><answer>b</answer>", Search("a")),
        ("<answer>a</answer><search>b</search>", Answer("a")),
        ("<search>two\nlines</search>", Search("two\nlines")),
        ("<search>a</answer>", Invalid("no action")),
        ("<search>  </search>", Search("")),
        ("", Invalid("no action")),
        ("<answer></answer>", Answer("")),
    ],
)
def test_search_r1_parses_the_first_action(turn, action):
    assert SEARCH_R1.parse(turn) == action


@every_protocol
@pytest.mark.parametrize("action", [Search('Lyon "the city"'), Answer("Paris, France")])
def test_a_rendered_turn_parses_back_and_is_well_formed(protocol, action):
    turn = protocol.render_turn("I need to look this up.", action)
    assert protocol.parse(turn) == action
    assert protocol.is_well_formed(turn)
    assert turn.endswith(protocol.stop)


@every_protocol
def test_what_is_no_action_is_invalid_and_never_raises(protocol):
    for text in ("", "plain", f"<{protocol.search_tag}>", "</think></think>", "<answer", "\x00\ud7ff"):
        assert isinstance(protocol.parse(text), Invalid)
        assert not protocol.is_well_formed(text)


NESTED = {
    "lists": "[" * 100_000,
    "closed lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"name":' * 100_000,
    "in the query": '{"name": "search", "arguments": {"query": ' + "[" * 100_000 + "}}",
    "a number": '{"name": "search", "arguments": {"query": ' + "9" * 10_000 + "}}",
    "an exponent": '{"name": "search", "arguments": {"query": 1e999999999}}',
    "NaN": '{"name": "search", "arguments": {"query": NaN}}',
}


@every_protocol
@pytest.mark.parametrize("name", NESTED)
def test_no_call_however_deep_or_large_raises(protocol, name):
    turn = f"<think>x</think><{protocol.search_tag}>{NESTED[name]}</{protocol.search_tag}>"
    assert isinstance(protocol.parse(turn), Invalid) == (protocol is HERMES)
    protocol.is_well_formed(turn)


PIECES = st.sampled_from(
    [*(f"<{slash}{tag}>" for p in PROTOCOLS.values() for tag in p.tags for slash in ("", "/")),
     '{"name": "search", "arguments": {"query": "', '"}}', "[", "{", '"', "\\ud83d", "\ud83d", "1e9", " "]
)  # fmt: skip


@every_protocol
@given(parts=st.lists(PIECES | st.text(st.characters(exclude_categories=()), max_size=5), max_size=12))
def test_any_text_is_an_action_that_can_be_written_down(protocol, parts):
    turn = "".join(parts)
    action = protocol.parse(turn)
    if isinstance(action, Call):
        assert action.argument.encode().decode() == action.argument.strip()
    if isinstance(action, Invalid):
        assert not protocol.is_well_formed(turn)


def test_half_a_character_in_a_call_is_replaced():
    call = '{"name": "search", "arguments": {"query": "a \\ud83d b \\ud83d\\ude00"}}'
    assert HERMES.parse(f"<tool_call>{call}</tool_call>") == Search("a \ufffd b \U0001f600")


@every_protocol
@pytest.mark.parametrize("nothing", ["", " ", "\n\t", "\u00a0", "\u200b", "\u2060 \ufeff"])
def test_an_answer_or_query_of_nothing_is_not_well_formed(protocol, nothing):
    assert not protocol.is_well_formed(f"<think>x</think><answer>{nothing}</answer>")
    assert not protocol.is_well_formed(protocol.render_turn("x", Search(nothing)))


@every_protocol
def test_two_actions_or_a_missing_thought_are_not_well_formed(protocol):
    turn = protocol.render_turn("thought", Answer("Paris"))
    assert not protocol.is_well_formed(turn + turn)
    assert not protocol.is_well_formed(turn.split("</think>")[1])
    assert not protocol.is_well_formed(turn.replace("thought", f"<{protocol.observation_tag}>"))


@every_protocol
def test_the_question_is_in_the_prompt_and_braces_are_text(protocol):
    assert "What does {passages} mean?" in protocol.prompt("What does {passages} mean?")
    passage = Passage("1", "{title} {0} {text}", "{index}")
    rendered = protocol.render_observation(protocol.render_passages([passage]))
    assert "{title} {0} {text}" in rendered and "{index}" in rendered


@pytest.mark.parametrize(
    "inside",
    ["not json", "[]", '{"name": "other", "arguments": {"query": "x"}}', '{"name": "search"}',
     '{"name": "search", "arguments": {"query": 3}}', '{"name": "search", "arguments": "x"}'],
)  # fmt: skip
def test_a_malformed_tool_call_is_invalid(inside):
    assert HERMES.parse(f"<tool_call>{inside}</tool_call>") == Invalid("empty query")


def test_an_unknown_protocol_is_refused_by_name():
    with pytest.raises(ConfigError, match="'chatty': must be one of search_r1, compact, hermes"):
        get_protocol("chatty")
    with pytest.raises(ConfigError, match="titles = 'bold': must be quoted or unquoted"):
        get_protocol("search_r1", "bold")


def test_search_r1_with_unquoted_titles_is_the_text_of_the_first_version():
    old, passage = (
        get_protocol("search_r1", "unquoted"),
        Passage("1", "Text.", "A").keep_verbatim('"A"\nText.\n'),
    )
    assert old.render_passages([passage]) == "Doc 1(Title: A) Text."
    assert old.parse("<search> </search>") == Invalid("empty query") and old.keeps_eos
    assert replace(old, titles="quoted", keeps_eos=False, allows_empty_query=True) == SEARCH_R1


def test_the_text_of_compact_is_what_it_was():
    """Policies and runs of before go on with it: to the letter."""
    passages = [Passage("1", "Text.", "A").keep_verbatim('""A""\n Text.')] * 2
    assert COMPACT.render_observation(COMPACT.render_passages(passages)) == (
        "<information> A: Text.\nA: Text.</information>"
    )
    assert COMPACT.prompt("Who") == "Question: Who?\n"
    assert COMPACT.invalid == "<information> invalid action</information>" and COMPACT.keeps_eos
    assert COMPACT.parse("<search></search>") == Invalid("empty query")
    assert get_protocol("compact", "unquoted") == COMPACT


def test_compact_is_short():
    assert len(COMPACT.prompt("x")) < 20


def test_the_limits_of_compact_are_those_of_the_quickstart():
    limits = ("max_turns", "top_k", "max_response_tokens", "max_observation_tokens", "max_context_tokens")
    assert [getattr(COMPACT, name) for name in limits] == [4, 1, 64, 160, 1000]
