"""Recipes: the prompts of `recipes.yaml`, or of a file of one's own, filled from passages and draws."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from data.errors import ConfigError, require
from data.objects.class_path import Signature
from data.records import Passage
from data.yaml_file import read_yaml
from retriever_server.training.synthesis.drafts import Call, draw_seed
from retriever_server.training.synthesis.parsing import parse_fields, parse_line

OWN_FILE = Path(__file__).with_name("recipes.yaml")
_SLOT = re.compile(r"\{(\w+)\}")
_SAMPLING = ("temperature", "top_p", "max_tokens", "stop")
_ALWAYS = {"passage", "title", "task", "shots", "count", "kind"}


@dataclass(frozen=True)
class Step:
    """One call of the generator, and the fields that its reply must have."""

    prompt: str
    fields: tuple[str, ...] = ("query",)
    optional: tuple[str, ...] = ()
    format: Literal["json", "line"] = "json"
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def parse(self, text: str) -> dict[str, str]:
        """The fields of a reply. Raises Unparsable."""
        if self.format == "line":
            return {self.fields[0]: parse_line(text)}
        return parse_fields(text, self.fields, self.optional)

    def call(self, values: Mapping[str, str], passage: Passage | None, seed: int) -> Call:
        """The call with its prompt filled."""
        return Call(fill(self.prompt, values), seed, passage, **self.sampling)


@dataclass(frozen=True)
class Recipe:
    """A way to write training data: what is drawn, and the calls."""

    name: str
    steps: tuple[Step, ...]
    draws: Mapping[str, Any] = field(default_factory=dict)
    brainstorm: Mapping[str, Any] = field(default_factory=dict)
    """Calls that give tasks first; then there are no seed passages."""

    @property
    def writes_passages(self) -> bool:
        """Return whether positives or negatives are written, not found."""
        return any({"positive", "negative"} & {*step.fields, *step.optional} for step in self.steps)

    @property
    def drawn(self) -> set[str]:
        """Return the names of all that is drawn."""
        pairs = (each for each in self.draws.values() if isinstance(each, Mapping) and "sample" not in each)
        return {*self.draws, *(key for values in pairs for each in values.values() for key in each)}

    def check_choices(self, choices: Mapping[str, Any]) -> None:
        """Raise ConfigError where there is nothing to draw from, or what is drawn is used by nothing."""
        for name, values in choices.items():
            require(name in self.drawn, "choices", name, f"one of {', '.join(sorted(self.drawn))}")
            some = isinstance(values, list | Mapping) and bool(values)
            require(some, f"choices.{name}", values, "a list to draw from")

    def draw(self, choices: Mapping[str, Sequence[str]], seed: int, *of: object) -> dict[str, str]:
        """Draw one value of everything, for this query; `choices` replace those of the recipe."""
        rng = random.Random(draw_seed(seed, self.name, *of))
        drawn: dict[str, str] = {}
        for name, values in {**self.draws, **choices}.items():
            if isinstance(values, Mapping) and "sample" in values:
                some = rng.sample(list(values["of"]), min(values["sample"], len(values["of"])))
                drawn[name] = "; ".join(some)
            elif isinstance(values, Mapping):
                drawn[name] = rng.choice(sorted(values))
                drawn |= values[drawn[name]]
            else:
                drawn[name] = str(rng.choice(list(values)))
        return drawn


def load_recipe(name: str, path: str | None = None) -> Recipe:
    """The recipe of this name, of our file or another of the same form. Raises ConfigError."""
    where = Path(path) if path else OWN_FILE
    table = read_yaml(where) if path else yaml.safe_load(OWN_FILE.read_text(encoding="utf-8"))
    if name not in table:
        raise ConfigError(f"recipe = {name!r}: {where} has {', '.join(table)}")
    try:
        found = dict(table[name])
        steps = tuple(Step(**_tupled(step)) for step in found.pop("steps"))
        recipe = Recipe(name, steps, **found)
        _check(recipe, where)
        for step in steps:
            step.call({}, None, 0)  # its sampling has known names
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where}: {name}: {error}") from None
    return recipe


def _tupled(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in step.items()}


def _check(recipe: Recipe, where: Path) -> None:
    """Raise ConfigError where a prompt names something that nothing gives, or no step gives a query."""
    known = _ALWAYS | recipe.drawn
    for step in recipe.steps:
        if unknown := set(_SLOT.findall(step.prompt)) - known:
            given = ", ".join(sorted(known))
            raise ConfigError(
                f"{where}: {recipe.name}: {{{min(unknown)}}} is given by nothing; there is {given}"
            )
        known |= {*step.fields, *step.optional}
    if not any("query" in step.fields for step in recipe.steps):
        raise ConfigError(f"{where}: {recipe.name}: no step has query among its fields")


def fill(prompt: str, values: Mapping[str, Any]) -> str:
    """The prompt with what is known put in; braces of JSON stay.   "{a} {b}", a=1 -> "1 {b}" """
    return _SLOT.sub(lambda found: str(values.get(found[1], found[0])), prompt).rstrip("\n")


def with_sampling(recipe: Recipe, sampling: Mapping[str, Any]) -> Recipe:
    """The recipe with other sampling in all its steps. Raises ConfigError."""
    if unknown := sorted(sampling.keys() - _SAMPLING):
        raise ConfigError(f"sampling: {unknown[0]!r} is none of its settings: {', '.join(_SAMPLING)}")
    typed = Signature(Call, "sampling", "sampling").typed(sampling)
    sampling = typed | {key: value for key, value in sampling.items() if value == typed[key]}  # 0 stays 0
    steps = tuple(replace(step, sampling={**step.sampling, **sampling}) for step in recipe.steps)
    for step in steps:
        step.call({}, None, 0)
    return replace(recipe, steps=steps)
