"""A class_path is found beside its file, and called only once all of the file fits what is due."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import ConfigError
from retriever_server.open_retriever import open_retriever, plan_file, plan_retriever
from retriever_server.retriever import Retriever
from retriever_server.retrievers.rerank import Scorer

ROOT = Path(__file__).parents[2]
HEAD = """
from retriever_server.retriever import Retriever
from retriever_server.retrievers.rerank import Scorer
"""
OWN = """
class Mine(Retriever):
    generation = "mine"
    def __init__(self, words, size: int = 3, inner: Retriever | None = None, anything=None):
        self.words, self.size, self.inner = words, size, inner
        open("called", "a").close()
    def search(self, queries, k, where=None):
        return [[] for _ in queries]
class Half(Retriever):
    pass
class Other:
    pass
class Numbers(Scorer):
    name = "numbers"
    def score(self, pairs):
        return [0.0 for _ in pairs]
class Fails(Mine):
    def __init__(self, words):
        raise KeyError("no such words")
def mine(words) -> Retriever:
    return Mine(words)
def unsaid(words):
    open("called", "a").close()
def lies(words) -> Retriever:
    return Other()
instance = Mine.__new__(Mine)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module of the user's own; the working directory is another."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(HEAD + OWN)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    sys.modules.pop(name, None)


def own(folder):
    return f"own_{folder.name}".replace("-", "_")


def write(folder, text):
    path = folder / "r.yaml"
    path.write_text(text.replace("OWN", own(folder)))
    return str(path)


def called(folder):
    return (folder / "elsewhere" / "called").exists()


def refused(folder, text):
    with pytest.raises(ConfigError) as caught:
        open_retriever(write(folder, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_module_beside_the_file_is_found_from_any_working_directory(folder):
    opened = open_retriever(write(folder, "class_path: OWN.Mine\ninit_args: {words: [a], size: 5}"))
    assert (opened.words, opened.size) == (["a"], 5)  # type: ignore[attr-defined]
    assert open_retriever(write(folder, "class_path: OWN.mine\ninit_args: {words: a}")).generation == "mine"


def test_a_module_in_the_working_directory_is_found(folder, tmp_path):
    (folder / f"{own(folder)}.py").rename(folder / "elsewhere" / f"{own(folder)}.py")
    assert open_retriever(write(folder, "class_path: OWN.Mine\ninit_args: {words: a}")).generation == "mine"


def test_a_module_in_a_folder_without_init_is_found(folder):
    (folder / "plain").mkdir()
    (folder / f"{own(folder)}.py").rename(folder / "plain" / f"{own(folder)}.py")
    assert open_retriever(write(folder, "class_path: plain.OWN.Mine\ninit_args: {words: a}"))


def test_a_nested_file_looks_beside_itself(folder):
    (folder / "below").mkdir()
    (folder / f"{own(folder)}.py").rename(folder / "below" / f"{own(folder)}.py")
    (folder / "below" / "inner.yaml").write_text(f"class_path: {own(folder)}.Mine\ninit_args: {{words: a}}")
    text = f"class_path: Cached\ninit_args: {{retriever: {folder}/below/inner.yaml}}"
    assert open_retriever(write(folder, text)).generation == "mine"


def test_of_two_modules_of_one_name_the_second_is_refused_never_mistaken(folder):
    assert open_retriever(write(folder, "class_path: OWN.Mine\ninit_args: {words: a}"))
    (folder / "other").mkdir()
    (folder / "other" / f"{own(folder)}.py").write_text(HEAD + OWN.replace("Mine", "Yours"))
    with pytest.raises(ConfigError, match=r"another own_\w+ is in use, .* rename one of the two"):
        open_retriever(write(folder / "other", f"class_path: {own(folder)}.Yours\ninit_args: {{words: a}}"))


@pytest.mark.parametrize(
    "line",
    [
        "class_path: os.system\ninit_args: {command: touch called}",
        "class_path: subprocess.Popen\ninit_args: {args: touch called, shell: true}",
        "class_path: subprocess.run\ninit_args: {args: touch called}",
        "class_path: builtins.eval\ninit_args: {source: \"open('called', 'w')\"}",
        "class_path: builtins.exec",
        "class_path: pathlib.Path.touch",
        "class_path: OWN.unsaid\ninit_args: {words: a}",
        "class_path: Cached\ninit_args: {retriever: {class_path: os.system, init_args: {command: x}}}",
        "class_path: Fuse\ninit_args: {parts: [{class_path: OWN.mine, init_args: {words: a}}, nowhere]}",
        "class_path: OWN.Mine\ninit_args: {words: {class_path: os.system, init_args: {command: x}}}",
        "class_path: OWN.Mine\ninit_args: {words: a, anything: {class_path: subprocess.Popen}}",
        "class_path: OWN.Mine\ninit_args: {words: a, inner: {class_path: OWN.Numbers}}",
    ],
)
def test_nothing_is_called_that_is_not_of_the_interface(folder, line):
    assert "r.yaml: " in refused(folder, line)
    assert not called(folder)


WRONG = {
    "class_path: OWN": "class_path: 'OWN' must be one of open_index",
    "class_path: OWN.Mind": "defines no Mind, but Mine",
    "class_path: OWN.Other": "class_path: OWN.Other is no Retriever",
    "class_path: OWN.Half": "class_path: OWN.Half is abstract: it lacks search",
    "class_path: OWN.instance": "OWN.instance is no class, but a Mine; expected a Retriever",
    "class_path: OWN.unsaid": "is a function that does not say, by `-> ...`, that it gives a Retriever",
    "class_path: OWN.lies\ninit_args: {words: a}": "OWN.lies gave a Other, no Retriever",
    "class_path: retriever_server.retriever": "'retriever_server.retriever': ",
    "class_path: OWN.Mine": "init_args: missing: words",
    "class_path: OWN.Mine\ninit_args: {words: null}": "init_args: missing: words",
    "class_path: OWN.Mine\ninit_args: {words: a, size: many}": "init_args: size: got 'many', expected int",
    "class_path: OWN.Mine\ninit_args: {words: a, size: null}": "init_args.size: got null, expected int",
    "class_path: OWN.Mine\ninit_args: {word: a}": "init_args.word: unknown key; OWN.Mine takes words, size",
    "class_path: OWN.Mine\ninit_args: [a]": "class_path must be a string, init_args a mapping",
    "class_path: OWN.Mine\ninit_args: {words: a, inner: 3}": "init_args.inner: got 3, expected Retriever",
    "class_path: OWN.Fails\ninit_args: {words: a}": "init_args: OWN.Fails: KeyError: 'no such words' (",
    "class_path: Fuse\ninit_args: {parts: [none, 3]}": "init_args.parts: expected a list of Retriever",
    "class_path: Fuse\ninit_args: {parts: {a: none}}": "init_args.parts: expected a list of Retriever",
    "class_path: Fuse\ninit_args: {parts: null}": "init_args.parts: got null, expected",
    "class_path: Cached\ninit_args: {retriever: [none]}": "init_args.retriever: expected one Retriever",
    "class_path: Rerank\ninit_args: {retriever: none, scorer: {class_path: Cached}}": "Cached is no Scorer",
    "class_path: Rerank\ninit_args: {retriever: none, scorer: OWN.Numbers}": "expected Scorer, such as",
    "class_path: a..b": "'a..b' must be like module.name",
    "class_path: 3": "class_path must be a string",
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG.items(), ids=range(len(WRONG)))
def test_what_does_not_fit_is_one_line(folder, text, said):
    assert said.replace("OWN", own(folder)) in refused(folder, text)


def test_a_module_is_not_run_to_find_that_it_lacks_the_name(folder):
    (folder / f"{own(folder)}.py").write_text("open('called', 'w')\n" + HEAD + OWN)
    assert "defines no Nobody" in refused(folder, "class_path: OWN.Nobody")
    assert not called(folder)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Mine(:\n", "line 1: not Python: invalid syntax"),
        (
            "import no_such_thing\nclass Mine: ...\n",
            "cannot be imported: ModuleNotFoundError: No module named",
        ),
        ("Mine = 1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero ("),
        ("import sys\nMine = sys.exit('bye')\n", "cannot be imported: SystemExit: bye ("),
    ],
)
def test_a_module_that_breaks_is_one_line(folder, source, said):
    (folder / f"{own(folder)}.py").write_text(source)
    assert said in refused(folder, "class_path: OWN.Mine")


def test_all_of_a_file_is_checked_before_any_of_it_is_built(folder):
    text = "class_path: Fuse\ninit_args: {parts: [{class_path: OWN.Mine, init_args: {words: a}}, nowhere]}"
    assert "init_args.parts[1]: retriever 'nowhere'" in refused(folder, text)
    assert not called(folder)
    plan = plan_retriever(write(folder, "class_path: OWN.Mine\ninit_args: {words: a}"))
    assert not called(folder)
    assert plan().generation == "mine" and called(folder)


def test_a_file_may_be_of_one_of_several_interfaces(folder):
    path = Path(write(folder, "class_path: OWN.Numbers"))
    assert plan_file(path, (Scorer, Retriever))().name == "numbers"
    with pytest.raises(ConfigError, match="is no Retriever"):
        plan_file(path, (Retriever,))


def test_the_command_finds_what_lies_where_it_runs(folder):
    (folder / "my_search.py").write_text(HEAD + OWN)
    (folder / "r.yaml").write_text("class_path: my_search.Mine\ninit_args: {words: a}")
    command = [sys.executable, "-P", "-m", "scripts", "search", "q", "--retriever"]
    for spec, cwd in (("r.yaml", folder), (str(folder / "r.yaml"), folder / "elsewhere")):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, spec], cwd=cwd, env=env, capture_output=True, text=True)
        assert "nothing found for 'q'" in done.stdout, done.stderr
