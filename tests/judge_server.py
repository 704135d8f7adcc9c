"""The rule-based judge, served over HTTP by its script."""

import contextlib
import pathlib
import re
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "serve_rule_judge.py"


@contextlib.contextmanager
def serving(*options):
    """The base_url of a judge on a free port."""
    command = [sys.executable, str(SCRIPT), "--port", "0", *map(str, options)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, line + process.stderr.read()
            yield found[0]
        finally:
            process.terminate()
            process.communicate()
    assert process.returncode == 0
