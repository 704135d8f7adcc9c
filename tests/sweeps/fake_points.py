"""A stand-in for the command `opdjax` in the children of a sweep: it claims its work directory,
takes some time and writes a result. So runners are tested without models.
"""

import os

from tiny_runs import ROOT

MAIN = """
import json, os, pathlib, signal, sys, time
from opdjax.runs.mirror import open_workdir
from opdjax.runs.workdir import read_json, write_json

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
config = read_json(pathlib.Path(sys.argv[2]), "")["config"]
if os.environ.get("FAIL") or config["student"]["path"] == "no/such/model/here":
    sys.exit("told to fail")
if sys.argv[1] == "references":
    with open(config["data"]["references"], "a") as file:
        file.write("answer\\n")
    sys.exit()
with open_workdir(sys.argv[4]) as mirror:
    write_json(mirror.directory / "config.json", {})
    for step in range(int(os.environ.get("WORK", 10))):
        mirror.record_progress(step=step, num_steps=10)
        time.sleep(0.1)
    result = {"eval_after": {"avg@k": 0.5, "k": 2}, "by": os.getpid()}
    write_json(mirror.directory / "result.json", result)
    mirror.finish()
"""


def install(monkeypatch, directory):
    """Children started from now on run MAIN.

    $WORK is their duration in tenths of a second; with $FAIL they fail at once, as
    does a point whose student is `no/such/model/here`.
    """
    package = directory / "fake" / "opdjax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'opdjax')!r})")
    (package / "__main__.py").write_text(MAIN)
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ['PYTHONPATH']}")
