#!/usr/bin/env bash
# PPO as Search-R1 ran it: Qwen2.5-3B on NQ + HotpotQA, with wiki-18 behind the retriever.
#
#   bash scripts/serve_retriever.sh &          # top-3 passages at 127.0.0.1:8000
#   bash scripts/train_ppo.sh [--key value ...]
#
# The recipe has 512 questions a step, answered once each, 1005 steps, learning rates 1e-6 (policy) and 1e-5
# (critic), at most 4 searches, turns of 500 tokens, observations of 500, prompts of 4096; the preset GAE with gamma
# and lambda 1, whitened, clip .2, KL .001 (k1, in the reward), entropy .001, value clip .5, two updates a rollout.
# Options given here win over both. Not run on a GPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec sleuth train --config scripts/configs/search_r1_ppo.yaml "$@"
