"""Text to tokens and back: no foreign control token comes in, none of the policy's own is lost."""

import asyncio
from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing

from agent.engines.scripted import ScriptedEngine
from agent.protocol import COMPACT, HERMES, PROTOCOLS, SEARCH_R1, Answer, Search
from agent.rollout import Agent, encode_prompt
from agent.trajectory import SegmentKind, StopReason
from data.errors import ConfigError
from data.records import Passage
from tests.agent.test_rollout import CHATML
from tests.fakes import DictSearcher, byte_tokenizer, question

every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
MARKERS = ("<|im_start|>", "<|im_end|>")
LLAMA = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def beginning_tokenizer(template=None):
    """A tokenizer that puts a token before every text, as Llama's does."""
    tokenizer = byte_tokenizer("<s>", *MARKERS)
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    return tokenizer


def run(tokenizer, protocol, script, world=None, asked=None):
    agent = Agent(ScriptedEngine(tokenizer, script), tokenizer, DictSearcher(world or {}), protocol)
    return asyncio.run(agent.rollout([asked or question()]))[0]


@pytest.mark.parametrize("template", [None, LLAMA, CHATML], ids=["plain", "llama", "chatml"])
@every_protocol
def test_a_trajectory_begins_once(protocol, template):
    """By the tokenizer where there is no template, else as the template says; never again after it."""
    tokenizer = beginning_tokenizer(template)
    script = [protocol.render_turn("t", Search("a")), "nonsense", protocol.render_turn("t", Answer("b"))]
    trajectory = run(tokenizer, protocol, script, {"a": "a text"})
    assert len(trajectory.segments) == 6
    bos = tokenizer.bos_token_id
    begins = protocol is COMPACT or template is not CHATML
    assert trajectory.token_ids.count(bos) == begins and (trajectory.token_ids[0] == bos) == begins


def test_a_prompt_is_in_the_template_alone_or_as_it_is():
    tokenizer = beginning_tokenizer(CHATML)
    text, ids = encode_prompt("Who?", SEARCH_R1, tokenizer)
    assert text == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n" == tokenizer.decode(ids)
    assert encode_prompt("Who?", COMPACT, tokenizer) == ("Who?", tokenizer.encode("Who?"))
    assert encode_prompt("Who?", replace(SEARCH_R1, chat=False), tokenizer)[0] == "Who?"


def test_a_template_for_lists_of_contents_is_given_one_and_one_that_drops_the_text_is_refused():
    tokenizer = byte_tokenizer(*MARKERS)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}-{% else %}{{ m.content[0].text }}{% endif %}"
        "{% endfor %}"
    )
    for title in fields:
        for text in fields:
            shown = protocol.render_observation(protocol.render_passages([Passage("7", text, title)] * 2))
            lines = "\n".join(f"{text}|{title}|{number}|{{other}}|{{}}" for number in (1, 2))
            assert shown == f"<{lines}|{{text}}|{{}}>"
    assert COMPACT.prompt("{question} {text}?") == "Question: {question} {text}?\n"


@every_protocol
def test_what_the_policy_wrote_is_never_encoded_and_is_decoded_whole(protocol, monkeypatch):
    """Where its tokens are not those that its text would have."""
    tokenizer = byte_tokenizer(*MARKERS, merges=("s e", "< /", "a r"))
    script = [protocol.render_turn("sear", Search("sear")), protocol.render_turn("", Answer("sear"))]
    letters = [tokenizer.encode(c, add_special_tokens=False) for c in "".join(script)]
    assert sum(map(len, letters)) > len(tokenizer.encode("".join(script), add_special_tokens=False))

    class Spelling(ScriptedEngine):
        """Writes letter by letter."""

        def _until_stop(self, text, sampling):
            _, reason = super()._until_stop(text, sampling)
            return [i for c in text for i in tokenizer.encode(c, add_special_tokens=False)], reason

    agent = Agent(Spelling(tokenizer, script), tokenizer, DictSearcher({"sear": "x"}), protocol)
    (trajectory,) = asyncio.run(agent.rollout([question()]))
    written = [s for s in trajectory.segments if s.kind is SegmentKind.POLICY]
    assert [i for s in written for i in s.token_ids] == [i for each in letters for i in each]
    assert [s.text for s in written] == script and trajectory.answer == "sear"
