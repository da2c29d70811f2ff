#!/usr/bin/env bash
# Makes agent/seed_policy, the policies that the embedded world starts from: an hour on two CPU cores.
#
#   bash examples/seed_policy/make_seed_policy.sh OUT      # OUT is `atlas`, OUT-compares `atlas-compares`
#
# First all tokens are learnt, to read; then only what the policy itself would write; then more questions
# of two hops: `atlas`. Last come comparisons, first of values that the question tells, then of two passages.
# Demonstrations are over invented worlds: no real name is seen.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${1:?give a folder for the policy}"

two_hops='{one_hop: 0.25, two_hop: 0.6, three_hop: 0.075, comparison: 0.075}'

sleuth warm-start --out "$out-1" --invented 6400 --invented_seed 1 --training.steps 400 \
    --training.learning_rate 3e-3 --training.learn_everything true --training.group_by_length true
sleuth warm-start --policy "$out-1" --out "$out-2" --invented 48000 --invented_seed 2 --training.steps 3000 \
    --training.learning_rate 3e-3 --training.group_by_length true
sleuth warm-start --policy "$out-2" --out "$out-3" --invented 12800 --invented_seed 3 --training.steps 800 \
    --demonstrator.p_stop 0.5 --demonstrator.follow_ups 3 --demonstrator.kinds "$two_hops" \
    --training.learning_rate 2e-3 --training.group_by_length true
# Batches of all lengths at last: in batches of one length those who stop early count for more.
sleuth warm-start --policy "$out-3" --out "$out" --invented 6400 --invented_seed 4 --training.steps 400 \
    --demonstrator.p_stop 0.55 --demonstrator.follow_ups 3 --demonstrator.kinds "$two_hops" \
    --training.learning_rate 1e-3
# To compare two numbers that the question tells takes some 20,000 examples.
sleuth warm-start --policy "$out" --out "$out-5" --invented 22400 --invented_seed 5 --training.steps 350 \
    --demonstrator.tells true --demonstrator.compares true --demonstrator.p_right 0.3 --demonstrator.follow_ups 3 \
    --demonstrator.kinds '{one_hop: 0.03, two_hop: 0.03, three_hop: 0.01, comparison: 0.93}' \
    --training.optimizer adamw --training.batch_size 64 --training.learning_rate 2e-3 \
    --training.group_by_length true
sleuth warm-start --policy "$out-5" --out "$out-compares" --invented 19200 --invented_seed 6 \
    --demonstrator.compares true --demonstrator.p_right 0.5 --demonstrator.p_stop 0.55 \
    --demonstrator.follow_ups 3 --training.steps 600 \
    --demonstrator.kinds '{one_hop: 0.15, two_hop: 0.25, three_hop: 0.15, comparison: 0.45}' \
    --training.optimizer adamw --training.batch_size 32 --training.learning_rate 1e-3
