# shellcheck shell=bash
# Sourced by the scripts in this directory, which set `usage` first: reads the variables they share, and defines `run`, which
# prints a command and runs it unless DRY_RUN=1.

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    printf '%s: %s\n' "$0" "$1" >&2
    exit 2
}

need() { # need VARIABLE WHAT
    [ -n "${!1:-}" ] || fail "$1 is not set; expected $2
usage: ${usage:?}"
}

# printf %q quotes the words, so that a printed line can be pasted into a shell.
run() {
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
    [ "${DRY_RUN:-}" = 1 ] || "$@"
}

fact() { # fact FIELD: of the slice TOPOLOGY
    python3 "$root/tpu/topology.py" "$TOPOLOGY" "$1"
}

need NAME "the name of the slice, such as opd"
need ZONE "its zone, such as us-central1-a"
where=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || where+=("--project=$PROJECT")

# A preempted machine closes no connection: without these ssh would wait for ever.
alive=(--ssh-flag=-oConnectTimeout=60 --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4)

need_bucket() { # need_bucket ARGUMENT …: the disks of a slice or a pod do not last
    case " $* " in
    *" --workdir gs://"* | *" --workdir=gs://"*) ;;
    *) fail "no --workdir gs://BUCKET/RUN among the arguments; expected a work directory in a bucket, because the disks do not last
usage: ${usage:?}" ;;
    esac
}

on_all_workers() { # on_all_workers COMMAND
    run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all "${alive[@]}" "--command=$1"
}
