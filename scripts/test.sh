#!/usr/bin/env bash
# Sets up .venv with the test extra, then runs lint, import contracts and tests.
# usage: scripts/test.sh [--all] [pytest arguments]   (--all adds the long tests)
set -euo pipefail
cd "$(dirname "$0")/.."
extra="test"
. scripts/environment.sh
selection=(-m "not long")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
.venv/bin/python -m pytest -n 2 ${selection[@]+"${selection[@]}"} "$@"
