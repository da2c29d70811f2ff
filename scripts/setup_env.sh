# Sourced by quickstart.sh and test.sh: `setup_env EXTRA "$@"` makes .venv/ with Sleuth in it, or
# reuses the one that is there, and leaves the arguments that are not its own in ARGS.
#
#   --torch-index URL   take torch from this index, e.g. one that holds CPU-only builds
#
# A stamp in .venv/ holds the hash of pyproject.toml it was installed from. macOS: not run.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NEEDED_GIB=4      # installed 2 GiB, and pip's downloads beside it
NEEDED_GPU_GIB=16 # CUDA builds

fail() {
    echo "sleuth: $*" >&2
    exit 2
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

find_python() { # print the first Python that is new enough
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, found $(python3 --version 2>&1 || echo none)"
}

make_venv() { # a new .venv/, unless the one there runs
    .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    local python
    python="$(find_python)" || exit 2
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)"
    "$python" -m venv --clear .venv >&2 || fail "could not make $ROOT/.venv with $python"
}

check_disk() {
    local needed=$NEEDED_GIB free
    has_gpu && needed=$NEEDED_GPU_GIB
    free=$(($(df -Pk "$ROOT" | awk 'NR == 2 {print $4}') / 1048576))
    ((free >= needed)) || fail "$needed GiB of disk are needed to install, $ROOT has $free free"
}

pip_install() {
    .venv/bin/python -m pip install -qq --no-input --disable-pip-version-check "$@" ||
        fail "pip could not install ${*: -1}: its reason stands above; start again to go on"
}

install() { # EXTRA TORCH_INDEX
    # Without a GPU the newest torch would bring gigabytes of CUDA: one exact version, first.
    local torch="torch==2.13.0"
    has_gpu && torch="torch>=2.11,<2.15"
    if [[ -n "$2" ]]; then
        pip_install --index-url "$2" "$torch"
    elif ! has_gpu; then
        pip_install "$torch"
    fi
    pip_install -e ".${1:+[$1]}"
}

setup_env() { # EXTRA [ARGUMENT...]
    local extra="$1" torch_index="" stamp hash
    shift
    ARGS=()
    while (($#)); do
        case "$1" in
        --torch-index=*) torch_index="${1#*=}" ;;
        --torch-index)
            (($# > 1)) || fail "--torch-index needs a URL"
            torch_index="$2"
            shift
            ;;
        *) ARGS+=("$1") ;;
        esac
        shift
    done
    cd "$ROOT" || exit 2
    make_venv
    stamp=".venv/installed-${extra:-plain}"
    hash="$(.venv/bin/python -c 'import hashlib
print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')"
    # The test extra holds all that the plain installation does.
    if grep -qxs "$hash" "$stamp" .venv/installed-test; then return; fi
    check_disk
    echo "sleuth: installing into $ROOT/.venv (2 GB, a minute or two)" >&2
    install "$extra" "$torch_index"
    echo "$hash" >"$stamp"
}
