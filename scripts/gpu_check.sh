#!/usr/bin/env bash
# For the first GPU that comes by: what of Sleuth works there, and how fast, in at most eight minutes.
#
#   bash scripts/gpu_check.sh [--out runs/gpu_check] [--seconds 480] [--parts packing,engine]
#
# No network, no weights but those that come with the checkout. A second start goes on with the parts that have no
# result. Writes gpu_check.json and gpu_check.md. Without a GPU everything runs small, to see that it runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
exec "$python" -m scripts.bench.gpu_check "$@"
