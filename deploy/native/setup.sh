#!/bin/bash
# Install what the native stack lacks: servers by apt (root, or sudo once), Python packages into $VENV. When nothing
# is missing it only looks. Sourced, it defines its functions and does nothing.
set -eu

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV=${VENV:-.venv}
REQUIREMENTS=deploy/native/requirements.txt
OLDEST=3.11
# Where a plain user of Debian does not look, and its servers are.
LOOK_IN=$PATH:/usr/local/sbin:/usr/sbin:/sbin

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

has() { PATH=$LOOK_IN command -v "$1" >/dev/null 2>&1; }

is_root() { [ "$(id -u)" = 0 ]; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Print the Python to use: PYTHON if it is set, else the first that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if has "$candidate" && new_enough "$candidate"; then
            PATH=$LOOK_IN command -v "$candidate"
            return
        fi
    done
    local found
    found=$("${PYTHON:-python3}" --version 2>&1 || true)
    fail "Python $OLDEST or newer is needed, ${PYTHON:-python3} is ${found:-not there}: install one, or name it: PYTHON=/path/to/python3.12 make run"
}

# Whether it can make a virtual environment with pip in it.
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

# The Debian package that brings a Python its venv.
venv_package() {
    if [ "$(readlink -f "$1")" = "$(readlink -f /usr/bin/python3)" ]; then
        echo python3-venv
    else
        "$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
    fi
}

# Print the packages that are missing, on one line.
missing_packages() {
    local missing=""
    has nginx || missing="$missing nginx"
    has redis-server || missing="$missing redis-server"
    has rabbitmq-server || missing="$missing rabbitmq-server"
    installed_venv || has_venv "$1" || missing="$missing $(venv_package "$1")"
    echo "${missing# }"
}

confirm() {
    [ -z "${YES:-}" ] && [ -t 0 ] && [ -t 1 ] || return 0
    local answer
    read -r -p "Install now? [Y/n] " answer
    case $answer in [nN]*) fail "not installed: $1" ;; esac
}

install_packages() {
    local run="" script
    has apt-get || fail "missing: $1. There is no apt here: install them with this system's package manager, then make run"
    if ! is_root; then
        has sudo || fail "missing: $1. Only root can install them: as root, apt-get install -y $1, then make run again"
        run=sudo
    fi
    echo "These packages are missing and come from apt: $1${run:+ (sudo may ask for your password)}"
    confirm "$1"
    script="export DEBIAN_FRONTEND=noninteractive; apt-get update -q && apt-get install -y -q --no-install-recommends $1"
    echo "installing, about a minute"
    quietly "apt could not install $1" $run sh -c "$script"
}

# Run a command; only if it fails, show the end of what it said and this line.
quietly() {
    local problem=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        fail "$problem (all it said: $log)"
    fi
    rm -f "$log"
}

# What the virtual environment was made from: its Python and the list of packages.
stamp() { { "$1" --version && cat "$REQUIREMENTS"; } | cksum; }

installed_venv() { [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c 'import pip' 2>/dev/null; }

install_python_packages() {
    if installed_venv && [ "$(cat "$VENV/stamp" 2>/dev/null)" = "$(stamp "$VENV/bin/python")" ]; then
        return
    fi
    installed_venv || quietly "no virtual environment could be made in $VENV" "$1" -m venv --clear "$VENV"
    echo "installing Python packages into $VENV, about a minute"
    quietly "pip could not install $REQUIREMENTS" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off -r "$REQUIREMENTS"
    stamp "$VENV/bin/python" >"$VENV/stamp"
}

main() {
    local python missing
    python=$(find_python)
    missing=$(missing_packages "$python")
    [ -z "$missing" ] || install_packages "$missing"
    install_python_packages "$python"
}

[ "${BASH_SOURCE[0]}" != "$0" ] || main
