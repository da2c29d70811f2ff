"""The `sleuth` command: a table of commands, one line for an error that is the user's to mend.

Nothing heavy is imported here, so `sleuth --help` answers at once. A command is a module of this
package with a `main` whose typed signature and docstring are its command line (`command_line.py`).

Exit status: 0 done, 1 our bug (with its traceback), 2 a one-line error, 3 nothing found, 130 interrupted.
"""

import difflib
import errno
import importlib
import importlib.metadata
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from data.errors import ConfigError, SleuthError
from scripts.console import end_bars


class Command(NamedTuple):
    """A module with a `main`, its line in `sleuth --help`, the option that needs no name."""

    module: str
    help: str
    positional: str | None = None


COMMANDS = {
    "quickstart": Command("scripts.quickstart", "corpus to trained policy, end to end, on a CPU"),
    "flagship": Command("scripts.flagship", "a language model learns what to search, with its controls"),
    "atlas": Command("scripts.atlas", "write the embedded corpus and its questions to a folder"),
    "corpus": Command("scripts.corpus", "cut documents into the passages of a corpus", "source"),
    "render": Command("scripts.render", "draw passages, PDF and HTML pages as pictures", "source"),
    "download": Command("scripts.download", "fetch a file, going on where it stopped", "url"),
    "sizes": Command("scripts.sizes", "what each kind of index costs for a corpus size"),
    "index": Command("scripts.index", "build an index from a corpus"),
    "serve": Command("scripts.serve", "serve an index over HTTP"),
    "serve-agent": Command("scripts.serve_agent", "serve a policy that searches, by OpenAI's chat API"),
    "search": Command("scripts.search", "print the passages found for a query", "query"),
    "ask": Command("scripts.ask", "watch a policy search and answer a question", "question"),
    "demonstrations": Command("scripts.demonstrations", "what warm-start learns from, out of questions"),
    "warm-start": Command("scripts.warm_start", "fine-tune a policy on demonstrations"),
    "train": Command("scripts.train", "train a policy by reinforcement learning"),
    "train-retriever": Command("scripts.train_retriever", "train a retriever or a reranker on examples"),
    "evaluate": Command("scripts.evaluate", "score a policy on a question set"),
    "evaluate-retriever": Command("scripts.evaluate_retriever", "score a retriever on a test collection"),
    "replay": Command("scripts.replay", "a trajectory again, with another retriever", "trajectory"),
    "matrix": Command("scripts.matrix", "policies x retrievers x passages x searches, each cell evaluated"),
    "compare": Command("scripts.compare", "runs of the same questions: paired differences, what flipped"),
    "audit": Command("scripts.audit", "which questions a corpus can answer at all"),
    "mine": Command("scripts.mine", "hard negatives, teachers' labels, query crops to train retrievers with"),
    "synthesize": Command("scripts.synthesize", "examples that a language model writes from passages"),
    "score-searches": Command("scripts.score_searches", "what passages of an agent's searches were worth"),
    "gate": Command("scripts.gate", "whether a new retriever may take the place of the old one"),
    "co-train": Command("scripts.co_train", "policy and retriever train each other, in rounds"),
    "convert": Command(
        "scripts.convert", "training data of other projects into ours, ours into theirs", "source"
    ),
    "expand": Command("scripts.expand", "add to each passage what a generator writes, for sparse retrievers"),
    "merge": Command("scripts.merge", "merge trained versions of a model by slerp"),
    "promptreps": Command("scripts.promptreps", "a language model as an encoder, without training"),
    "push": Command("scripts.push", "a trained policy or retriever to the hub, with its model card"),
    "report": Command("scripts.report", "write report.html of a run or of evaluations", "run"),
}
QUIET_LOGGERS = (
    "httpx",
    "httpx2",
    "httpcore",
    "mcp",
    "urllib3",
    "fsspec",
    "filelock",
    "datasets",
    "bm25s",
    "numba",
    "torch",
)
STDOUT = 1
USER_FILE_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def main(argv: list[str] | None = None, says_interrupted: bool = True) -> int:
    """The exit status of `sleuth ARGV...`; errors of the user's are one line on stderr."""
    return guarded(dispatch, sys.argv[1:] if argv is None else argv, says_interrupted)


def run_script(run: Callable[..., Any]) -> NoReturn:
    """Run a module that is no command, such as `python -m scripts.bench.encode`, by its `main`."""
    from scripts.command_line import call

    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec else sys.argv[0]
    sys.exit(guarded(lambda argv: call(run, argv, program) or 0, sys.argv[1:]))


def guarded(run: Callable[[list[str]], int], argv: list[str], says_interrupted: bool = True) -> int:
    """Return what `run` returns, or the exit status of its error: one line where it is the user's."""
    try:
        try:
            return run(argv)
        finally:
            end_bars()
            sys.stdout.flush()  # here, where a closed pipe is caught, not at exit
    except KeyboardInterrupt as error:
        return complain(str(error) or "interrupted", 130) if says_interrupted else 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        return complain("whoever read our output has stopped reading", 2)
    except SleuthError as error:
        return complain(str(error), 2)
    except USER_FILE_ERRORS as error:
        if error.filename is None:
            raise
        return complain(f"{error.strerror}: {error.filename}", 2)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return complain(f"{error.strerror}: {str(error.filename)[:80]}...", 2)
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # it is flushed at exit
        return complain("the disk is full", 2)


def dispatch(argv: list[str]) -> int:
    """Run the command that argv names; help and version need no command module."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"sleuth {importlib.metadata.version('sleuth-rl')}")
        return 0
    name, arguments = argv[0], argv[1:]
    if name not in COMMANDS:
        raise ConfigError(unknown_command(name))
    from scripts.command_line import call  # jsonargparse: 0.1 s that --help does not need

    command = COMMANDS[name]
    configure_process()
    module = importlib.import_module(command.module)
    arguments = module.expand(arguments) if hasattr(module, "expand") else arguments
    return call(module.main, arguments, prog=f"sleuth {name}", positional=command.positional) or 0


def usage() -> str:
    """Return the text of `sleuth --help`."""
    rows = "\n".join(f"  {name:<20}{command.help}" for name, command in COMMANDS.items())
    return (
        "usage: sleuth COMMAND [--config FILE.yaml] [--key value ...]\n\n"
        "Train language models to search.\n\n"
        f"{rows}\n\n"
        "`sleuth COMMAND --help` lists the options of a command; `sleuth --version` the version."
    )


def unknown_command(name: str) -> str:
    """The one-line complaint about a command that is none, with the closest that is."""
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(COMMANDS)}"
    return f"unknown command '{name}': {hint}"


def configure_process() -> None:
    """Log to stderr in short lines, let idle threads sleep, and end on SIGTERM as on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # what the terminal's encoding lacks is shown as its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # prints by itself, so once is enough
    # Read by OpenMP when torch is first imported: a waiting thread must not spin on a core that
    # the retriever server beside it could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def complain(message: str, status: int) -> int:
    """Print one line on stderr, and give the exit status back."""
    print(f"sleuth: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
