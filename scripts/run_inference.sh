#!/usr/bin/env bash
# Score a policy on Search-R1's test questions, greedily, with the retriever at 127.0.0.1:8000.
#
#   bash scripts/run_inference.sh [POLICY] [--key value ...]
#
# POLICY is a checkpoint folder or a hub name (default: the starting policy of train_grpo.sh).
# A second start goes on where the first one stopped. Not run on a GPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

policy="Qwen/Qwen2.5-3B"
if (($#)) && [[ "$1" != -* ]]; then
    policy="$1"
    shift
fi
exec sleuth evaluate --policy "$policy" --questions PeterJinGo/nq_hotpotqa_train --split test \
    --retriever http://127.0.0.1:8000 --out "runs/inference/${policy//\//-}" "$@"
