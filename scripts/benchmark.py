"""Measure opdjax on this machine; each subcommand prints a Markdown table.

    python scripts/benchmark.py vocab --help
    python scripts/benchmark.py step experiments/sweeps/step_costs.py

Seconds are medians of alternating runs, with their range; the first runs, which compile, are not
counted. CPU seconds of the process are more reliable than seconds on a busy machine.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys

from opdjax.cli.main import compilation_cache, is_user_error

SUBCOMMANDS = {  # name: (module of `benchmarks`, one line)
    "vocab": ("vocabulary", "the tiled vocabulary pass against plain logits"),
    "recipes": ("vocabulary", "each recipe's work on the vocabulary"),
    "sampler": ("sampling", "generated tokens a second"),
    "step": ("steps", "seconds of a step by phase, for each setting of an experiment or a sweep"),
    "save": ("saving", "the digests of a checkpoint against its save"),
    "load": ("loading", "loading a checkpoint against a plain read of its files"),
    "weights": ("weights", "weights in 8 bits: memory, error, seconds"),
    "judge": ("judging", "requests a second of the judge's client"),
    "peers": ("peers.compare", "losses, generation and steps of TRL, Tunix and EasyDeL"),
}


def main(words: list[str]) -> None:
    listed = "\n".join(f"  {name:12} {line}" for name, (_, line) in SUBCOMMANDS.items())
    if not words or words[0] not in SUBCOMMANDS:
        print(f"{__doc__}\nusage: benchmark.py SUBCOMMAND [options]\n\n{listed}")
        sys.exit(0 if words[:1] in (["-h"], ["--help"]) else 2)
    for variable, value in compilation_cache().items():
        os.environ.setdefault(variable, value)
    command, raw = words[0], argparse.RawDescriptionHelpFormatter
    module = importlib.import_module(f"benchmarks.{SUBCOMMANDS[command][0]}")
    add_options = getattr(module, f"add_{command}")
    parser = argparse.ArgumentParser(f"benchmark.py {command}", formatter_class=raw)
    parser.description = add_options.__doc__
    parser.set_defaults(command=command)
    parser.add_argument("--repeats", type=int, help="counted runs of each; default: %(default)s")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures of each run")
    add_options(parser)
    options = parser.parse_args(words[1:])
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        if not is_user_error(error):
            raise
        sys.exit(f"benchmark.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
