"""Count the files that a reader passes on three ways through the house.

    python -m scripts.bench.way [--before CHECKOUT]

    retriever   `sleuth train-retriever` from the command to the first loss of a dense model
    query       one search over HTTP, from a warm server's socket to its answer
    policy      one step of `sleuth train` on the atlas world: sixteen trajectories, with a gradient

A way is traced with `sys.setprofile` in every thread. `files` are those entered; `changes` are the calls from
a function of one file to a function of another, each pair once, so that loops do not count. Both checkouts
run with the packages of this Python.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

FLOORS = ("agent", "data", "retriever_server", "rl", "scripts")
_FINDER = "data/objects/moved.py"
HERE = Path(__file__).parents[2]
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
RECIPE = {
    "model": {"class_path": "dense", "init_args": {"base": {"config": BERT, "corpus": "atlas/corpus.jsonl"}}},
    "loss": {"class_path": "MultipleNegativesRankingLoss"},
    "train": [{"examples": "pairs/examples.jsonl", "corpus": "pairs/corpus.jsonl"}],
    "batch_size": 2,
    "steps": 2,
    "out": "model",
}  # fmt: skip
POLICY = "--policy atlas --questions atlas/train.jsonl --retriever atlas/index --out run --steps 2"
SMALL = "--rollout.questions_per_step 4 --rollout.group_size 4 --eval_every 0 --deterministic true"


class Way:
    """The files and changes of file of the calls that are seen while it is on."""

    def __init__(self, root: Path) -> None:
        self.inside = tuple(f"{root / floor}{os.sep}" for floor in FLOORS)
        self.on, self.files, self.changes = False, set[str](), set[tuple[str, str]]()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Take note of a call into one of our files."""
        if not self.on or event != "call" or not self._is_ours(frame):
            return
        self.files.add(frame.f_code.co_filename)
        caller = frame.f_back
        while caller is not None and not self._is_ours(caller):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != frame.f_code.co_filename:
            self.changes.add((_name(caller), _name(frame)))

    def _is_ours(self, frame: FrameType) -> bool:
        name = frame.f_code.co_filename  # Python itself asks the finder of old names, at every import
        return name.startswith(self.inside) and name != __file__ and not name.endswith(_FINDER)

    def start(self) -> None:
        """Begin anew."""
        self.files.clear()
        self.changes.clear()
        self.on = True

    def save(self, out: Path) -> None:
        """End, and write what was counted."""
        self.on = False
        counted = {"files": sorted(self.files), "changes": sorted(map(list, self.changes))}
        out.write_text(json.dumps(counted))


def _name(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"


def between_calls(of: type, method: str, way: Way, calls: int, out: Path) -> None:
    """Start the way after the first call of a method where `calls` is two; save it after the last of them."""
    original, seen = getattr(of, method), [0]

    def counted(*args: Any, **named: Any) -> Any:
        given = original(*args, **named)
        seen[0] += 1
        if seen[0] == calls:
            way.save(out)
        elif seen[0] < calls:
            way.start()
        return given

    setattr(of, method, counted)


def trace(name: str, out: Path, argv: list[str]) -> int:
    """Run a command of the checkout in the working directory's `PYTHONPATH`, traced."""
    root = Path(os.environ["PYTHONPATH"])
    way = Way(root)
    threading.setprofile(way)
    from scripts.__main__ import main

    if name == "retriever":
        from transformers import Trainer

        between_calls(Trainer, "training_step", way, 1, out)
        way.start()
    elif name == "policy":
        from data.run_dir import RunDir

        between_calls(RunDir, "log", way, 2, out)
    else:
        signal.signal(signal.SIGUSR1, lambda *_: way.start())
        signal.signal(signal.SIGUSR2, lambda *_: way.save(out))
    sys.setprofile(way)
    return main(argv)


def count(root: Path) -> dict[str, dict[str, list[Any]]]:
    """Walk the three ways of a checkout."""
    with tempfile.TemporaryDirectory(prefix="sleuth-way-") as scratch:
        folder = Path(scratch)
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

        def run(words: str, name: str = "") -> subprocess.Popen[bytes]:
            traced = [__file__, "--trace", name, "--out", f"{name}.json", "--"]
            module = traced if name else ["-m", "scripts"]
            with (folder / "log").open("ab") as log:
                command = [sys.executable, *module, *words.split()]
                return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

        def finish(words: str, name: str = "") -> None:
            if run(words, name).wait():
                raise SystemExit(f"{root}: sleuth {words}\n{(folder / 'log').read_text()[-2000:]}")

        finish("atlas --out atlas")
        finish("index --corpus atlas/corpus.jsonl --out atlas/index")
        (folder / "pairs.tsv").write_text(
            "query\tpositive\nrivers of France\tThe Loire.\ncapital of Italy\tRome.\n"
        )
        finish("convert --source pairs.tsv --source_format sentence-transformers --out pairs")
        (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
        finish("train-retriever --config recipe.yaml", "retriever")
        finish(f"train {POLICY} {SMALL}", "policy")
        _ask(lambda port: run(f"serve --index atlas/index --port {port}", "query"), folder / "query.json")
        names = ("retriever", "query", "policy")
        return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def _ask(serve: Callable[[int], subprocess.Popen[bytes]], out: Path) -> None:
    port = 20000 + os.getpid() % 20000
    server = serve(port)
    body = json.dumps({"queries": ["Where does the Loire end?"], "topk": 3, "return_scores": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/retrieve", body, {"content-type": "application/json"}
    )

    def search() -> bool:
        try:
            return bool(urllib.request.urlopen(request, timeout=10).read())
        except OSError:
            return False

    try:
        end = time.monotonic() + 120
        while not search():
            if time.monotonic() > end or server.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        server.send_signal(signal.SIGUSR1)
        time.sleep(1)
        # Another query: a cache would answer the first.
        request.data = body.replace(b"Loire", b"Rhine")
        search()
        server.send_signal(signal.SIGUSR2)
        while not out.exists():
            time.sleep(0.1)
        time.sleep(0.5)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Print the three ways of this checkout, beside those of another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument(
        "--show", choices=["retriever", "query", "policy"], help="list the changes of one way"
    )
    parser.add_argument("--trace", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("argv", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trace:
        raise SystemExit(trace(args.trace, args.out, args.argv))
    roots = [path.resolve() for path in [*([args.before] if args.before else []), HERE]]
    counts = [count(root) for root in roots]
    print(
        f"{'way':<10}" + "".join(f"{f'files {root.name}':>16}{f'changes {root.name}':>18}" for root in roots)
    )
    for name in counts[0]:
        cells = "".join(
            f"{len(found[name]['files']):>16}{len(found[name]['changes']):>18}" for found in counts
        )
        ratio = len(counts[-1][name]["changes"]) / len(counts[0][name]["changes"])
        print(f"{name:<10}{cells}" + (f"   {ratio:.2f} of the changes" if args.before else ""))
    for caller, callee in counts[-1][args.show]["changes"] if args.show else []:
        print(f"{Path(caller).relative_to(HERE)} -> {Path(callee).relative_to(HERE)}")


if __name__ == "__main__":
    main()
