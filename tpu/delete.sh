#!/usr/bin/env bash
# Deletes the TPU and its queued resource, and with them the workers' disks: copy the work directory first (README.md).
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a [PROJECT=P] [YES=1] [DRY_RUN=1] tpu/delete.sh"
. "$(dirname "$0")/gcloud.sh"
[ $# -eq 0 ] || fail "takes no arguments
usage: $usage"

# --force deletes the slice too; gcloud asks before it does unless YES=1.
options=(--force)
[ "${YES:-}" != 1 ] || options+=(--quiet)
run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" "${options[@]}"
run gcloud compute tpus queued-resources list "${where[@]}"
