#!/usr/bin/env bash
# Requests a TPU slice, as a queued resource with the name of the slice. It costs money from ACTIVE until delete.sh.
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a TOPOLOGY=v5e-8 [PROJECT=P] [SPOT=1] [VALID_UNTIL=6h] [DRY_RUN=1] tpu/create.sh"
. "$(dirname "$0")/gcloud.sh"
need TOPOLOGY "a slice, such as v5e-8; python3 tpu/topology.py lists them"
[ $# -eq 0 ] || fail "takes no arguments
usage: $usage"

type=$(fact accelerator_type)
runtime=$(fact runtime_version)
options=()
[ "${SPOT:-}" != 1 ] || options+=(--spot)
# A request that is not granted by then fails, so that it cannot start to cost at night.
options+=("--valid-until-duration=${VALID_UNTIL:-6h}")
run gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${where[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" "${options[@]}"
