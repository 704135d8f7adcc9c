#!/usr/bin/env bash
# Prints the state of the queued resource, of the slice and of the run, and the last lines of its log. Changes nothing.
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a [LINES_SHOWN=5] [PROJECT=P] [DRY_RUN=1] tpu/status.sh"
. "$(dirname "$0")/gcloud.sh"
[ $# -eq 0 ] || fail "takes no arguments
usage: $usage"
[[ ${LINES_SHOWN:-5} =~ ^[0-9]+$ ]] || fail "LINES_SHOWN is '${LINES_SHOWN:-}'; expected a number"

run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" "--format=value(state.state)"
run gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" "--format=value(state,health)"
look="tmux has-session -t opdjax 2>/dev/null && echo running || echo 'not running'; tail -n ${LINES_SHOWN:-5} opdjax/run.log"
run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 "--command=$look"
