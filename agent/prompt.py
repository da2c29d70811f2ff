"""The prompt of a trajectory: an instruction with its question, in the policy's chat template if it has one.

What the template puts around the instruction is rendered once and kept as a `PromptFrame`. A run keeps it
on disk: templates may say what day it is, and a run that goes on tomorrow must ask as it did today.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.protocol import Protocol
from data.errors import ConfigError, DataError
from data.jsonl import read_json, write_json
from data.records import FORMAT_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FILE = "prompt.json"


@dataclass(frozen=True)
class PromptFrame:
    """Text before and after an instruction; none where there is no chat template."""

    before: str = ""
    after: str = ""
    chat: bool = False
    """True within a chat template: it says what a text begins with, so the tokenizer adds no token."""
    strips: bool = False
    """The template takes blanks off the ends of the instruction."""

    def wrap(self, text: str) -> str:
        """The prompt around an instruction."""
        return self.before + (text.strip() if self.strips else text) + self.after

    def opening(self, protocol: Protocol) -> str:
        """The text of the template at the start of each of the policy's messages, such as "<think>\\n"."""
        header = protocol.message_header
        return self.after.rpartition(header)[2] if header and header in self.after else ""

    def fit(self, protocol: Protocol) -> Protocol:
        """The protocol, each message that it begins for the policy begun as the template begins one."""
        opening = self.opening(protocol)
        changes = {"observation": protocol.observation + opening, "invalid": protocol.invalid + opening}
        return replace(protocol, **changes) if opening else protocol


def encode_prompt(
    text: str, protocol: Protocol, tokenizer: PreTrainedTokenizerBase, frame: PromptFrame | None = None
) -> tuple[str, list[int]]:
    """A prompt as it begins a trajectory, text and token ids; in `frame`, or in one that is made now."""
    frame = frame or make_frame(protocol, tokenizer)
    prompt = frame.wrap(text)
    return prompt, tokenizer.encode(prompt, add_special_tokens=not frame.chat)


def make_frame(protocol: Protocol, tokenizer: PreTrainedTokenizerBase) -> PromptFrame:
    """The frame that the tokenizer's chat template makes. Raises ConfigError."""
    if not (protocol.chat and tokenizer.chat_template):
        if protocol.chat_template_kwargs:
            raise ConfigError("protocol.chat_template_kwargs: there is no chat template that could read them")
        return PromptFrame()
    _check_arguments(protocol.chat_template_kwargs, tokenizer)
    text = protocol.prompt("Why")
    for content in (text, [{"type": "text", "text": text}]):  # the second as models that see want it
        prompt = _render(content, protocol.chat_template_kwargs, tokenizer)
        for said in (text, text.strip()):
            if prompt.count(said) == 1:
                before, _, after = prompt.partition(said)
                return PromptFrame(before, after, chat=True, strips=said != text)
    does = "repeats" if text.strip() in prompt else "drops"
    raise ConfigError(f"protocol {protocol.name}: the policy's chat template {does} what the user says")


def frozen_frame(folder: Path, protocol: Protocol, tokenizer: PreTrainedTokenizerBase) -> PromptFrame:
    """The frame kept in `folder`; where there is none for this protocol, one that is made now and kept."""
    file, made = folder / PROMPT_FILE, make_frame(protocol, tokenizer)
    asked = {"chat": made.chat, "chat_template_kwargs": dict(protocol.chat_template_kwargs)}
    if file.exists():
        try:
            record = read_json(file)
            if record["asked"] == asked:
                return PromptFrame(**record["frame"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}: no frame of prompts: {error!r}") from error
    write_json(file, {"format_version": FORMAT_VERSION, "asked": asked, "frame": asdict(made)})
    return made


def _check_arguments(arguments: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for what no template may be given, or this one never reads."""
    template = tokenizer.get_chat_template()
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in arguments:
        if name in ours or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(
                f"protocol.chat_template_kwargs.{name}: the policy's chat template reads no such word"
            )


def _render(content: Any, arguments: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": content}]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
        )
    except (TemplateError, TypeError, ValueError) as error:
        told = f" with {dict(arguments)}" if arguments else ""
        raise ConfigError(
            f"the policy's chat template fails{told}: {' '.join(str(error).split())}"
        ) from error
