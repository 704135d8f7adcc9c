#!/usr/bin/env bash
# Starts `opdjax VERB …` on every worker, in a tmux session `opdjax` that outlives this connection, with its output in
# ~/opdjax/run.log. What was running there before is ended; the same train command then continues that run.
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a TOPOLOGY=v5e-8 [PROJECT=P] [DRY_RUN=1] tpu/run.sh train EXPERIMENT --workdir DIR [--section.field VALUE …]"
. "$(dirname "$0")/gcloud.sh"
need TOPOLOGY "the slice that create.sh was given"
[ $# -gt 0 ] || fail "no verb given
usage: $usage"
hosts=$(fact hosts)

arguments=("$@")
if [ "$hosts" -gt 1 ]; then
    [ "$1" = train ] || fail "$TOPOLOGY has $hosts hosts, on which only train runs; expected train, or a slice of one host"
    # Every host is a process of one run, and they find each other.
    arguments+=(--mesh.processes -1)
fi
# Quoted twice: for the shell that tmux starts, and for the one at the other end of ssh.
printf -v command '%q ' .venv/bin/opdjax "${arguments[@]}"
session="cd ~/opdjax; { date; ${command% }; echo \"exit status \$?\"; } >> run.log 2>&1"
printf -v quoted '%q' "$session"

# A process that was killed or cut off may still hold the chips, and libtpu lets in one at a time.
free="tmux kill-session -t opdjax 2>/dev/null; sudo fuser --kill --silent /dev/accel* /dev/vfio/[0-9]*; sudo rm -f /tmp/libtpu_lockfile"
on_all_workers "$free; tmux new-session -d -s opdjax bash -c $quoted"

printf -v follow '%q ' gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 "--command=tail -n 50 -F opdjax/run.log"
printf '# follow it:\n# %s\n' "${follow% }"
