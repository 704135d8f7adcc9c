#!/usr/bin/env bash
# Deletes the slice, its queued resource and the disks of its workers: copy a local work directory first (README.md).
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a [PROJECT=P] [YES=1] [DRY_RUN=1] tpu/delete.sh"
. "$(dirname "$0")/gcloud.sh"
[ $# -eq 0 ] || fail "takes no arguments
usage: $usage"

# --force deletes the slice too. gcloud asks first, unless YES=1.
options=(--force)
[ "${YES:-}" != 1 ] || options+=(--quiet)
run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" "${options[@]}"
run gcloud compute tpus queued-resources list "${where[@]}"
