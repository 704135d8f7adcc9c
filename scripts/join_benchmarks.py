"""Join several benchmarks into one JSONL file for evaluation.source.

    python scripts/join_benchmarks.py math4.jsonl \
        MATH500=hf:HuggingFaceH4/MATH-500#test,problem,answer
        Minerva=hf:math-ai/minervamath#test,question,answer \
        AMC23=hf:math-ai/amc23#test,question,answer \
        AIME24/25=hf:HuggingFaceH4/aime_2024#train,problem,answer
        AIME24/25=hf:MathArena/aime_2025#train,problem,answer

A source is one that data.source accepts; a name may appear several times. Each row holds prompt,
answer and benchmark, the name. Read the file with --evaluation.columns benchmark=benchmark. If a
source fails, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from opdjax.data.prompt_rows import read_prompts, require_field
from opdjax.data.sources import ColumnMap, DataError

FORM = "NAME=SOURCE,PROMPT_COLUMN,ANSWER_COLUMN"


def rows_of(argument: str) -> list[dict[str, object]]:
    """Return the rows of a benchmark; DataError if one has no answer or its source fails."""
    name, equals, rest = argument.partition("=")
    source, prompt, answer, *_ = [*rest.rsplit(",", 2), "", ""]
    if not (name and equals and source and prompt and answer):
        raise DataError(f"{argument!r} is no benchmark; expected {FORM}")
    found = read_prompts(source, ColumnMap(prompt, answer))
    reason = "an evaluation needs one in every row"
    require_field(found, "answer", {"answer": answer}, source, reason)
    return [{"prompt": row.prompt, "answer": row.answer, "benchmark": name} for row in found]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("benchmarks", nargs="+", metavar=FORM)
    arguments = parser.parse_args()
    try:
        rows = [row for argument in arguments.benchmarks for row in rows_of(argument)]
    except DataError as error:
        sys.exit(f"join_benchmarks: {error}")
    partial = arguments.output.with_name(f"{arguments.output.name}.partial")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_text(lines, encoding="utf-8")
    partial.replace(arguments.output)
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        print(f"{name}: {sum(row['benchmark'] == name for row in rows)} prompts")


if __name__ == "__main__":
    main()
