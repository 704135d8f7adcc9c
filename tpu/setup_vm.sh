#!/usr/bin/env bash
# Copies the last commit of this checkout, and the given files, to ~/opdjax on every worker, and installs it. Can be repeated.
set -euo pipefail
usage="NAME=opd ZONE=us-central1-a TOPOLOGY=v5e-8 [PROJECT=P] [DRY_RUN=1] tpu/setup_vm.sh [FILE …]"
. "$(dirname "$0")/gcloud.sh"
need TOPOLOGY "the slice that create.sh requested"
chips=$(fact chips)
for file in "$@"; do
    [ -f "$file" ] || fail "there is no file $file; expected data files to copy to ~/opdjax
usage: $usage"
done
[ -z "$(git -C "$root" status --porcelain)" ] || echo "$0: note: uncommitted changes are not copied" >&2

archive="${TMPDIR:-/tmp}/opdjax-$NAME.tar.gz"
run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$@" "$NAME:" "${where[@]}" --worker=all "${alive[@]/--ssh-flag/--scp-flag}"
run rm -f "$archive"

# The Python 3.10 of the images is too old; uv installs its own.
install="set -e; mkdir -p opdjax; tar -xzf opdjax-$NAME.tar.gz -C opdjax; rm opdjax-$NAME.tar.gz"
for file in "$@"; do
    printf -v quoted '%q' "$(basename "$file")"
    install+="; mv $quoted opdjax/"
done
install+="; cd opdjax; python3 -m pip install --quiet --user uv"
install+="; test -x .venv/bin/python || ~/.local/bin/uv venv --quiet --python 3.11 .venv"
install+="; ~/.local/bin/uv pip install --quiet --python .venv/bin/python --requirement tpu/requirements.txt --editable '.[eval]'"
on_all_workers "$install"
# On all workers at once: the chips of a slice appear only when every host opens them.
on_all_workers "cd opdjax; .venv/bin/python -c 'import jax; assert jax.device_count() == $chips, jax.devices()'"
