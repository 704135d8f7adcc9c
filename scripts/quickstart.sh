#!/usr/bin/env bash
# Sets up .venv, distils the mini student from the mini teacher with vOPD, checks that it learned.
# usage: scripts/quickstart.sh [WORKDIR]   (default runs/quickstart; a finished run is not repeated)
set -euo pipefail
cd "$(dirname "$0")/.."
extra=
. scripts/environment.sh
workdir="${1:-runs/quickstart}"
.venv/bin/opdjax train experiments/mini_vopd.py --workdir "$workdir"
.venv/bin/python scripts/check_quickstart.py "$workdir/result.json"
