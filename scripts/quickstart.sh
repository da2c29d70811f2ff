#!/usr/bin/env bash
# From a fresh machine with Python 3.11+ to a policy that has learned to search, and its report.
#
#   bash scripts/quickstart.sh [--torch-index URL] [--out runs/quickstart] [other quickstart options]
#
# A second start reuses what is there. macOS: not run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env "" "$@"
exec .venv/bin/sleuth quickstart ${ARGS[@]+"${ARGS[@]}"}
