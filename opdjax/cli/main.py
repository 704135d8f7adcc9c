"""The console command `opdjax`: what it is called with, and how it fails. The verbs are in
`opdjax.verbs`, a short function each.

Heavy imports happen inside the verbs, so that help is instant.
"""

from __future__ import annotations

import os
import sys

from opdjax.cli.models import evaluate, export, import_, sample
from opdjax.cli.runs import annotate, audit, doctor, inspect, plan, teach, train
from opdjax.cli.sweeps import report, sweep, table
from opdjax.config.validation import nearest


def main() -> None:
    """Run `opdjax VERB …`; a mistake of the user's ends in one line on stderr and status 2, never
    in a traceback.
    """
    # transformers serves tokenizers here; that torch is absent is as intended and needs no advice
    # on every run.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    verb = arguments[0]
    if verb not in VERBS:
        sys.exit(_complain(f"there is no verb {verb!r}; {nearest(verb, VERBS)}"))
    try:
        VERBS[verb](arguments[1:])
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        _complain(f"{type(error).__name__}: {error}")
        sys.exit(getattr(error, "exit_status", 2))
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to continue")
        sys.exit(130)  # as shells say of SIGINT


def _complain(message: str) -> int:
    print(f"opdjax: {message}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [f"  {name:<10}{function.__doc__.splitlines()[0]}" for name, function in VERBS.items()]
    return "usage: opdjax VERB …   (opdjax VERB --help tells more)\n\n" + "\n".join(lines)


VERBS = {
    "train": train,
    "plan": plan,
    "doctor": doctor,
    "audit": audit,
    "sweep": sweep,
    "table": table,
    "report": report,
    "sample": sample,
    "teach": teach,
    "annotate": annotate,
    "inspect": inspect,
    "evaluate": evaluate,
    "import": import_,
    "export": export,
}
