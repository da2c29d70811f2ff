"""PromptReps: a language model's next word as the vectors of a text (Zhuang et al. 2024)."""

from __future__ import annotations

from typing import Any, Literal

from retriever_server.encoders.checks import limit_tokens
from retriever_server.encoders.promptreps import PromptReps
from retriever_server.encoders.spec import KINDS
from retriever_server.training.builders.dense import Base, assemble, load_base

SYSTEM = "You are an AI assistant that can understand human language."
ASKED = (
    '{role}: "{text}". Use one word to represent the {name} in a retrieval task. '
    "Make sure your word is in lowercase."
)
SAID = 'The word is "'
"""The prompt of PromptReps' README."""


def promptreps(
    base: Base,
    representation: Literal["dense", "sparse"] = "dense",
    top_tokens: int = 128,
    max_tokens: int | None = 512,
    dtype: str = "float32",
) -> Any:
    """A language model's next word as dense or sparse vectors (`encoders/promptreps.py`); needs no training.

    The prompts are in the chat template of the model, or plain where it has none; they can be replaced
    by other templates with {text} (`sleuth index --query_prompt`). max_tokens: of the prompt and the text.
    """
    module = load_base(
        base,
        lambda name: PromptReps(
            name, representation=representation, top_tokens=top_tokens, model_kwargs={"dtype": dtype}
        ),
    )
    limit_tokens(module, max_tokens)
    prompts = [_ask(module.tokenizer, role) for role in ("Query", "Passage")]
    return assemble(KINDS[representation], [module], prompts[0], prompts[1])


def _ask(tokenizer: Any, role: str) -> str:
    asked = ASKED.replace("{role}", role).replace("{name}", role.lower())
    turns = [("system", SYSTEM), ("user", asked), ("assistant", SAID)]
    if not tokenizer.chat_template:
        return "\n".join(content for _, content in turns)
    messages = [{"role": speaker, "content": content} for speaker, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
