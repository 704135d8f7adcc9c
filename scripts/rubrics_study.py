"""What the sweep of black-box distillation says: python scripts/rubrics_study.py RUNS [--faulty
RUN] [--out experiments/results/rubrics]

Reads the runs of experiments/sweeps/rubrics.py, and with --faulty one more of mini_ropd.py whose
judge failed on purpose; writes OUT.md and OUT.json.
"""

import argparse
import json
import math
import pathlib
import statistics

from benchmark_vocab import cpu_model
from white_box_study import markdown, paired, spread

from opdjax.runs.results import Run, read_points, read_run
from opdjax.runs.workdir import read_lines

ROLES = ("rubricator", "verifier")
ABLATIONS = (
    "one_reference",
    "rubric_per_student",
    "not_blind",
    "frozen",
    "evolving",
    "ropd_paper",
    "ropd_stages",
)


def mean_of(run: Run, name: str, rows: slice = slice(None)) -> float | None:
    found = [row[name] for row in run.metrics[rows] if row.get(name) is not None]
    return statistics.fmean(found) if found else None


def numbers(run: Run) -> dict:
    """The numbers of one run; `gain` is paired by prompt, and so is its interval."""
    change, calls = (
        run.result["paired_difference"],
        [[f"api/{role}/{name}" for role in ROLES] for name in ("calls", "input_tokens")],
    )
    per_step = [[mean_of(run, name) or 0.0 for name in names] for names in calls]
    return {
        "avg@k": run.score("avg@k"),
        "greedy": run.score("greedy"),
        "pass@k": run.score("pass@k"),
        "gain": run.gain,
        "gain_interval": change["avg@k_interval"],
        "prompt_interval": run.result["eval_after"]["avg@k_interval"],
        "start": run.result["eval_before"]["avg@k"],
        "halfway": next(
            (row["avg@k"] for row in run.evaluations if 0 < row["step"] < run.result["num_steps"]),
            None,
        ),
        "auc": mean_of(run, "rubric/auc"),
        "no_signal": mean_of(run, "rubric/no_signal_share"),
        "tied": mean_of(run, "rubric/tied_groups"),
        "reward_first": mean_of(run, "rubric/reward_mean", slice(0, 10)),
        "reward_last": mean_of(run, "rubric/reward_mean", slice(-10, None)),
        "failed": sum(row.get("rubric/failed_groups") or 0 for row in run.metrics),
        "calls": sum(per_step[0]),
        "tokens": sum(per_step[1]),
        "seconds": run.median("time/step"),
        "judge_wait": run.median("time/judge_wait"),
        "commit": run.environment["commit"],
        "prompt_scores": run.result["eval_after"]["per_prompt"],
    }


def read_all(directory: pathlib.Path) -> tuple[dict[str, list[dict]], list[str]]:
    """(runs by method, points without a result)."""
    by: dict[str, list[dict]] = {}
    missing = []
    for point in read_points(directory):
        if point.status == "done":
            row = {
                "id": point.id,
                "seed": point.config["seed"],
                "rate": point.config["optimizer"]["learning_rate"],
            }
            by.setdefault(point.overrides["estimator"], []).append(
                row | numbers(read_run(point.workdir))
            )
        else:
            missing.append(point.id)
    return {name: sorted(runs, key=lambda row: row["seed"]) for name, runs in by.items()}, missing


def beside(by, name: str, other: str) -> str:
    mean, half, count = paired(by.get(other, []), by.get(name, []), "avg@k")
    return (
        ""
        if name == other or not count
        else f"{mean:+.3f}" + ("" if math.isinf(half) else f" ± {half:.3f}")
    )


def score_table(by) -> str:
    header = [
        "method",
        "rate",
        "n",
        "avg@8",
        "gain over the start",
        "least gain, by prompts",
        "less `ropd`",
        "avg@8 halfway",
        "greedy",
        "pass@8",
    ]
    lines = []
    for name, runs in by.items():
        least = min(row["gain"] - row["gain_interval"] for row in runs)
        scores = [spread(runs, column) for column in ("avg@k", "gain")]
        more = [spread(runs, column) for column in ("halfway", "greedy", "pass@k")]
        lines.append(
            [
                f"`{name}`",
                f"{runs[0]['rate']:g}",
                str(len(runs)),
                *scores,
                f"{least:+.3f}",
                beside(by, name, "ropd"),
                *more,
            ]
        )
    return markdown(header, lines)


def judge_table(by) -> str:
    header = [
        "method",
        "AUC",
        "criteria without signal, %",
        "tied groups, %",
        "reward, first ten steps",
        "last ten",
        "failed groups",
    ]
    header += [
        "calls a step",
        "thousands of tokens read a step",
        "seconds a step",
        "of them waiting for judges",
    ]
    lines = []
    for name, runs in by.items():
        if not runs[0]["calls"]:
            continue
        shares = [
            spread([{"x": 100 * row[column]} for row in runs if row[column] is not None], "x", 0)
            for column in ("no_signal", "tied")
        ]
        rewards = [spread(runs, column, 3) for column in ("reward_first", "reward_last")]
        mean = {
            column: statistics.fmean(row[column] for row in runs)
            for column in ("failed", "calls", "tokens", "seconds", "judge_wait")
        }
        cells = [f"{mean['failed']:.0f}", f"{mean['calls']:.0f}", f"{mean['tokens'] / 1000:.0f}"]
        lines.append(
            [
                f"`{name}`",
                spread(runs, "auc"),
                *shares,
                *rewards,
                *cells,
                f"{mean['seconds']:.2f}",
                f"{mean['judge_wait']:.2f}",
            ]
        )
    return markdown(header, lines)


def claims(by) -> str:
    """Claims of the papers beside what is found here: reproduced where the paired interval over seeds lies
    on the claim's side of 0.
    """
    said = {
        ("ropd", "tjudge"): "ROPD beats a scalar judge (table 1: by 2.5 points on AIME24)",
        ("ropd", "opd"): "ROPD beats distillation from logits (table 2: 45.9 against 32.8)",
        ("ropd", "one_reference"): "four references beat one (table 6: by 17.9)",
        (
            "ropd",
            "rubric_per_student",
        ): "one rubric for a group beats one for each rollout (table 6: by 3.8)",
        ("ropd", "not_blind"): "a blind verifier beats one that knows (table 6: by 3.3)",
        (
            "ropd_stages",
            "ropd",
        ): "credit by stages beats credit to the whole answer (RubricEM, figure 5)",
    }
    lines = []
    for (left, right), text in said.items():
        mean, half, count = paired(by.get(right, []), by.get(left, []), "avg@k")
        known = count > 1 and not math.isinf(half)
        verdict = (
            "not run"
            if not count
            else "inconclusive"
            if not known or abs(mean) <= half
            else "reproduced"
            if mean > 0
            else "contradicted"
        )
        verdict = (
            "no difference at all"
            if count
            and all(a["prompt_scores"] == b["prompt_scores"] for a, b in zip(by[left], by[right]))
            else verdict
        )
        lines.append(
            [
                text,
                f"{mean:+.3f}" + (f" ± {half:.3f}" if known else "") if count else "",
                str(count),
                verdict,
            ]
        )
    return markdown(["claim", "avg@8 here", "pairs", "verdict"], lines)


def storm_text(directory: pathlib.Path | None, by) -> str:
    if directory is None:
        return ""
    run, rows = numbers(read_run(directory)), read_lines(directory / "rubrics.jsonl")
    metrics = read_run(directory).metrics
    problems = {
        name.rpartition("/")[2]: sum(row[name] or 0 for row in metrics)
        for name in metrics[0]
        if name.startswith("rubric/problems/")
    }
    repairs: dict[str, int] = {}
    for row in rows:
        for name, count in row["repairs"].items():
            repairs[name] = repairs.get(name, 0) + count
    clean = by["ropd"][0]
    counted = ", ".join(
        f"{name} {count:.0f}" for name, count in (*problems.items(), *repairs.items()) if count
    )
    retries = sum(row[f"api/{role}/retries"] for row in metrics for role in ROLES)
    return (
        f"\n## A judge that fails\n\nSeed {clean['seed']} once more, with 30 % of the judge's replies spoilt, of every kind "
        f"(`scripts/serve_rule_judge.py --faults 0.3`): avg@8 {run['avg@k']:.3f} ± {run['prompt_interval']:.3f} over prompts, the clean "
        f"run {clean['avg@k']:.3f} ± {clean['prompt_interval']:.3f}. Of {len(rows)} groups {run['failed']:.0f} had no reward and were "
        f"masked; {retries:.0f} requests were sent again by the client. Replies that could not be used or were put right: {counted}.\n"
    )


def short(point: str) -> str:
    """The id of a point, as a person says it."""
    return f"{point.partition('estimator=')[2].partition(',')[0]} {point.partition(',')[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--faulty", type=pathlib.Path)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("experiments/results/rubrics")
    )
    arguments = parser.parse_args()
    by, missing = read_all(arguments.runs)
    count = sum(map(len, by.values()))
    commits = sorted({row["commit"][:7] for runs in by.values() for row in runs if row["commit"]})
    parts = [
        "# Black-box distillation on the mini pair\n",
        f"Written by `scripts/rubrics_study.py` from {count} runs of `experiments/sweeps/rubrics.py` (commits {', '.join(commits)}; "
        f"{cpu_model()}, two at a time beside other work). 150 updates of 32 prompts x 8 rollouts; before training avg@8 "
        f"{next(iter(by.values()))[0]['start']:.3f}. ± is half a 95 % interval over seeds, unless said; `gain` is paired by prompt.\n",
        f"Not run: {', '.join(map(short, missing))}.\n" if missing else "",
        score_table(by),
        "\nThe judge goes by rules. As a scalar judge it works out the right value itself, so that `tjudge` is rewarded by right answers "
        "and form: an oracle that no teacher of the paper is. `grpo` is rewarded by right answers alone. Knowing who wrote what moves no "
        "rule, so that `not_blind` can only tell that nothing else changes. Rates: 1e-4 is the best of 1e-4, 3e-4 and 1e-3 for `ropd` (one "
        "seed, avg@8 0.532, 0.494, 0.043) and taken for all that see text; 3e-4 is the best of five of `opd` and `vopd` at 64 rollouts.\n",
        "## What judges said and cost\n",
        judge_table(by),
        "\nAUC: how often a right answer scores above a wrong one of the same step, ties counting half.\n",
        "## Claims\n",
        claims(by),
        storm_text(arguments.faulty, by),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(part for part in parts if part))
    document = {
        name: [{k: v for k, v in row.items() if k != "prompt_scores"} for row in runs]
        for name, runs in by.items()
    }
    arguments.out.with_suffix(".json").write_text(
        json.dumps({"missing": missing, "runs": document}, indent=1) + "\n"
    )
    print(arguments.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
