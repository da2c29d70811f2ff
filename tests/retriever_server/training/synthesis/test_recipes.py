"""Recipes: every slot of every prompt is filled, draws depend on the seed alone."""

import re

import pytest
import yaml

from data.errors import ConfigError
from retriever_server.training.synthesis.recipes import OWN_FILE, fill, load_recipe, with_sampling

NAMES = list(yaml.safe_load(OWN_FILE.read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_no_slot_of_a_prompt_is_left_open(name):
    recipe = load_recipe(name)
    values = {"title": "Rhine", "passage": "It is long.", "shots": "Passage: a\nQuery: b\n", "task": "Find"}
    values |= recipe.draw({}, 0, "p", 0)
    for step in recipe.steps:
        prompt = fill(step.prompt, values)
        assert not re.search(r"\{\w+\}", prompt) and prompt
        values |= dict.fromkeys((*step.fields, *step.optional), "x")


def test_draws_depend_on_the_seed_and_the_passage_alone():
    recipe = load_recipe("qwen3")
    draws = [recipe.draw({}, 0, f"p{i}", 0) for i in range(40)]
    assert draws == [recipe.draw({}, 0, f"p{i}", 0) for i in range(40)]
    assert len({each["personas"] for each in draws}) > 30 and draws != [
        recipe.draw({}, 1, f"p{i}", 0) for i in range(40)
    ]
    assert all(each["personas"].count(";") == 4 for each in draws)


def test_languages_and_other_draws_can_be_chosen():
    drawn = {
        load_recipe("fret").draw({"language": ["German", "French"]}, 0, i)["language"] for i in range(20)
    }
    assert drawn == {"German", "French"}


def test_wrong_recipes_are_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe = 'fred': .*recipes\.yaml has e5, fret"):
        load_recipe("fred")
    own = tmp_path / "own.yaml"
    own.write_text("mine: {steps: [{prompt: 'Ask about {pasage}'}]}")
    with pytest.raises(ConfigError, match=r"mine: \{pasage\} is given by nothing"):
        load_recipe("mine", str(own))
    own.write_text("mine: {steps: [{prompt: x, fields: [task]}]}")
    with pytest.raises(ConfigError, match="no step has query"):
        load_recipe("mine", str(own))
    own.write_text("mine: {steps: [{prompt: x, sampling: {heat: 1}}]}")
    with pytest.raises(ConfigError, match="heat"):
        load_recipe("mine", str(own))
    fret = load_recipe("fret")
    for sampling, message in (
        ({"heat": 1}, "sampling: 'heat' is none of its settings"),
        ({"temperature": -1}, r"sampling\.temperature = -1: must be >= 0"),
        ({"max_tokens": "many"}, "max_tokens: got 'many', expected int"),
        ({"top_p": 0}, r"sampling\.top_p = 0: must be in"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_sampling(fret, sampling)
    for choices in ({"tongue": ["German"]}, {"language": "German"}, {"language": []}):
        with pytest.raises(ConfigError, match=r"choices.*: must be"):
            fret.check_choices(choices)
