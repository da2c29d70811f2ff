#!/usr/bin/env bash
# GRPO as Search-R1 ran it: Qwen2.5-3B on NQ + HotpotQA, with wiki-18 behind the retriever.
#
#   bash scripts/serve_retriever.sh &          # top-3 passages at 127.0.0.1:8000
#   bash scripts/train_grpo.sh [--key value ...]
#
# The recipe has 512 questions x 5 trajectories a step, 1005 steps, learning rate 1e-6, at most 4 searches,
# turns of 500 tokens, observations of 500, prompts of 4096; the preset clip .2, KL .001 (k3, in the loss), entropy
# .001, two updates a rollout. Options given here win over both. Not run on a GPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec sleuth train --config scripts/configs/search_r1_grpo.yaml "$@"
