"""search_r1 is Search-R1's text byte by byte: against its search_r1/llm_agent/generation.py, restated."""

import asyncio
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol import HERMES, SEARCH_R1, get_protocol
from agent.rollout import Agent
from agent.search_tool import TagSanitizer, render_hits
from agent.trajectory import SegmentKind
from data.formats.rows import parse_passage
from data.records import Hit
from retriever_server.client.wire import parse_hits, parse_results
from retriever_server.client.wire import render_hits as answer
from retriever_server.server.routes.search import render_hit
from tests.fakes import byte_tokenizer, question
from tests.scripted import ScriptedEngine

ROOM = replace(SEARCH_R1, max_observation_tokens=10**6, max_context_tokens=10**7)


# ---- theirs ------------------------------------------------------------------------------------


def passages2string(documents):
    found = ""
    for number, contents in enumerate(documents):
        title = contents.split("\n")[0]
        text = "\n".join(contents.split("\n")[1:])
        found += f"Doc {number + 1}(Title: {title}) {text}\n"
    return found


def observation_of(documents):
    return f"\n\n<information>{passages2string(documents).strip()}</information>\n\n"


def their_text(prompt, responses, search, eos):
    """Return the context at the end: every response decoded without special tokens, cut, answered."""
    text = prompt
    for response in responses:
        response = response.replace(eos, "")
        for tag in ("</search>", "</answer>"):
            if tag in response:
                response = response.split(tag)[0] + tag
                break
        text += response
        match = re.search(r"<(search|answer)>(.*?)</\1>", response, re.DOTALL)
        if match is None:
            text += SEARCH_R1.invalid  # its letters: test_protocol.py
        elif match[1] == "search":
            text += observation_of(search(match[2].strip()))
    return text


# ---- ours --------------------------------------------------------------------------------------


def shown(passage, protocol=ROOM):
    tokenizer = byte_tokenizer()
    hits = [Hit(passage, 1.0, "g")]
    return render_hits(
        hits,
        protocol,
        TagSanitizer(protocol),
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        10**6,
    )


def ways(contents):
    """One line of a corpus as it comes to us: read here, from our server, from Search-R1's dense and BM25."""
    row = {"id": "1", "contents": contents}
    here = parse_passage(row)
    hit = Hit(here, 1.0, "g")
    bm25 = {**row, "title": contents.split("\n")[0].strip('"'), "text": "\n".join(contents.split("\n")[1:])}
    yield "corpus", here
    for scores in (True, False):
        yield "our /retrieve", parse_hits(answer([[hit]], "g", scores))[0][0].passage
    found = {"results": [{"error": None, "hits": [render_hit(hit, "")]}]}
    [[ours]] = parse_results(found)  # pyright: ignore[reportGeneralTypeIssues]
    yield "our /v1/search", ours.passage
    for name, document in (("their dense server", row), ("their BM25 server", bm25)):
        for item in ({"document": document, "score": 0.5}, document):
            yield name, parse_hits({"result": [[item]]})[0][0].passage


CONTENTS = [
    '"Rome"\nRome is the capital of Italy.',
    '""Heroes" (album)"\nBy David Bowie.',
    '"A "quoted" name"\nText\nof two lines.',
    "Plain first line\nsecond",
    "One line, no title",
    '"One line, quoted"',
    '"Rome"\n',
    '""\nNo title.',
    '"\n"\nA quote alone.',
    '"Rome"\r\nFrom a file of Windows.\r\n',
    '  "Blanks"  \n  indented\n\n',
    '\n"Late"\ntext',
    '"Ends in a quote""\ntext',
    "'Single'\ntext",
    '"Half\ntext"',
    "“Curly”\ntext",
]


@pytest.mark.parametrize("contents", CONTENTS)
def test_an_observation_is_search_r1s_wherever_the_passage_comes_from(contents):
    for way, passage in ways(contents):
        assert shown(passage) == observation_of([contents]), way


@given(st.text(st.sampled_from('"\n\r \tab“’é0:()'), min_size=1, max_size=14).filter(str.strip))
def test_an_observation_is_search_r1s_whatever_the_contents(contents):
    for way, passage in ways(contents):
        assert shown(passage) == observation_of([contents]), way


@given(st.text(st.sampled_from('"\n\r \tab“’é0:()'), min_size=1, max_size=14).filter(str.strip))
@pytest.mark.parametrize("name", ["compact", "hermes", "search_r1 unquoted"])
def test_title_and_text_are_the_same_wherever_the_passage_comes_from(name, contents):
    protocol = get_protocol(*name.split())
    (_, here), *others = ways(contents)
    for way, passage in others:
        assert (passage.title, passage.text) == (here.title, here.text), way
        assert shown(passage, protocol) == shown(here, protocol), way


def test_a_passage_of_title_and_text_has_the_contents_that_our_server_sends():
    passage = parse_passage({"id": "1", "title": "Rome", "text": "A city."})
    assert shown(passage) == observation_of(['"Rome"\nA city.'])
    bare = parse_passage({"id": "1", "text": "First line.\nSecond line."})
    assert shown(bare) == observation_of(["First line.\nSecond line."])


class Shelf:
    """Finds two documents for any query, and remembers what it was asked."""

    def __init__(self):
        self.queries = []

    def documents(self, query):
        return [f'"About {query}"\nIt says "{query}".', '""Heroes" (album)"\nBy David Bowie.']

    async def search(self, query, k):
        self.queries.append(query)
        rows = [{"id": str(i), "contents": c} for i, c in enumerate(self.documents(query))]
        return [Hit(parse_passage(row), 1.0, "g") for row in rows]


EOS = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCRIPTS = {
    "search": ["<think>a</think>\n<search> Lyon </search>"],
    "an end of sequence without an action": ["I do not know." + EOS],
    "several special tokens": ["Well." + EOS + EOS, "<think>a</think>" + EOS],
    "nothing but the end": [EOS],
    "an empty search": ["<search></search>", "<search> \n </search>"],
    "all": ["Hm." + EOS, "<search></search>", "<search>x</search>", "<answer>"],
}


def rolled_out(protocol, script):
    tokenizer = byte_tokenizer("<|im_start|>", EOS)
    tokenizer.eos_token, tokenizer.chat_template = EOS, TEMPLATE
    shelf, engine = Shelf(), ScriptedEngine(tokenizer, script)
    agent = Agent(engine, tokenizer, shelf, protocol)
    (trajectory,) = asyncio.run(agent.rollout([question()]))
    return trajectory, tokenizer, shelf


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_whole_trajectory_is_the_text_of_search_r1s_loop(name):
    script = [*SCRIPTS[name], "<think>b</think>\n<answer> Paris </answer>"]
    trajectory, tokenizer, shelf = rolled_out(ROOM, script)
    prompt = trajectory.segments[0].text
    assert tokenizer.decode(trajectory.token_ids) == their_text(prompt, script, shelf.documents, EOS)
    assert trajectory.answer == "Paris"
    assert len(trajectory.searches) == len(shelf.queries)


def test_an_empty_search_asks_the_retriever_and_earns_nothing_for_its_form():
    trajectory, _, shelf = rolled_out(
        ROOM, ["<think>a</think><search> </search>", "<think>b</think><answer>x</answer>"]
    )
    assert shelf.queries == [""] and trajectory.invalid_actions == 0
    assert not trajectory.valid_format


def test_what_the_policy_sampled_is_trained_but_for_the_end_of_a_turn_that_goes_on():
    """The last turn keeps its end of sequence: nothing follows it."""
    trajectory, _, _ = rolled_out(replace(ROOM, max_turns=1), ["Well." + EOS, "I give up." + EOS])
    written = [s for s in trajectory.segments if s.kind is SegmentKind.POLICY]
    assert [s.text for s in written] == ["Well.", "I give up." + EOS]
    assert [len(s.token_ids) for s in written] == [len(s.logprobs or ()) for s in written]
    assert sum(trajectory.loss_mask) == len("Well.") + len("I give up.") + 1


@pytest.mark.parametrize("name", ["search_r1 unquoted", "compact"])
def test_other_texts_keep_the_end_of_sequence(name):
    protocol = get_protocol(*name.split())
    trajectory, _, _ = rolled_out(protocol, ["Well." + EOS, "<answer>x</answer>"])
    assert [s.text for s in trajectory.segments[1:3]] == ["Well." + EOS, protocol.invalid]


@pytest.mark.parametrize("said", ["I do not know." + EOS, "I do not know."])
def test_hermes_closes_a_turn_without_an_action_once(said):
    trajectory, tokenizer, _ = rolled_out(HERMES, [said, "<answer>x</answer>"])
    assert tokenizer.decode(trajectory.token_ids).count("I do not know.<|im_end|>\n<|im_start|>user") == 1
    assert EOS + EOS not in tokenizer.decode(trajectory.token_ids)
