#!/usr/bin/env bash
# GRPO as Search-R1 ran it: Qwen2.5-3B on NQ + HotpotQA, with wiki-18 behind the retriever.
#
#   bash scripts/serve_retriever.sh &          # top-3 passages at 127.0.0.1:8000
#   bash scripts/train_grpo.sh [--key value ...]
#
# The recipe holds all settings: 512 questions x 5 trajectories a step, 1005 steps, learning rate
# 1e-6, clip 0.2, KL 0.001 (k3), at most 4 turns of 500 tokens, observations of 500, prompts of
# 4096. Options given here win over it. Not run on a GPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec sleuth train --config scripts/configs/search_r1_grpo.yaml "$@"
