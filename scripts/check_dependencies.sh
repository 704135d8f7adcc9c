#!/usr/bin/env bash
# Lists the licences of the tested versions, and their known vulnerabilities by pip-audit. It says what it could not check.
# usage: scripts/check_dependencies.sh [FILE]   (default: scripts/tested_versions.txt; the licences are read from .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:-scripts/tested_versions.txt}

.venv/bin/python - "$file" <<'PYTHON'
import collections, importlib.metadata, re, sys

def licence(metadata):
    classified = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    given = (metadata.get("License") or "").strip().partition("\n")[0]
    return metadata.get("License-Expression") or "; ".join(classified) or given[:40] or "not stated"

found, unchecked = collections.defaultdict(list), []
wanted = re.findall(r"^([\w.-]+)==(\S+)", open(sys.argv[1]).read(), re.M)
for name, version in wanted:
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        unchecked.append(f"{name} is not installed")
        continue
    if package.version.partition("+")[0] != version:
        unchecked.append(f"{name} is installed as {package.version}, not {version}")
    found[licence(package.metadata)].append(name)
for kind, names in sorted(found.items(), key=lambda item: -len(item[1])):
    print(f"{len(names):4}  {kind}: {', '.join(names)}")
print(f"licences: {sum(map(len, found.values()))} of {len(wanted)} packages of {sys.argv[1]} read", *unchecked, sep="\n  ")
PYTHON

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
.venv/bin/python -m venv "$tools"
if ! "$tools/bin/pip" install --quiet --disable-pip-version-check pip-audit; then
    echo "vulnerabilities: not checked, because pip-audit could not be installed" >&2
    exit 1
fi
status=0
"$tools/bin/pip-audit" --requirement "$file" --no-deps --disable-pip || status=$?
if [ "$status" = 0 ]; then
    echo "vulnerabilities: none known in the packages of $file"
else
    echo "vulnerabilities: pip-audit ended with status $status; the lines above say what it found or could not check" >&2
fi
exit "$status"
