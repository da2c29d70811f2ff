"""The language of a policy: its prompt, its actions, its observations, and their limits.

A `Protocol` is a value. `SEARCH_R1` is the contract of Search-R1 string by string (Jin et al. 2025,
arXiv 2503.09516); docs/protocol.md lists what differs. `COMPACT` says the same in few tokens, for tiny
policies. `HERMES` is tool calls over chat turns, as Qwen models were taught.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agent.answer_form import ASKED, MAY_ABSTAIN, AnswerForm, read_answer, write_answer
from agent.query_styles import QUERY_STYLES
from agent.tools import SEARCH, TOOLS, Call, Tool, ToolServer, read_call, write_call
from data.errors import ConfigError, require, require_range
from data.records import Passage
from data.text import replace_halves


@dataclass(frozen=True)
class Answer:
    """The policy gives its answer; the trajectory ends."""

    text: str
    confidence: float | None = None
    """Confidence of the policy, in [0, 1], where it states one."""


@dataclass(frozen=True)
class Invalid:
    """The policy wrote no action; it is told so and tries again."""

    reason: str


Action = Call | Answer | Invalid


@dataclass(frozen=True)
class Protocol:
    """One way of speaking. Templates take {question}, {tools}, {passages}, {index}, {title}, {text}."""

    name: str
    instruction: str
    passage: str
    observation: str
    """Wraps the passages; everything after {passages} survives any budget."""
    invalid: str
    """The observation that answers an invalid action."""
    think_tag: str = "think"
    search_tag: str = "search"
    answer_tag: str = "answer"
    observation_tag: str = "information"
    tools: tuple[str, ...] = (SEARCH.name,)
    """Tools (agent/tools.py) that the policy may call; each but search stands in a tag of its name."""
    servers: tuple[ToolServer, ...] = ()
    """MCP servers, whose tools are among `tools`, too (agent/mcp_tools.py)."""
    json_calls: bool = False
    """All calls stand in the search tag, as JSON with the name of the tool."""
    answer_form: AnswerForm = "short"
    """Parts of an answer: confidence asks for one, cited for explanation, citations and confidence, too."""
    may_abstain: bool = False
    """Tell the policy that it may say that it does not know."""
    padding: tuple[str, str] = (" ", " ")
    """Written before and after the content of a tag, in demonstrations."""
    titles: Literal["quoted", "unquoted"] = "unquoted"
    """quoted: {title} is the first line of a passage's `contents` as it stands, {text} is all after it."""
    keeps_eos: bool = True
    """The end-of-sequence token of a turn that was no action stays, before what the policy is told."""
    allows_empty_query: bool = False
    """An empty search is carried out; else it is no action."""
    chat: bool = True
    """Wrap the instruction in the tokenizer's chat template, if it has one."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of the template, such as {"enable_thinking": False}."""
    message_header: str = ""
    """The end of `observation` and `invalid` that begins the policy's next message, if one does."""
    max_turns: int = 4
    """Searches (and invalid actions) allowed; one more completion may then only answer."""
    top_k: int = 3
    query_style: str = "query"
    """Text that the retriever is asked (agent/query_styles.py); the trajectory keeps the policy's query."""
    max_response_tokens: int = 500
    """Limit of one turn."""
    max_observation_tokens: int = 500
    max_context_tokens: int = 4096
    """Limit of the whole trajectory before a turn; the question is never dropped to make room."""

    def __post_init__(self) -> None:
        style = self.query_style
        require(style in QUERY_STYLES, "protocol.query_style", style, f"one of {', '.join(QUERY_STYLES)}")
        require_range(self, "protocol.", ">= 1", "top_k", "max_response_tokens", "max_observation_tokens")
        require_range(self, "protocol.", ">= 0", "max_turns")
        others = ", ".join(self.known_tools.keys() - {SEARCH.name})
        allowed = f"{SEARCH.name}, with or without {others} and {{mcp: URL or command}}"
        known = SEARCH.name in self.tools and set(self.tools) <= self.known_tools.keys()
        require(known, "protocol.tools", list(self.tools), allowed)
        taken = self.think_tag, self.search_tag, self.answer_tag, self.observation_tag
        others = [name for name in self.tools if name != SEARCH.name]
        if len(set(others)) < len(others) or (not self.json_calls and set(others) & set(taken)):
            raise ConfigError(f"protocol.tools = {list(self.tools)}: each name once, and none of {taken}")
        require(self.answer_form in ASKED, "protocol.answer_form", self.answer_form, ", ".join(ASKED))

    @property
    def known_tools(self) -> dict[str, Tool]:
        """Tools by name: ours, and those of the servers."""
        return TOOLS | {tool.name: tool for server in self.servers for tool in server.tools}

    @property
    def call_tags(self) -> dict[str, str]:
        """The tags that calls stand in, each with its tool."""
        others = () if self.json_calls else self.tools
        return {self.search_tag: SEARCH.name} | {name: name for name in others if name != SEARCH.name}

    @property
    def stop(self) -> tuple[str, ...]:
        """The strings that end a turn: the closing tags of the actions."""
        return tuple(f"</{tag}>" for tag in (*self.call_tags, self.answer_tag))

    @property
    def tags(self) -> tuple[str, ...]:
        """The names that only policy and protocol may put between angle brackets."""
        return self.think_tag, *self.call_tags, self.answer_tag, self.observation_tag

    @property
    def record(self) -> dict[str, Any]:
        """The content of sleuth.json of a policy that was trained on it: its name, and where it differs."""
        own = self.name in PROTOCOLS and PROTOCOLS[self.name].titles == self.titles
        titles = {} if own else {"titles": self.titles}
        told = {"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}
        own_tools = [name for name in self.tools if name in TOOLS]
        tools = {"tools": own_tools} if own_tools != [SEARCH.name] else {}
        form = {"answer_form": self.answer_form} if self.answer_form != "short" else {}
        abstains = {"may_abstain": True} if self.may_abstain else {}
        return {"protocol": self.name, **titles, **told, **tools, **form, **abstains}

    def prompt(self, question: str) -> str:
        """The instruction with the question in it, ending in a question mark as Search-R1 has it."""
        question = question.strip()
        if not question.endswith("?"):
            question += "?"
        more = "".join(self._describe_tool(name) for name in self.tools if name != SEARCH.name)
        more += (ASKED[self.answer_form] + MAY_ABSTAIN * self.may_abstain).replace("{tag}", self.answer_tag)
        return _fill(self.instruction, question=question, tools=more)

    def _describe_tool(self, name: str) -> str:
        """A further tool, in the words of the instruction."""
        tool = self.known_tools[name]
        if self.json_calls:
            call = write_call(Call(name, tool.example), self.known_tools)
            return f"Another tool, {name}, {tool.does}: <{self.search_tag}>{call}</{self.search_tag}>. "
        return f"<{name}> {tool.example} </{name}> {tool.does}. "

    def parse(self, turn: str) -> Action:
        """The first action in what the policy wrote in one turn. Never raises."""
        actions = "|".join((*self.call_tags, self.answer_tag))
        match = re.search(rf"<({actions})>(.*?)</\1>", turn, re.DOTALL)
        if match is None:
            return Invalid("no action")
        if match[1] == self.answer_tag:
            return Answer(*read_answer(match[2])) if self.answer_form != "short" else Answer(match[2].strip())
        call = self.read_call(match[1], match[2])
        empty_is_fine = self.allows_empty_query and call is not None and call.tool == SEARCH.name
        if call and call.tool in self.tools and (call.argument or empty_is_fine):
            return call
        return Invalid("empty query")

    def read_call(self, tag: str, inside: str) -> Call | None:
        """The call whose tag has this content; None where it is none."""
        if self.json_calls:
            return read_call(inside, self.known_tools)
        call = Call(self.call_tags[tag], replace_halves(inside.strip()))
        return call if self.known_tools[call.tool].arguments(call.argument) is not None else None

    def split_turn(self, turn: str) -> list[tuple[str, str]]:
        """The parts of a turn as (thought | name of a tool | answer | text, content); empty ones left out.

        "<think> a </think><search> b </search>" -> [("thought", "a"), ("search", "b")]
        """
        opens, closes = f"<{self.think_tag}>", f"</{self.think_tag}>"
        if closes in turn and opens not in turn.split(closes)[0]:
            turn = opens + turn  # the prompt began the thought
        labels = {self.think_tag: "thought", **self.call_tags, self.answer_tag: "answer"}
        parts, end = [], 0
        for match in re.finditer(rf"<({'|'.join(labels)})>(.*?)(?:</\1>|\Z)", turn, re.DOTALL):
            label, inside = labels[match[1]], match[2].strip()
            if match[1] in self.call_tags and (call := self.read_call(match[1], inside)):
                label, inside = call.tool, call.argument or inside
            parts += [("text", turn[end : match.start()].strip()), (label, inside)]
            end = match.end()
        parts.append(("text", turn[end:].strip()))
        return [(label, " ".join(content.split())) for label, content in parts if content]

    def opens_thought(self, before: str) -> bool:
        """Return whether the text before a turn has begun its thought, as some chat templates do."""
        return before.rstrip().endswith(f"<{self.think_tag}>")

    def is_well_formed(self, turn: str, before: str = "") -> bool:
        """Return whether a turn is one thought, then one action that says something, and nothing else.

        before: the text that it follows. Where that begins the thought, the turn may begin it once more or
        not; where it ends in an empty one, which is how templates say that nothing is to be thought, it may
        have none.
        """
        tag = rf"(?!</?(?:{'|'.join(self.tags)})>)"
        inside = rf"(?:{tag}.)*"
        opens, closes = f"<{self.think_tag}>", f"</{self.think_tag}>"
        thought = rf"\s*{opens}{inside}{closes}"
        if self.opens_thought(before):
            thought = rf"(?:\s*{opens})?{inside}{closes}"
        elif re.search(rf"{opens}\s*{closes}\s*\Z", before):
            thought = rf"(?:{thought})?"
        actions = "|".join((*self.call_tags, self.answer_tag))
        pattern = rf"{thought}\s*<({actions})>{inside}</\1>\s*"
        return re.fullmatch(pattern, turn, re.DOTALL) is not None and _says_something(self.parse(turn))

    def render_turn(self, thought: str, action: Call | Answer) -> str:
        """A turn as a demonstration writes it; `parse` gives the action back."""
        if isinstance(action, Answer):
            tag, inside = self.answer_tag, write_answer(action.text, action.confidence)
        elif self.json_calls:
            tag, inside = self.search_tag, write_call(action, self.known_tools)
        else:
            tag = next(tag for tag, tool in self.call_tags.items() if tool == action.tool)
            inside = action.argument
        before, after = self.padding
        return (
            f"<{self.think_tag}>{before}{thought}{after}</{self.think_tag}>"
            f"<{tag}>{before}{inside}{after}</{tag}>"
        )

    def render_passages(self, passages: list[Passage]) -> str:
        """The passages as the policy reads them, numbered from 1. Their text is taken as it is."""
        quoted = self.titles == "quoted"
        shown = (passage.lines if quoted else (passage.title, passage.text) for passage in passages)
        return "".join(
            _fill(self.passage, index=str(i), title=title, text=text)
            for i, (title, text) in enumerate(shown, start=1)
        ).strip()

    def render_observation(self, passages: str) -> str:
        """The observation around already rendered passages."""
        return _fill(self.observation, passages=passages)


def _says_something(action: Action) -> bool:
    """Return whether an action holds anything visible: more than blanks and characters of no width."""
    said = action.argument if isinstance(action, Call) else action.text if isinstance(action, Answer) else ""
    return any(c.isprintable() and not c.isspace() for c in said)


def _fill(template: str, **fields: str) -> str:
    """The template with its fields in, in one pass: a field's text is never read as a template."""
    return re.sub(r"\{(\w+)\}", lambda m: fields.get(m[1], m[0]), template)


SEARCH_R1 = Protocol(
    name="search_r1",
    instruction=(
        "Answer the given question. You must conduct reasoning inside <think> and </think> first "
        "every time you get new information. After reasoning, if you find you lack some knowledge, "
        "you can call a search engine by <search> query </search> and it will return the top "
        "searched results between <information> and </information>. You can search as many times "
        "as your want. {tools}If you find no further external knowledge needed, you can directly provide "
        "the answer inside <answer> and </answer>, without detailed illustrations. For example, "
        "<answer> Beijing </answer>. Question: {question}\n"
    ),
    passage="Doc {index}(Title: {title}) {text}\n",
    observation="\n\n<information>{passages}</information>\n\n",
    invalid=(
        "\nMy previous action is invalid. If I want to search, I should put the query between "
        "<search> and </search>. If I want to give the final answer, I should put the answer "
        "between <answer> and </answer>. Let me try again.\n"
    ),
    titles="quoted",
    keeps_eos=False,
    allows_empty_query=True,
)

COMPACT = Protocol(
    name="compact",
    instruction="Question: {question}\n",
    passage="{title}: {text}\n",
    observation="<information> {passages}</information>",
    invalid="<information> invalid action</information>",
    chat=False,
    padding=(" ", ""),
    max_turns=4,
    top_k=1,
    max_response_tokens=64,
    max_observation_tokens=160,
    max_context_tokens=1000,
)

HERMES = Protocol(
    name="hermes",
    instruction=(
        "Answer the question. First reason between <think> and </think>. You have one tool, "
        'search, which finds passages: <tool_call>{"name": "search", "arguments": {"query": '
        '"..."}}</tool_call>. It replies in <tool_response>. {tools}Search as often as you need, then '
        "write the short answer between <answer> and </answer>.\nQuestion: {question}"
    ),
    passage="Doc {index} (Title: {title}) {text}\n",
    observation=(
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n{passages}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    invalid=(
        "<|im_end|>\n<|im_start|>user\nThat was no valid action. Call search between <tool_call> "
        "and </tool_call>, or answer between <answer> and </answer>.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    search_tag="tool_call",
    observation_tag="tool_response",
    json_calls=True,
    message_header="<|im_start|>assistant\n",
)

UNQUOTED = {"titles": "unquoted", "keeps_eos": True, "allows_empty_query": False}
"""SEARCH_R1 as the first version of Sleuth wrote it; what was trained on that text goes on with it."""

PROTOCOLS = {protocol.name: protocol for protocol in (SEARCH_R1, COMPACT, HERMES)}


def get_protocol(
    name: str,
    titles: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[str] = (SEARCH.name,),
) -> Protocol:
    """Return the protocol of that name, with its own titles unless others are given. Raises ConfigError."""
    require(name in PROTOCOLS, "protocol", name, f"one of {', '.join(PROTOCOLS)}")
    require(titles in (None, "quoted", "unquoted"), "protocol.titles", titles, "quoted or unquoted")
    changes = {None: {}, "quoted": {"titles": "quoted"}, "unquoted": UNQUOTED}[titles]
    more: dict[str, Any] = {"chat_template_kwargs": dict(chat_template_kwargs or {}), "tools": tuple(tools)}
    return replace(PROTOCOLS[name], **changes, **more)
