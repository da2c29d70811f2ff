"""Chat templates that think for themselves, are told things, or know what day it is: those that TRL ships."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl

from agent.policy import Policy
from agent.policy_folder import own_protocol
from agent.prompt import PROMPT_FILE, encode_prompt, frozen_frame, make_frame
from agent.protocol import COMPACT, HERMES, SEARCH_R1
from agent.rollout import Agent
from agent.tools import Search
from agent.trajectory import SegmentKind
from data.errors import ConfigError, DataError
from data.records import Hit, Passage
from rl.algorithm.rewards import REWARDS
from rl.demonstrations import demonstration_spans
from rl.warm_start import encode_demonstration
from tests.fakes import DictSearcher, byte_tokenizer, question, tiny_model
from tests.scripted import ScriptedEngine

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))
OPENING = ["deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano",
           "nemotron_3_super", "nemotron_3_ultra", "qwen3_5_think", "qwen3_6", "qwen3_8"]  # fmt: skip
CHATML_OPENING = [name for name in OPENING if not name.startswith("deepseek")]
TODAY = "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer_with(template):
    """A byte tokenizer with the template of that name, or with one given whole."""
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "<|im_end|>"
    tokenizer.chat_template = (FOLDER / f"{template}.jinja").read_text() if template in NAMES else template
    return tokenizer


def rolled_out(tokenizer, protocol, script):
    agent = Agent(ScriptedEngine(tokenizer, script), tokenizer, DictSearcher({"Lyon": "A city."}), protocol)
    (trajectory,) = asyncio.run(agent.rollout([question()]))
    return trajectory


def test_these_templates_begin_the_thought():
    found = [
        name for name in NAMES
        if SEARCH_R1.opens_thought(make_frame(SEARCH_R1, tokenizer_with(name)).after)
    ]  # fmt: skip
    assert found == OPENING


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [SEARCH_R1, HERMES], ids=lambda protocol: protocol.name)
def test_a_prompt_is_what_the_template_itself_renders(name, protocol):
    tokenizer = tokenizer_with(name)
    for asked in ("Who?", "  Who wrote {title} & 'Ars'\n in 1 < 2", "東京？ é", "Why"):
        text = protocol.prompt(asked)
        prompt, ids = encode_prompt(text, protocol, tokenizer)
        content = text if text.strip() in prompt else [{"type": "text", "text": text}]
        for said in (content, [{"type": "text", "text": text}]):
            messages: Any = [{"role": "user", "content": said}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if text.strip() in str(rendered):
                break
        assert prompt == rendered
        assert ids == tokenizer.encode(prompt, add_special_tokens=False)


@pytest.mark.parametrize("name", OPENING)
def test_a_turn_that_goes_on_in_the_thought_of_the_template_is_well_formed(name):
    tokenizer = tokenizer_with(name)
    answer = "<think>Read.</think>\n<answer>Paris</answer>"
    for script, good in (
        ([" I know.</think><answer>Paris</answer>"], True),
        (["look</think><search>Lyon</search>", answer], True),
        (["<think>I know.</think><answer>Paris</answer>"], True),  # said once more
        (["<answer>Paris</answer>"], False),  # the thought never ends
        (["a</think> b</think><answer>Paris</answer>"], False),
        (["a<think>b</think><answer>Paris</answer>"], False),
        (["a</think>and so<answer>Paris</answer>"], False),
        (["look</think><search>Lyon</search>", "Read.</think><answer>Paris</answer>"], False),  # no one's
    ):  # fmt: skip
        trajectory = rolled_out(tokenizer, SEARCH_R1, script)
        assert trajectory.valid_format is good, script
        assert REWARDS["format"](trajectory) == good


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OPENING])
def test_elsewhere_a_turn_begins_its_own_thought(name):
    tokenizer = tokenizer_with(name)
    assert rolled_out(tokenizer, SEARCH_R1, ["<think>x</think><answer>Paris</answer>"]).valid_format
    assert not rolled_out(tokenizer, SEARCH_R1, ["x</think><answer>Paris</answer>"]).valid_format


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_nano", "glm4moe"]
)
def test_a_template_that_is_told_not_to_think_ends_the_thought_and_none_is_asked_for(name):
    tokenizer = tokenizer_with(name)
    for protocol in (SEARCH_R1, HERMES):
        silent = replace(protocol, chat_template_kwargs={"enable_thinking": False})
        prompt, _ = encode_prompt(silent.prompt("Who?"), silent, tokenizer)
        assert prompt.rstrip().endswith("</think>")
        for said in ("<answer>Paris</answer>", "<think>x</think><answer>Paris</answer>"):
            assert rolled_out(tokenizer, silent, [said]).valid_format
        assert not rolled_out(tokenizer, silent, ["x</think><answer>Paris</answer>"]).valid_format


@pytest.mark.parametrize("name", CHATML_OPENING)
def test_every_message_of_hermes_begins_as_the_template_begins_one(name):
    """After a result and after an invalid action, too; its tokens are the observation's, not trained."""
    tokenizer = tokenizer_with(name)
    script = ["look</think>" + HERMES.render_turn("", Search("Lyon")).split("</think>")[1],
              "what?</think>nothing<|im_end|>", "Read.</think><answer>Paris</answer>"]  # fmt: skip
    trajectory = rolled_out(tokenizer, HERMES, script)
    observations = [s for s in trajectory.segments if s.kind is SegmentKind.OBSERVATION]
    assert len(observations) == 2
    for segment in (trajectory.segments[0], *observations):
        assert segment.text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
        assert segment.text == tokenizer.decode(segment.token_ids)
    assert trajectory.policy_text == "".join(script)
    assert rolled_out(tokenizer, HERMES, [script[0], script[2]]).valid_format


RECORD = {
    "id": "d",
    "question": "Where is Lyon",
    "steps": [
        {"think": "look", "search": "Lyon", "passages": [{"id": "0", "title": "Lyon", "text": "A city."}]},
        {"think": "read", "answer": "France"},
    ],
}


@pytest.mark.parametrize("name", OPENING)
@pytest.mark.parametrize("protocol", [SEARCH_R1, HERMES], ids=lambda protocol: protocol.name)
def test_a_demonstration_goes_on_in_the_thought_of_the_template(name, protocol):
    """It has the tokens of a rollout of the same turns, and what it teaches is well-formed."""
    tokenizer = tokenizer_with(name)
    policy = Policy(tiny_model("qwen2", len(tokenizer)), tokenizer)
    spans = list(demonstration_spans(RECORD, protocol))
    encoded = encode_demonstration(spans, policy, protocol, learn_everything=False)
    taught, turn = [], []
    for label in [*encoded["labels"], -100]:
        if label != -100:
            turn.append(label)
        elif turn:
            taught.append(tokenizer.decode(turn))
            turn = []
    assert len(taught) == 2

    class Shelf:
        async def search(self, query, k):
            return [Hit(Passage("0", "A city.", "Lyon"), 1.0, "g")]

    agent = Agent(ScriptedEngine(tokenizer, taught), tokenizer, Shelf(), protocol)
    (trajectory,) = asyncio.run(agent.rollout([question(RECORD["question"])]))
    assert trajectory.valid_format and trajectory.token_ids == encoded["input_ids"]
    assert "<think><think>" not in "".join(str(tokenizer.decode(encoded["input_ids"])).split())


# ---- what a template is told ---------------------------------------------------------------------


def test_a_word_that_the_template_does_not_read_is_refused():
    tokenizer = tokenizer_with("qwen3_8")
    for told, said in (
        ({"enable_thinkin": False}, "kwargs.enable_thinkin: the policy's chat template reads no such word"),
        ({"messages": []}, "kwargs.messages: the policy's"),
        ({"tokenize": True}, "kwargs.tokenize: the policy's"),
        ({"reasoning_effort": 3}, r"fails with {'reasoning_effort': 3}"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_frame(replace(SEARCH_R1, chat_template_kwargs=told), tokenizer)
    for protocol, template in ((COMPACT, "qwen3"), (SEARCH_R1, None)):
        with pytest.raises(ConfigError, match="there is no chat template that could read them"):
            make_frame(replace(protocol, chat_template_kwargs={"x": 1}), tokenizer_with(template))


def test_a_template_that_fails_is_one_line():
    with pytest.raises(ConfigError, match="the policy's chat template fails: no users, please"):
        make_frame(SEARCH_R1, tokenizer_with("{{ raise_exception('no users,\\n please') }}"))
    with pytest.raises(ConfigError, match="repeats what the user says"):
        make_frame(SEARCH_R1, tokenizer_with("{{ messages[0].content }}{{ messages[0].content }}"))


def test_what_a_template_is_told_is_kept_with_the_policy(tmp_path):
    tokenizer = tokenizer_with("qwen3")
    silent = replace(SEARCH_R1, chat_template_kwargs={"enable_thinking": False})
    Policy(tiny_model("qwen2", len(tokenizer)), tokenizer).save(tmp_path, silent)
    assert own_protocol(str(tmp_path)) == silent
    (tmp_path / "sleuth.json").write_text('{"protocol": "search_r1", "chat_template_kwargs": 3}')
    with pytest.raises(DataError, match=r"sleuth.json: must be like"):
        own_protocol(str(tmp_path))


# ---- what day it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TODAY, "llama3_2", "gptoss", "muse_glimmer"])
def test_a_kept_frame_does_not_know_that_days_pass(tmp_path, day, template):
    tokenizer = tokenizer_with(template)
    day(2026, 11, 29)
    first = frozen_frame(tmp_path, SEARCH_R1, tokenizer)
    day(2026, 11, 30)
    again = frozen_frame(tmp_path, SEARCH_R1, tokenizer)
    text = SEARCH_R1.prompt("Who?")
    assert encode_prompt(text, SEARCH_R1, tokenizer, again) == encode_prompt(
        text, SEARCH_R1, tokenizer, first
    )
    assert again == first != make_frame(SEARCH_R1, tokenizer)


def test_a_frame_is_kept_for_what_it_was_made_for(tmp_path, day):
    tokenizer = tokenizer_with("qwen3_8")
    assert frozen_frame(tmp_path, SEARCH_R1, tokenizer).after.endswith("<think>\n")
    silent = replace(SEARCH_R1, chat_template_kwargs={"enable_thinking": False})
    assert frozen_frame(tmp_path, silent, tokenizer).after.endswith("</think>\n\n")
    assert frozen_frame(tmp_path, COMPACT, tokenizer).wrap("Who?") == "Who?"
    (tmp_path / PROMPT_FILE).write_text("[]")
    with pytest.raises(DataError, match=r"prompt.json: no frame of prompts"):
        frozen_frame(tmp_path, SEARCH_R1, tokenizer)


def test_the_prompts_of_one_agent_are_all_of_one_day(day):
    tokenizer = tokenizer_with(TODAY)
    agent = Agent(ScriptedEngine(tokenizer, ["<answer>x</answer>"]), tokenizer, DictSearcher({}), SEARCH_R1)
    prompts = []
    for date in ((2026, 11, 29), (2026, 11, 30)):
        day(*date)
        prompts.append(asyncio.run(agent.rollout([question()]))[0].segments[0].text)
    assert prompts[0] == prompts[1] and prompts[0].startswith("29 Nov 2026")
