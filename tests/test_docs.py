"""Every command that README.md and docs/ print is executed as printed, page by page, block by block.

A page's blocks run in order in one folder, which holds stand-ins for the reader's own files and for models
of the hub. Servers go to the background on free ports; `sleuth train` and `quickstart` are cut to a step.
What `# -> TEXT` promises in a block of Python must be printed. A comment before a block says otherwise:

    <!-- check: file NAME -->        the block is a file that later blocks read
    <!-- check: fails -->            each line ends with exit status 2
    <!-- check: output -->           each line was printed by the block before
    <!-- check: options, WHY -->     not run here: the commands, options and recipes that it names exist
    <!-- check: nothing, WHY -->     no command of ours
"""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.__main__ import COMMANDS
from scripts.command_line import joined, keys_inside, known_keys, known_parser
from tests.docs_world import free_port, stand_ins

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("", "sh", "bash")
SMALLER = {
    "sleuth train ": "--steps 1 --eval_every 0 --rollout.questions_per_step 2 --rollout.group_size 2",
    "configs/search_r1_grpo.yaml": "--questions train.jsonl --retriever runs/index",  # not the hub's
    "sleuth train-retriever": "--steps 2 --batch_size 2",
    "quickstart.sh": "--steps 1 --limit 4",
    "sleuth evaluate ": "--limit 2",
    "sleuth matrix ": "--limit 2",
}
STAND_INS = {
    "policy smollm2": "policy atlas",
    "8000": "",
    "8001": "",
    "8002": "",
    "8003": "",
    "8004": "",
}  # ports: free ones


class Block(NamedTuple):
    """A fenced block of a page."""

    where: str
    language: str
    text: str
    check: str
    """The words of the comment before it; empty: it runs."""


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(
        r"(?:<!-- check: (.+?) -->\n+)?^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        line = text.count("\n", 0, found.start(2)) + 1
        yield Block(f"{page.name}:{line}", found[2], found[3], found[1] or "")


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block, options of several lines joined."""
    code = re.sub(r"\\\n\s*", " ", block.text)
    for line in code.splitlines():
        words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)
        for start, word in enumerate(words):
            if word == "sleuth" or words[start : start + 2] == ["-m", "scripts"]:
                yield words[start + (1 if word == "sleuth" else 2) :]
                break
            if word.startswith("scripts.") and words[start - 1] == "-m":
                yield words[start:]
                break


SHELL_BLOCKS = [
    block
    for page in PAGES
    for block in blocks(page)
    if block.language in SHELL and block.check not in ("fails", "output") and list(commands(block))
]


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.where)
def test_commands_and_options_exist(block):
    for name, *words in commands(block):
        if name in ("--help", "--version"):
            continue
        command = COMMANDS.get(name)
        module = importlib.import_module(command.module if command else name)
        assert command or name.startswith("scripts."), f"{block.where}: no command {name}"
        words = module.expand(words) if hasattr(module, "expand") else words
        parser = known_parser(module.main, name)
        words, keys = keys_inside(joined(words), parser)[0], known_keys(parser)
        keys = [*keys, *(key.rpartition(".")[0] for key in keys)]  # a group in YAML, or by a word
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--") and len(word) > 2}
        keys += [key.replace("_", "-") for key in keys]  # of a switch that stands alone
        assert given <= {*keys, "config", "help", "help-all", "print_config"}, f"{block.where}: {name}"
        assert all((ROOT / w).is_file() for w in words if w.startswith("scripts/") and w.endswith(".yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_runs_as_printed(page, tmp_path):
    text = page.read_text()
    stand_ins(tmp_path, ROOT, text)
    reader = Reader(tmp_path)
    try:
        if "127.0.0.1:8000" in text and "--port 8000" not in text:
            reader.follow(Block("before", "sh", "sleuth serve --index runs/index --port 8000", ""))
        done = [reader.follow(block) for block in blocks(page)]
    finally:
        reader.session.close()
    if not any(done):
        pytest.skip("nothing on this page runs here")


class Reader:
    """Follows the blocks of a page in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.session = folder, Session(folder)
        self.replaced = {name: other or str(free_port()) for name, other in STAND_INS.items()}
        self.python = self.output = ""

    def follow(self, block: Block) -> bool:
        """Do what the block is there for; return whether a command ran."""
        text = re.sub("|".join(self.replaced), lambda found: self.replaced[found[0]], block.text)
        how, _, rest = block.check.partition(" ")
        if how == "output":
            self.expect(text.splitlines(), block)
        elif how == "file" or re.match(r"# [\w.]+\.(py|yaml)\b", text):
            (self.folder / (rest or text.split()[1].rstrip(":"))).write_text(text)
        elif how == "fails":
            self.output = self.session.run(re.sub(r"(?m)$", " || [ $? = 2 ]", text.strip()), block.where)
        elif how:
            return False
        elif block.language == "python":
            self.python += text
            script = f"python - <<'END_OF_PYTHON'\n{self.python}\nEND_OF_PYTHON"
            self.output = self.session.run(script, block.where)
            self.expect(re.findall(r"# -> (.+)", text), block)
        elif block.language in SHELL[1:] or any(commands(block)) or "quickstart.sh" in text:
            self.output = self.session.run(smaller(text), block.where)
        else:
            return False
        return True

    def expect(self, lines: list[str], block: Block) -> None:
        """Raise an AssertionError unless each line was printed."""
        missing = [line for line in lines if not printed(line, self.output)]
        assert not missing, f"{block.where}: not printed: {missing}, but\n{self.output}"


def printed(promised: str, output: str) -> bool:
    """Return whether a line of the output is the promised one, in which `...` stands for anything."""
    pattern = ".*".join(map(re.escape, promised.strip().split("...")))
    return any(re.fullmatch(pattern, line.strip()) for line in output.splitlines())


def smaller(text: str) -> str:
    """Return the block with long commands cut short and servers in the background, awaited."""
    lines = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        code = re.sub(r"(\s{2,}|^)#.*", "", line).rstrip()
        if code == "bash scripts/test.sh":
            continue  # this is it
        for command, options in SMALLER.items():
            if command in code and "--help" not in code and "--print_config" not in code:
                code = re.sub(r"( >.*| &)?$", rf" {options}\1", code, count=1)
        if code.startswith("sleuth serve") and "--port" not in code:
            code += f" --port {free_port()}"
        if code.startswith("sleuth ask"):
            code += " || [ $? = 3 ]"  # the stand-in policy may end without an answer
        if found := re.match(r"sleuth serve(?:-agent)? .*--port (\d+)", code):
            ready, log = f"curl -sfo /dev/null http://127.0.0.1:{found[1]}/readyz", f"serve-{found[1]}.log"
            code = f"{code.removesuffix('&')} > {log} 2>&1 &\n"
            code += f"for i in $(seq 300); do {ready} && break; sleep .2; done; {ready} || cat {log}"
        lines.append(code)
    return "\n".join(lines)


class Session:
    """One bash that runs the blocks of a page, and all that they leave running."""

    def __init__(self, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._bash = subprocess.Popen(
            ["bash"], cwd=folder, env=environment, start_new_session=True, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, text: str, where: str) -> str:
        """Return what the block prints; an AssertionError where a command of it fails."""
        assert self._bash.stdin and self._bash.stdout
        self._bash.stdin.write(f"( set -e\n{text}\n) </dev/null; printf '\\nEND-OF-BLOCK %s\\n' $?\n")
        self._bash.stdin.flush()
        lines = []
        for line in self._bash.stdout:
            if line.startswith("END-OF-BLOCK"):
                assert line.split()[1] == "0", f"{where}\n{text}\n{''.join(lines)}"
                return "".join(lines)
            lines.append(line)
        raise AssertionError(f"{where}: bash ended\n{''.join(lines)}")

    def close(self) -> None:
        """End bash and everything that the page has started."""
        os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.wait()


def test_a_page_with_a_wrong_option_is_noticed(tmp_path):
    wrong = Block("x", "sh", "sleuth index --corpus c \\\n  --outt o   # a comment", "")
    assert list(commands(wrong)) == [["index", "--corpus", "c", "--outt", "o"]]
    with pytest.raises(AssertionError, match="index"):
        test_commands_and_options_exist(wrong)
    session = Session(tmp_path)
    with pytest.raises(AssertionError, match="No such file"):
        session.run("cat nothing", "x")
    session.close()
    assert shutil.which("bash")


def named_tests() -> Iterator[tuple[str, str, str]]:
    """(page, file, test) of every test that a line of a page names after its file."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            file = ""
            for word in re.findall(r"`([\w/.]+)`", line):
                if word.endswith(".py"):
                    file = word
                elif word.startswith("test_") and file:
                    yield page.name, file, word


def test_every_test_that_a_page_names_is_there():
    found = list(named_tests())
    assert len(found) > 15
    for page, file, name in found:
        files = (ROOT / "tests").rglob(Path(file).name)
        assert any(f"def {name}(" in path.read_text("utf-8") for path in files), f"{page}: {file}: {name}"


def test_every_place_that_the_architecture_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+(?:\.py|/))`", text)
    assert len(places) > 30
    assert not [place for place in places if not (ROOT / place).exists()]
