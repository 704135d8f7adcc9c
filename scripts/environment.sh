# shellcheck shell=sh
# Sourced by the other scripts: makes .venv if it is missing, and installs this checkout in it.
# usage: extra=test; . scripts/environment.sh   (from the repository's root; extra= installs no extra)

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "opdjax needs Python 3.11, 3.12 or 3.13 with the venv module;" \
        "python3 is $(python3 --version 2>&1)." \
        "Install one, or give its path: PYTHON=/path/to/python3.12 $0" >&2
    return 1
}

# LOCKED=1 installs the versions that the tests last passed with, not the newest ones.
constraint="${LOCKED:+scripts/tested_versions.txt}"
stamp=".venv/.installed-${extra:-core}${LOCKED:+-locked}"
if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || exit 1
    echo "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
fi
# Installs again only after a change of the dependencies.
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ] ||
    [ "${constraint:-setup.cfg}" -nt "$stamp" ]; then
    echo "installing opdjax${extra:+ with its $extra extra} into .venv (two minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        ${constraint:+--constraint "$constraint"} --editable ".${extra:+[$extra]}"
    touch "$stamp"
fi
