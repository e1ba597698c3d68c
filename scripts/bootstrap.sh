#!/usr/bin/env bash
# Make .venv and install the project into it; do nothing if that is done and nothing changed.
#   scripts/bootstrap.sh        what training needs
#   scripts/bootstrap.sh dev    and what tests need
# PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
venv=.venv

# A name on the PATH may be a shim that fails when run, so every candidate is run.
works() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

candidates() {
    [ -z "${PYTHON:-}" ] || echo "$PYTHON"
    printf '%s\n' python3.12 python3.13 python3
    local root
    for root in "${PYENV_ROOT:-}" "$HOME/.pyenv" /opt/pyenv; do
        [ -z "$root" ] || printf '%s\n' "$root"/versions/3.12*/bin/python3 "$root"/versions/3.13*/bin/python3
    done
    printf '%s\n' /usr/bin/python3.12 /usr/local/bin/python3.12 /opt/homebrew/bin/python3.12
    ! command -v uv >/dev/null 2>&1 || uv python find '>=3.12,<3.14' 2>/dev/null || true
}

find_python() {
    local candidate
    while IFS= read -r candidate; do
        if works "$candidate"; then
            echo "$candidate"
            return
        fi
    done < <(candidates)
}

make_venv() {
    local python
    python=$(find_python)
    if [ -n "$python" ]; then
        echo "python: $python ($("$python" --version))"
        "$python" -m venv --clear "$venv"
    elif [ -z "${PYTHON:-}" ] && command -v uv >/dev/null 2>&1; then
        echo "no Python 3.12 or 3.13 found; uv fetches one"
        uv venv --clear --seed --python 3.12 "$venv"
    else
        cat >&2 <<'MESSAGE'
error: no working Python 3.12 or 3.13 found (megatron-core 0.19 needs 3.12 and has no wheel for 3.14).
Install one, then run make again:
  Debian/Ubuntu   apt install python3.12 python3.12-venv      (or from deadsnakes)
  pyenv           pyenv install 3.12
  conda           conda create -n py312 python=3.12 && PYTHON=$(conda run -n py312 which python) make ...
  uv              curl or pip install uv; make finds it and lets it fetch Python
or name one: make PYTHON=/path/to/python3.12 ...
MESSAGE
        exit 1
    fi
}

stamp=$venv/.installed${extras:+-$extras}
wanted=$(cat pyproject.toml constraints.txt scripts/bootstrap.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

works "$venv/bin/python" || make_venv
echo "installing cca-megatron${extras:+ with extras: $extras} into $venv (about 5 GB, mostly PyTorch with CUDA)"
quiet=--quiet
[ -t 1 ] && quiet=
# shellcheck disable=SC2086  # $quiet may be nothing
"$venv/bin/python" -m pip install $quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extras:+[$extras]}"
# The extras contain the core, so its installation is done too.
echo "$wanted" >"$stamp"
echo "$wanted" >"$venv/.installed"
