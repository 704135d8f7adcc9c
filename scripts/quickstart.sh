#!/usr/bin/env bash
# Sets up .venv, distils the built-in mini student from the mini teacher with vOPD, and checks that it learned.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
.venv/bin/opdjax train experiments/mini_vopd.py --workdir runs/quickstart
.venv/bin/python scripts/check_quickstart.py runs/quickstart/result.json
