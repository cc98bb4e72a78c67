#!/bin/sh
# Set up .venv: `tools/setup.sh worker` for what the image has, `tools/setup.sh dev` for everything;
# or .venv-check: `tools/setup.sh check` for the quick check, without torch.
# Run by make, which calls it only when a requirement file has changed.
set -eu
cd "$(dirname "$0")/.."

role=$1
python=${PYTHON:-python3}
venv=.venv
[ "$role" = check ] && venv=.venv-check
unfinished=$venv/.unfinished

say() { printf '%s\n' "$*" >&2; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# What an interrupted installation left cannot be told from what it finished: start over.
if [ -e "$unfinished" ]; then
    say "An earlier set-up was interrupted; starting again."
    rm -rf "$venv"
fi

if ! { recent "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    if ! command -v "$python" >/dev/null 2>&1; then
        say "There is no $python here. Python 3.10 or later is needed; name it: make PYTHON=python3.12 ..."
        exit 1
    fi
    if ! recent "$python"; then
        say "Python 3.10 or later is needed, and $python is $("$python" --version 2>&1)."
        say "If there is a later one, name it: make PYTHON=python3.12 ..."
        exit 1
    fi
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        say "$python cannot make virtual environments: its venv or ensurepip module is missing."
        say "On Debian and Ubuntu: apt install python3-venv"
        exit 1
    fi
    say "Making a virtual environment in $venv with $("$python" --version 2>&1)."
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

case $role in
    worker)
        requirements=requirements.txt
        say "Installing $requirements into $venv. The first time takes two to five minutes: PyTorch" \
            "with its CUDA libraries is about 6 GB on disk."
        ;;
    dev)
        requirements=requirements-dev.txt
        say "Installing $requirements into $venv. The first time takes about a minute."
        ;;
    check)
        requirements=requirements-check.txt
        say "Installing $requirements into $venv. The first time takes about a minute."
        ;;
    *)
        say "usage: tools/setup.sh worker|dev|check"
        exit 2
        ;;
esac

# -qq: errors only. Dependencies are all in the locks, and --require-hashes is implied by them.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
: >"$unfinished"
"$venv/bin/python" -m pip install -qq -r "$requirements"
if [ "$role" != dev ]; then
    "$venv/bin/python" -m pip install -qq --no-build-isolation --no-deps -e .
fi
rm -f "$unfinished"
: >"$venv/.$role"
