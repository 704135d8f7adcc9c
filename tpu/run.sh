#!/usr/bin/env bash
# Starts `opdjax COMMAND …` on every worker, in a tmux session `opdjax` that survives this connection, with its output in
# ~/opdjax/run.log. A process that runs there already is ended; the same train command resumes its run.
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a TOPOLOGY=v5e-8 [PROJECT=P] [DRY_RUN=1] tpu/run.sh train EXPERIMENT --workdir DIR [--section.field VALUE …]"
. "$(dirname "$0")/gcloud.sh"
need TOPOLOGY "the slice that create.sh requested"
[ $# -gt 0 ] || fail "no command given
usage: $usage"
hosts=$(fact hosts)

arguments=("$@")
if [ "$hosts" -gt 1 ]; then
    [ "$1" = train ] || fail "$TOPOLOGY has $hosts hosts, where only train can run; expected train, or a slice of one host"
    # Every host is a process of one run; the processes find each other.
    arguments+=(--mesh.processes -1)
fi
# Quoted twice: for the shell in tmux, and for the remote shell of ssh.
printf -v command '%q ' .venv/bin/opdjax "${arguments[@]}"
session="cd ~/opdjax; { date; ${command% }; echo \"exit status \$?\"; } >> run.log 2>&1"
printf -v quoted '%q' "$session"

# A killed process may still hold the chips, which only one process can use at a time.
free="tmux kill-session -t opdjax 2>/dev/null; sudo fuser --kill --silent /dev/accel* /dev/vfio/[0-9]*; sudo rm -f /tmp/libtpu_lockfile"
on_all_workers "$free; tmux new-session -d -s opdjax bash -c $quoted"

printf -v follow '%q ' gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 "--command=tail -n 50 -F opdjax/run.log"
printf '# to follow the log:\n# %s\n' "${follow% }"
