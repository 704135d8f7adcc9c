"""Join several benchmarks into one JSONL file for evaluation.source.

    python scripts/join_benchmarks.py math4.jsonl \
        MATH500=hf:HuggingFaceH4/MATH-500#test,problem,answer
        Minerva=hf:math-ai/minervamath#test,question,answer \
        AMC23=hf:math-ai/amc23#test,question,answer \
        AIME24/25=hf:HuggingFaceH4/aime_2024#train,problem,answer
        AIME24/25=hf:MathArena/aime_2025#train,problem,answer

Each argument is NAME=SOURCE,PROMPT_COLUMN,ANSWER_COLUMN, with any source that data.source accepts;
a name may appear several times. Each row holds prompt, answer and benchmark, the name. Read the
file with --evaluation.columns benchmark=benchmark. If a source fails, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from opdjax.data.prompt_rows import read_prompts, require_field
from opdjax.data.sources import ColumnMap, DataError


def rows_of(argument: str) -> list[dict[str, object]]:
    """Return the rows of one NAME=SOURCE,PROMPT_COLUMN,ANSWER_COLUMN.

    DataError if the source cannot be read, or a row has no answer.
    """
    name, equals, rest = argument.partition("=")
    parts = rest.rsplit(",", 2)
    if not (name and equals and len(parts) == 3 and all(parts)):
        raise DataError(
            f"{argument!r} is no benchmark; expected NAME=SOURCE,PROMPT_COLUMN,ANSWER_COLUMN"
        )
    source, prompt, answer = parts
    found = read_prompts(source, ColumnMap(prompt, answer))
    reason = "an evaluation needs one in every row"
    require_field(found, "answer", {"answer": answer}, source, reason)
    return [{"prompt": row.prompt, "answer": row.answer, "benchmark": name} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("benchmarks", nargs="+", metavar="NAME=SOURCE,PROMPT_COLUMN,ANSWER_COLUMN")
    arguments = parser.parse_args()
    try:
        rows = [row for argument in arguments.benchmarks for row in rows_of(argument)]
    except DataError as error:
        sys.exit(f"join_benchmarks: {error}")
    partial = arguments.output.with_name(f"{arguments.output.name}.partial")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    partial.replace(arguments.output)
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        print(f"{name}: {sum(row['benchmark'] == name for row in rows)} prompts")


if __name__ == "__main__":
    main()
