#!/usr/bin/env bash
# Install what the tests need into .venv/ and run them, from a bare checkout with Python 3.11+.
#
#   bash scripts/test.sh [--slow] [--torch-index URL] [pytest arguments]
#
# --slow adds the tests marked slow. Tests marked gpu run where there is one. A process for each core (at most 8),
# each with one thread; `-n 0` runs them in this one. macOS: not run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env test "$@"

marks="not slow"
pytest_args=()
for arg in ${ARGS[@]+"${ARGS[@]}"}; do
    if [[ "$arg" == --slow ]]; then marks=""; else pytest_args+=("$arg"); fi
done
has_gpu || marks="${marks:+$marks and }not gpu"

# Without compiled files every worker compiles all tests and modules anew: 17 seconds of a processor each.
unset PYTHONDONTWRITEBYTECODE
# More threads than free cores make torch spin.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers="$(.venv/bin/python -c 'import os; print(min(8, os.cpu_count() or 1))')"
exec .venv/bin/python -m pytest -n "$workers" --dist worksteal -m "$marks" ${pytest_args[@]+"${pytest_args[@]}"}
