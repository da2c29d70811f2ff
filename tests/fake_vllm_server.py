"""The fake vLLM as a server of its own: `python -m tests.fake_vllm_server --model POLICY --port PORT ...`.

What else a vLLM server is told is accepted, and means nothing here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import uvicorn

from agent.policy import load_policy
from tests.fake_vllm import FakeVLLM

ROOT = Path(__file__).parents[1]


def write_python(path: Path) -> str:
    """A program that stands for the Python of vLLM's environment: it starts the fake, whatever the module."""
    ours = f"env PYTHONPATH={ROOT} {sys.executable} -m tests.fake_vllm_server"
    path.write_text(f'#!/bin/sh\nshift 2\nexec {ours} "$@"\n')
    path.chmod(0o755)
    return str(path)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "host"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    given, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    policy = load_policy(given.model, "cpu", "float32")
    fake = FakeVLLM(policy.model, policy.tokenizer)
    uvicorn.run(fake.app, host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
