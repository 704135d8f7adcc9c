#!/usr/bin/env bash
# Keeps a run going until it has finished, on a slice that may be preempted at any time: requests the slice, sets it up,
# starts the run, checks all three every POLL seconds, and restores what was lost. A new slice resumes the run from its work
# directory in a bucket.
#
# Exit status 0: the run has finished. 1: gave up, or the run failed twice with an error of its own.
# It can be stopped and started again at any time: a running run keeps running.
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a TOPOLOGY=v5e-8 [SPOT=1] [FILES='a.jsonl b.jsonl'] [POLL=60] [MAX_SLICES=20] [MAX_STARTS=50]
  [MAX_FAILURES=20] [DELETE=1] [PROJECT=P] [VALID_UNTIL=6h] [DRY_RUN=1] tpu/babysit.sh train EXPERIMENT --workdir gs://BUCKET/RUN …"
. "$(dirname "$0")/gcloud.sh"
need TOPOLOGY "a slice, such as v5e-8; python3 tpu/topology.py lists them"
[ $# -gt 0 ] || fail "no command given
usage: $usage"
need_bucket "$@"
poll=${POLL:-60}
# FILES is split at blanks: file names cannot contain any.
read -r -a files <<<"${FILES:-}"
here=$(dirname "$0")
slices=0 starts=0 failures=0 errors=0 is_set_up=0 is_started=0

# gcloud fails on Ctrl-C, and this script retries failures: so end it here.
trap 'exit 130' INT

say() { printf '%s  %s\n' "$(date -u '+%F %T')" "$1"; }

give_up() {
    say "$1; a remaining slice still costs: tpu/delete.sh"
    exit 1
}

# Runs one step. A failed step is retried after the next check of the state, because it may have had an effect.
tried() { # tried WHAT COMMAND …
    say "$1"
    shift
    if "$@"; then
        failures=0
        return 0
    fi
    failed "$1"
}

failed() {
    failures=$((failures + 1))
    [ "$failures" -lt "${MAX_FAILURES:-20}" ] || give_up "$failures failures in a row, the last one: $1"
    say "failed ($failures in a row); retrying"
    return 1
}

# Prints `absent` or the state of the queued resource; fails if gcloud does.
resource_state() {
    local output
    # gcloud prints warnings (an old Python, a new version) before the value.
    if output=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" '--format=value(state.state)' 2>&1); then
        printf '%s\n' "${output:-UNKNOWN}" | grep -Ex '[A-Z_]+' | tail -n 1
    elif [[ $output == *NOT_FOUND* ]]; then
        printf absent
    else
        printf '%s\n' "$output" >&2
        return 1
    fi
}

# Prints `GONE` or the state of the slice itself; fails if gcloud does.
node_state() {
    local output
    if output=$(gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" '--format=value(state)' 2>&1); then
        printf '%s\n' "${output:-UNKNOWN}" | grep -Ex '[A-Z_]+' | tail -n 1
    elif [[ $output == *NOT_FOUND* ]]; then
        printf GONE
    else
        printf '%s\n' "$output" >&2
        return 1
    fi
}

# Prints `running`, or the last line of the log: `exit status N`, or any line if the run was killed.
run_state() {
    local look="tmux has-session -t opdjax 2>/dev/null && echo running || tail -n 1 opdjax/run.log 2>/dev/null || echo absent"
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 "${alive[@]}" "--command=$look" | tail -n 1
}

finish() {
    say "the run has finished"
    if [ "${DELETE:-}" = 1 ]; then
        # An idle slice must not go on costing.
        until tried "deleting the slice" env YES=1 "$here/delete.sh"; do
            sleep "$poll"
        done
    else
        say "the slice still costs: tpu/delete.sh"
    fi
    exit 0
}

request_slice() {
    [ "$slices" -lt "${MAX_SLICES:-20}" ] || give_up "$slices slices were preempted or failed (MAX_SLICES)"
    errors=0 is_set_up=0 is_started=0
    tried "requesting a slice" "$here/create.sh" && slices=$((slices + 1))
}

# Does the next step on a slice that is ready: sets it up, starts the run, or handles the end of the run.
advance() { # advance RUN_STATE ARGUMENT …
    local state=$1
    shift
    if [ "$state" = running ]; then
        is_set_up=1 is_started=1 failures=0
        return 0
    fi
    # The log may be that of an earlier command: an end counts only if this script started the run.
    if [ "$is_started" = 1 ]; then
        [ "$state" != "exit status 0" ] || finish
        # Status 1 or 2 is an error of the run. One may be temporary (a judge is down, the chips are in use), two are not.
        [[ ! $state =~ ^exit\ status\ [12]$ ]] || errors=$((errors + 1))
        [ "$errors" -lt 2 ] || give_up "the run failed twice with an error of its own ($state): see opdjax/run.log on worker 0"
        say "the run has stopped (${state:0:100})"
        # A start that fails leaves the log as it is: this end counts once.
        is_started=0
        # Without a log, the disk of the slice is gone.
        [ "$state" != absent ] || is_set_up=0
    fi
    if [ "$is_set_up" = 0 ]; then
        tried "setting up the slice" "$here/setup_vm.sh" ${files[@]+"${files[@]}"} && is_set_up=1
        return
    fi
    [ "$starts" -lt "${MAX_STARTS:-50}" ] || give_up "the run was started $starts times and did not finish (MAX_STARTS)"
    tried "starting the run" "$here/run.sh" "$@" && starts=$((starts + 1)) && is_started=1
}

if [ "${DRY_RUN:-}" = 1 ]; then
    echo "# every $poll s: if there is no slice,"
    "$here/create.sh"
    echo "# when it is READY,"
    "$here/setup_vm.sh" ${files[@]+"${files[@]}"}
    "$here/run.sh" "$@"
    echo "# if it was preempted, and then from the top,"
    YES=1 "$here/delete.sh"
    exit 0
fi

# Report wrong variables, files and arguments now, before a slice costs anything.
for script in create.sh setup_vm.sh run.sh; do
    words=()
    [ "$script" != setup_vm.sh ] || words=(${files[@]+"${files[@]}"})
    [ "$script" != run.sh ] || words=("$@")
    DRY_RUN=1 "$here/$script" ${words[@]+"${words[@]}"} >/dev/null || exit 2
done

last=
while :; do
    if ! state=$(resource_state); then
        failed "reading the state of the queued resource" || true
    else
        [ "$state" = "$last" ] || say "queued resource: $state"
        last=$state
        case $state in
        absent) request_slice || true ;;
        ACTIVE)
            if ! node=$(node_state); then
                failed "reading the state of the slice" || true
            elif [ "$node" = READY ]; then
                if run=$(run_state); then advance "$run" "$@" || true; else failed "reading the state of the run" || true; fi
            elif [[ $node =~ ^(PREEMPTED|TERMINATED|STOPPED|GONE)$ ]]; then
                tried "the slice is $node: deleting it" env YES=1 "$here/delete.sh" || true
            fi
            ;;
        SUSPENDED | FAILED) tried "the slice is $state: deleting it" env YES=1 "$here/delete.sh" || true ;;
        *) failures=0 ;; # in transition
        esac
    fi
    sleep "$poll"
done
