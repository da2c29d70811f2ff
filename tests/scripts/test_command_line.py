"""The command line: flat configurations, one-line errors, exit statuses."""

import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from data.errors import ConfigError, DataError
from scripts import __main__ as sleuth
from scripts.command_line import call, joined


@dataclass(frozen=True)
class Algorithm:
    """Settings of learning."""

    learning_rate: float = 1e-6
    """Step size of AdamW."""
    advantage: Literal["grpo", "rloo"] = "grpo"

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: got {self.learning_rate}, must be above 0")


@dataclass(frozen=True)
class Config:
    """All of a run."""

    out: Path
    """The run folder."""
    algorithm: Algorithm = field(default_factory=Algorithm)
    steps: int = 3
    seeds: list[int] = field(default_factory=list)
    stages: list[Algorithm] = field(default_factory=list)
    results: list[Path] | None = None


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `sleuth fake ...` -> (status, what its main got, stdout, stderr)."""

    def run_command(main, *argv, positional=None):
        got = []
        fake = types.ModuleType("fake_command")
        fake.__dict__["main"] = main(got)
        monkeypatch.setitem(sys.modules, "fake_command", fake)
        monkeypatch.setitem(sleuth.COMMANDS, "fake", sleuth.Command("fake_command", "a fake", positional))
        try:
            status = sleuth.main(["fake", *map(str, argv)])
        except SystemExit as stop:  # --help and --print_config
            status = stop.code
        return status, got, *capsys.readouterr()

    return run_command


def takes_config(got):
    def main(config: Config):
        """Train something."""
        got.append(config)

    return main


@dataclass(frozen=True)
class Speech:
    """Settings of speech."""

    name: str | None = None
    turns: int = 4


def takes_speech(got):
    def main(protocol: Speech = Speech(), steps: int = 1):
        """Speak."""
        got.append(protocol)

    return main


def takes_arguments(got):
    def main(question: str, top_k: int = 3):
        """Answer a question."""
        got.append((question, top_k))

    return main


def raises(error):
    def build(got):
        def main():
            """Fail."""
            raise error

        return main

    return build


def write(path, text):
    path.write_text(text)
    return path


def test_a_dataclass_appears_flat_and_the_command_line_wins_over_the_file(run, tmp_path):
    recipe = write(tmp_path / "r.yaml", "out: a\nsteps: 7\nalgorithm:\n  learning_rate: 1e-4\n")
    status, got, *_ = run(takes_config, "--config", recipe, "--algorithm.learning_rate", "3e-6")
    assert status == 0
    assert got == [Config(out=Path("a"), steps=7, algorithm=Algorithm(learning_rate=3e-6))]


@pytest.mark.parametrize(
    "text",
    ["protocol: compact  # a word\n", "protocol:\n  'compact'\nsteps: 3\n", "protocol: {name: compact}\n"],
)
def test_a_word_in_yaml_names_a_group(run, tmp_path, text):
    recipe = write(tmp_path / "r.yaml", text)
    for given in (["--config", recipe], [f"--config={recipe}"]):
        assert run(takes_speech, *given)[1] == [Speech("compact")]
        assert run(takes_speech, *given, "--protocol.turns", "2")[1] == [Speech("compact", 2)]


def test_a_word_on_the_line_names_a_group(run):
    assert run(takes_speech, "--protocol", "compact")[1] == [Speech("compact")]
    assert run(takes_speech, "--protocol.turns", "2", "--protocol=compact")[1] == [Speech("compact", 2)]
    assert run(takes_speech, "--protocol", "{turns: 3}")[1] == [Speech(None, 3)]


@pytest.mark.parametrize(
    ("given", "name", "found"),
    [
        ("--seeds=1,2", "seeds", [1, 2]), ("--seeds=[1, 2]", "seeds", [1, 2]), ("--seeds=3", "seeds", [3]),
        ("--results=a", "results", [Path("a")]), ("--results=null", "results", None),
    ],
)  # fmt: skip
def test_a_list_on_the_line_needs_no_brackets(run, given, name, found):
    assert getattr(run(takes_config, "--out", "x", given)[1][0], name) == found


def test_an_error_in_a_file_with_a_word_still_names_its_line(run, tmp_path):
    recipe = write(tmp_path / "r.yaml", "protocol: compact\nsteps: many\n")
    assert run(takes_speech, "--config", recipe)[3].startswith(f"sleuth: {recipe}, line 2: steps: got 'many'")


def test_a_key_twice_in_a_value_of_the_line_is_refused(run):
    err = run(takes_speech, "--protocol", "{turns: 3, turns: 4}")[3]
    assert err == "sleuth: --protocol: turns is given twice\n"


def test_print_config_round_trips(run, tmp_path):
    first = run(takes_config, "--out", "x", "--algorithm.advantage", "rloo", "--print_config")
    assert first[0] == 0 and first[1] == []
    recipe = write(tmp_path / "r.yaml", first[2])
    assert yaml.safe_load(first[2])["algorithm"]["advantage"] == "rloo"
    _, got, *_ = run(takes_config, "--config", recipe)
    assert got == [Config(out=Path("x"), algorithm=Algorithm(advantage="rloo"))]


def test_field_docstrings_become_the_help(run):
    status, _, out, _ = run(takes_config, "--help")
    assert status == 0 and "Step size of AdamW." in out and "Train something." in out


ONE_LINE_ERRORS = {
    "out: x\nalgorithm:\n  learning_rat: 1\n": "{file}, line 3: unknown key algorithm.learning_rat;"
    " did you mean algorithm.learning_rate?",
    "out: x\nzzzz: 1\n": "{file}, line 2: unknown key zzzz; allowed: out, algorithm.learning_rate",
    "out: x\nalgorithm:\n  advantage: gae\n": "{file}, line 3: algorithm.advantage: got 'gae', "
    "expected one of 'grpo', 'rloo'",
    "out: x\nalgorithm: 3\n": "{file}, line 2: algorithm: got 3, allowed: algorithm.learning_rate",
    "out: x\nsteps: null\n": "{file}, line 2: steps: got null, expected int",
    "out: x\nsteps: 1.5\n": "{file}, line 2: steps: got '1.5', expected int",
    "out: x\nalgorithm:\n  learning_rate: -1\n": "learning_rate: got -1.0, must be above 0",
    "out: x\n  steps: 1\n": "{file}, line 2: not YAML: mapping values are not allowed here",
    "steps: 1\n": "missing: --out (see sleuth fake --help)",
    "- 1\n": "{file}, line 1: keys and values are expected",
    "out: x\nsteps: 1\nout: y\n": "{file}, line 3: out is given twice, first on line 1",
    "out: x\nalgorithm: {learning_rate: 1, learning_rate: 2}\n": "{file}, line 2: learning_rate is given"
    " twice",
    "out: x\nalgorithm.advantage: grpo\nalgorithm:\n  advantage: rloo\n": "{file}, line 4: "
    "algorithm.advantage is given twice, first on line 2",
}


@pytest.mark.parametrize(("text", "message"), ONE_LINE_ERRORS.items())
def test_a_wrong_file_is_one_line_naming_place_key_and_what_is_allowed(run, tmp_path, text, message):
    recipe = write(tmp_path / "r.yaml", text)
    status, got, _, err = run(takes_config, "--config", recipe)
    assert status == 2 and not got
    assert err.startswith("sleuth: " + message.format(file=recipe)) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "x", "--step", "3"], "unknown key step; did you mean steps?"),
        (["--out", "x", "--steps", "many"], "steps: got 'many', expected int"),
        (["--out", "x", "--seeds", "{a: 1}"], "seeds: got \"{'a': 1}\", expected list, such as [a, b]"),
        (
            ["--out", "x", "--stages", "[{learning_rat: 1}]"],
            "stages: unknown key learning_rat; did you mean learning_rate?",
        ),
        (
            ["--out", "x", "--stages", "[{learning_rate: a}]"],
            "stages: learning_rate: got 'a', expected float",
        ),
        (["--config", "none.yaml"], "--config none.yaml: no such file"),
    ],
)
def test_a_wrong_argument_is_one_line(run, argv, message):
    status, _, _, err = run(takes_config, *argv)
    assert (status, err) == (2, f"sleuth: {message}\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["who: is it?", "--top_k", "5"],
        ["--top_k", "5", "who: is it?"],
        ["--top_k=5", "who: is it?"],
        ["--question", "who: is it?", "--top_k=5"],
    ],
)
def test_the_natural_argument_needs_no_name(run, argv):
    assert run(takes_arguments, *argv, positional="question")[1] == [("who: is it?", 5)]


def test_only_one_value_is_named_and_the_rest_is_refused(run):
    assert joined(["a", "b"], "q") == ["--q=a", "b"]
    status, _, _, err = run(takes_arguments, "who", "is", "it", positional="question")
    assert status == 2 and "unrecognized arguments: is it" in err


def test_a_file_that_is_read_is_not_written_over(run, tmp_path):
    def takes_files(got):
        def main(questions: str, out: Path, runs: list[Path] | None = None):
            """Write one file."""
            got.append(out)

        return main

    given, link = write(tmp_path / "q.jsonl", "{}"), tmp_path / "link"
    link.symlink_to(given)
    (tmp_path / "run").mkdir()
    scores, page = write(tmp_path / "run" / "scores.json", "{}"), write(tmp_path / "run" / "page.html", "")
    for questions, runs, out in (
        (f"a.jsonl,{link}", "null", given),
        ("a.jsonl", f"[b, {given}]", given),
        ("a.jsonl", f"['b,{tmp_path}/run']", scores),
    ):
        status, got, _, err = run(takes_files, "--questions", questions, "--out", out, "--runs", runs)
        assert status == 2 and not got and "must be another file than" in err and err.count("\n") == 1
    assert run(takes_files, "--questions", given, "--out", tmp_path / "new")[0] == 0
    assert run(takes_files, "--questions", given, "--out", page, "--runs", f"[{tmp_path}/run]")[0] == 0
    for out in (tmp_path / "q.jsonl" / "new", tmp_path / "q.jsonl" / "a" / "b"):
        status, got, _, err = run(takes_files, "--questions", "a.jsonl", "--out", out)
        assert (status, got) == (2, []) and err == f"sleuth: {out}: cannot be written: Not a directory\n"
    assert sorted(os.listdir(tmp_path)) == ["link", "q.jsonl", "run"]  # nothing is left of looking


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("corpus.jsonl, line 3: no id"), 2, "corpus.jsonl, line 3: no id"),
        (FileNotFoundError(2, "No such file or directory", "c.jsonl"), 2, "c.jsonl"),
        (FileExistsError(17, "File exists", "c.jsonl"), 2, "File exists: c.jsonl"),
        (BrokenPipeError(), 2, "stopped reading"),
        (OSError(28, "No space left on device"), 2, "the disk is full"),
        (OSError(36, "File name too long", "a" * 300), 2, f"File name too long: {'a' * 80}..."),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("go on with: sleuth train"), 130, "go on with: sleuth train"),
    ],
)
def test_errors_that_are_not_ours_are_one_line(run, monkeypatch, error, status, line):
    monkeypatch.setattr("os.dup2", lambda *_: None)
    got_status, _, _, err = run(raises(error))
    assert got_status == status and err.count("\n") == 1
    assert err.startswith("sleuth: ") and line in err


@pytest.mark.parametrize("error", [ValueError("shape"), KeyError("k")])
def test_our_own_bugs_keep_their_traceback(run, error):
    with pytest.raises(type(error)):
        run(raises(error))


def test_an_unknown_command_names_the_closest(capsys):
    assert sleuth.main(["evalute"]) == 2
    assert capsys.readouterr().err == "sleuth: unknown command 'evalute': did you mean 'evaluate'?\n"


def test_help_and_version_load_nothing_heavy():
    code = (
        "import sys; from scripts.__main__ import main\n"
        "assert main([]) == main(['--help']) == main(['--version']) == 0\n"
        "print({'torch', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in sleuth.COMMANDS)
    assert "sleuth 0." in done.stdout and lines[-1] == "set()"


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        (["--big"], True),
        (["--big", "--k", "3"], True),
        (["--big", "false"], False),
        (["--so-big"], True),
        ([], False),
    ],
)
def test_a_switch_may_stand_alone(argv, given):
    def run(big: bool = False, so_big: bool = False, k: int = 1) -> bool:
        return big or so_big

    assert call(run, argv, "sleuth run") is given


def test_what_takes_words_may_be_a_switch_too():
    def run(controls: bool | str | None = None, k: int = 1) -> Any:
        return controls

    assert call(run, ["--controls"], "sleuth run") is True
    assert call(run, ["--controls", "--k", "3"], "sleuth run") is True
    assert call(run, ["--controls", "pairs"], "sleuth run") == "pairs"


def test_a_switch_with_a_wrong_value_is_refused():
    def run(big: bool = False) -> bool:
        return big

    with pytest.raises(ConfigError, match=r"big: got 'maybe', expected bool"):
        call(run, ["--big", "maybe"], "sleuth run")


@dataclass(frozen=True)
class Taught:
    """A configuration with a mapping of anything."""

    model: dict[str, Any]
    steps: int = 3


def test_an_option_inside_a_mapping_changes_it_and_leaves_the_rest(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: {class_path: dense, init_args: {base: a, dtype: x}}, changes: {}}")

    def main(config: Taught) -> Taught:
        return config

    options = ["--model.init_args.base", "b", "--steps", "4", "--model.init_args.more.depth=[1, 2]"]
    given = call(main, ["--config", str(recipe), *options], "sleuth fake")
    init_args = {"base": "b", "dtype": "x", "more": {"depth": [1, 2]}}
    assert given == Taught({"class_path": "dense", "init_args": init_args}, 4)
    with pytest.raises(ConfigError, match=r"--model\.init_args\.base: got '\[', which is no YAML"):
        call(main, ["--config", str(recipe), "--model.init_args.base", "["], "sleuth fake")
    with pytest.raises(ConfigError, match="missing: --model"):
        call(main, ["--model.init_args.base", "b"], "sleuth fake")
