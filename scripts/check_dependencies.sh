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
# pip-audit ends with 0 where it could look up nothing: what it skipped is counted here.
"$tools/bin/pip-audit" --requirement "$file" --no-deps --disable-pip --format json --output "$tools/audit.json" ||
    [ -s "$tools/audit.json" ] || { echo "vulnerabilities: not checked, because pip-audit failed" >&2; exit 1; }
.venv/bin/python - "$tools/audit.json" "$file" <<'PYTHON'
import json, sys

packages = json.load(open(sys.argv[1]))["dependencies"]
skipped = [each["name"] for each in packages if "skip_reason" in each]
known = [(each["name"], each["version"], hole) for each in packages for hole in each.get("vulns", [])]
for name, version, hole in known:
    print(f"  {name} {version}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'no version'}")
print(f"vulnerabilities: {len(known)} known in {len(packages) - len(skipped)} of {len(packages)} packages of {sys.argv[2]}")
if skipped:
    print(f"  not found in the database, so not checked: {len(skipped)}, such as {', '.join(skipped[:5])}")
sys.exit(bool(known or skipped))
PYTHON
