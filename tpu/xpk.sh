#!/usr/bin/env bash
# Starts one run on a slice of a GKE cluster with xpk, in the image built from Dockerfile. Sweeps: opdjax sweep … --launch xpk.
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a TOPOLOGY=v5e-16 CLUSTER=C IMAGE=us-docker.pkg.dev/P/R/opdjax [SPOT=1] [MAX_RESTARTS=20] [PROJECT=P]
  [DRY_RUN=1] tpu/xpk.sh train EXPERIMENT --workdir gs://BUCKET/RUN [--section.field VALUE …]"
. "$(dirname "$0")/gcloud.sh"
need TOPOLOGY "a slice, such as v5e-16; python3 tpu/topology.py lists them"
need CLUSTER "the name of a cluster made by xpk cluster create"
need IMAGE "the name of the image built from tpu/Dockerfile"
[ $# -gt 0 ] || fail "no command given
usage: $usage"
need_bucket "$@"
type=$(fact accelerator_type)
chips=$(fact chips)

arguments=("$@")
# xpk builds slices of four-chip hosts, also where Cloud TPU has eight-chip hosts.
[ "$chips" -le 4 ] || arguments+=(--mesh.processes -1)
printf -v command '%q ' opdjax "${arguments[@]}"
options=()
[ "${SPOT:-}" != 1 ] || options+=(--spot)
[ -z "${PROJECT:-}" ] || options+=("--project=$PROJECT")
run xpk workload create "--cluster=$CLUSTER" "--workload=$NAME" "--tpu-type=$type" "--docker-image=$IMAGE" "--zone=$ZONE" \
    "--command=${command% }" "--max-restarts=${MAX_RESTARTS:-20}" ${options[@]+"${options[@]}"}
