#!/usr/bin/env bash
# The figures of docs/benchmarks.md, section Quickstart: three seeds, and the controls on the first.
#
#   bash scripts/bench/quickstart.sh [OUT]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${1:-runs/bench}"

for seed in 0 1 2; do
    sleuth quickstart --out "$out/seed-$seed" --seed "$seed"
done

world="$out/seed-0/world"
control() { # NAME POLICY RETRIEVER [OPTION...]
    local name="$1" policy="$2" retriever="$3"
    shift 3
    echo "-- control: $name"
    sleuth evaluate --policy "$policy" --questions "$world/test.jsonl" --retriever "$retriever" \
        --out "$out/controls/$name" "$@"
}
trained="$out/seed-0/policy"
control no-retriever "$trained" none
control random-passages "$trained" "random:$world/index"
control closed-book "$trained" "$world/index" --protocol.max_turns 0
control one-search "$trained" "$world/index" --protocol.max_turns 1

sleuth train --config scripts/configs/quickstart.yaml --questions "$world/train.jsonl" \
    --dev_questions "$world/dev.jsonl" --retriever "$world/index" \
    --out "$out/no-observation-mask" --mask_observations false
best="$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["step"])' \
    "$out/no-observation-mask/checkpoints/best.json")"
control no-observation-mask "$out/no-observation-mask/checkpoints/step-$(printf %06d "$best")" "$world/index"
control no-observation-mask-last "$out/no-observation-mask/checkpoints/step-000060" "$world/index"
