"""The console command `opdjax`: finds the command, and reports errors.

Heavy imports happen inside the commands, so that help is instant.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys
import threading
import time
import traceback

from opdjax.cli.experiments import experiments
from opdjax.cli.models import check, evaluate, export, make_student, sample, suites
from opdjax.cli.runs import audit, doctor, plan, references, rollouts, score, train
from opdjax.cli.sweeps import report, sweep, table
from opdjax.config.validation import nearest
from opdjax.runs.object_store import scratch_root

COMMANDS = {
    "train": train,
    "plan": plan,
    "doctor": doctor,
    "audit": audit,
    "sweep": sweep,
    "table": table,
    "report": report,
    "sample": sample,
    "references": references,
    "score": score,
    "rollouts": rollouts,
    "evaluate": evaluate,
    "suites": suites,
    "check": check,
    "export": export,
    "make-student": make_student,
    "experiments": experiments,
}
ALIASES = {"teach": "references", "annotate": "score", "inspect": "rollouts", "import": "check"}

# Errors of the package that a caller inside it handles: one that gets here is a bug.
_INTERNAL_ERRORS = ("ReplyError",)
# In an error of jax between processes on CPUs whose peer has ended: closed, reset, broken pipe.
_PEER_LOST = "Gloo"
_EXIT_SECONDS = 3.0
_CACHE_BYTES = 4 << 30  # of compiled programs; jax drops the ones that were used longest ago


def main() -> None:
    """Run `opdjax COMMAND …`. An error that the user can fix is reported in one line, with exit
    status 2 or its own `exit_status`; with --debug or OPDJAX_DEBUG=1 also with its traceback. All
    others are bugs, or come from a library: they keep their traceback and Python's status, 1.
    """
    # Only tokenizers of transformers are used here: its advice to install torch does not apply.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # The hub's library would first wait for a list that its telemetry reads, 3 s without a network.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    is_debugging = len(arguments) < len(sys.argv) - 1 or os.environ.get("OPDJAX_DEBUG") == "1"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(importlib.metadata.version("opdjax"))
        return
    name = ALIASES.get(arguments[0], arguments[0])
    if name not in COMMANDS:
        _report(f"there is no command {name!r}; {nearest(name, COMMANDS)}")
        sys.exit(2)
    for variable, value in compilation_cache().items():
        os.environ.setdefault(variable, value)
    try:
        COMMANDS[name](arguments[1:])
    except KeyboardInterrupt:
        _report("interrupted; run the same command again to continue")
        sys.exit(130)  # the shell's status for SIGINT
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if not is_user_error(error):
            raise
        if is_debugging:
            traceback.print_exc()
        _report(_text(error))
        status = getattr(error, "exit_status", 2)
        _bound_exit(status)
        sys.exit(status)


def compilation_cache() -> dict[str, str]:
    """The variables by which jax keeps compiled programs for the next command, so that a program is
    compiled once. A user's own values win; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    # A program for one kind of CPU may end the process on another, and a home directory may be
    # shared by machines of several kinds: each kind has a directory of its own.
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), pathlib.Path("/proc/cpuinfo").open() as lines:
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), cpu)
    kind = hashlib.sha256(cpu.encode()).hexdigest()[:8]
    return {
        "JAX_COMPILATION_CACHE_DIR": str(scratch_root() / "compiled" / kind),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(_CACHE_BYTES),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }


def is_user_error(error: BaseException) -> bool:
    """Whether a user can fix an error: an OSError, a device without memory, a process that lost its
    peer, or an error of the package, known by its name.
    """
    own = [base.__name__ for base in type(error).__mro__ if base.__module__.startswith("opdjax.")]
    is_own = any(not name.startswith("_") and name not in _INTERNAL_ERRORS for name in own)
    is_known = _is_out_of_memory(error) or _PEER_LOST in str(error)
    return is_own or isinstance(error, OSError) or is_known


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left. For a full disk TensorStore has the same word, in errors
    of Python.
    """
    jax = sys.modules.get("jax")  # not imported before a command needs it
    is_of_jax = jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
    return is_of_jax and "RESOURCE_EXHAUSTED" in str(error)


def _text(error: BaseException) -> str:
    """What an error says. Python's own errors of files begin with a number."""
    if isinstance(error, OSError) and error.filename is not None:
        is_full = error.errno == errno.ENOSPC and "make room" not in error.strerror
        advice = "; make room and run the same command again" if is_full else ""
        return f"{error.filename}: {error.strerror}{advice}"
    if _is_out_of_memory(error):
        first = str(error).partition("\n")[0]
        return (
            f"{first.rstrip('.')}; raise train.gradient_accumulation_steps or lower sampling.slots "
            "(`opdjax plan` estimates the memory), and the same command continues"
        )
    if _PEER_LOST in str(error):
        return (
            "another process of the run has ended, or cannot be reached; run the same command "
            "again in every process"
        )
    return str(error) or type(error).__name__


def _bound_exit(status: int) -> None:
    """Let the interpreter wait only for seconds for threads that are left. Those of a save that has
    failed wait five minutes for what never comes.
    """

    def end() -> None:
        threading.main_thread().join()
        time.sleep(_EXIT_SECONDS)
        os._exit(status)

    others = set(threading.enumerate()) - {threading.current_thread()}
    if any(not thread.daemon for thread in others):
        threading.Thread(target=end, daemon=True).start()


def _report(message: str) -> None:
    # Names of files and words of servers may hold commands to a terminal.
    shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    print(f"opdjax: {''.join(shown)}", file=sys.stderr)


def _usage() -> str:
    lines = ["usage: opdjax COMMAND … or opdjax --version", ""]
    for name, function in COMMANDS.items():
        lines.append(f"  {name:<13}{function.__doc__.splitlines()[0]}")
    aliases = ", ".join(f"{alias} (now {name})" for alias, name in ALIASES.items())
    lines += ["", "opdjax COMMAND --help lists the options of a command."]
    lines += ["--debug, with any command, or OPDJAX_DEBUG=1 adds the traceback to an error."]
    lines += [f"Old names that still work: {aliases}."]
    return "\n".join(lines)
