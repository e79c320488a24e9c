# Make .venv with $PYTHON, or say in one line what is missing.
set -eu

if ! "$PYTHON" -c '' 2>/dev/null; then
    echo "PYTHON must be a Python 3.11 or newer; got $PYTHON, which does not run." \
        "Say which: make PYTHON=python3.12 setup" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "PYTHON must be 3.11 or newer; got $("$PYTHON" --version)." \
        "Say which: make PYTHON=python3.12 setup" >&2
    exit 2
fi
if ! "$PYTHON" -m venv --clear .venv; then
    rm -rf .venv
    echo "$PYTHON cannot make virtual environments." \
        "Install its venv package (on Debian and Ubuntu: apt-get install python3-venv)" >&2
    exit 2
fi
