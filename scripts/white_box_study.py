"""What the white-box sweep says: python scripts/white_box_study.py RUNS [--out experiments/results/white_box]

Reads the runs of experiments/sweeps/white_box.py and writes OUT.md and OUT.json. While BEST_RATE in the sweep file is empty
it prints the best rates of the grid instead; where it differs from the grid it refuses.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import statistics

from opdjax.results import AXES, Run, read_points, read_run, seed_interval

ROOT = pathlib.Path(__file__).parents[1]
SCORES = ("avg@k", "greedy", "pass@k")
MARGIN = 0.02  # two recipes within this much avg@8 of each other count as equal, if the interval says so too


def load_sweep():
    spec = importlib.util.spec_from_file_location("white_box", ROOT / "experiments" / "sweeps" / "white_box.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(run: Run) -> dict:
    """The numbers of one run; intervals here are over prompts."""
    after, norms = run.result["eval_after"], [row["grad/norm"] for row in run.metrics if row.get("grad/norm") is not None]
    kl = [row.get("kl/student_teacher") for row in run.metrics]
    last = run.metrics[-1]["step"]
    return {
        **{name: after[name] for name in SCORES},
        "prompt_interval": after["avg@k_interval"],
        "gain": run.result["paired_difference"]["avg@k"],
        "halfway": next((row["avg@k"] for row in run.evaluations if row["step"] == last // 2), None),
        "grad_norm": statistics.median(norms),
        "grad_norm_first": statistics.median(norms[:10]),
        "kl_first": statistics.fmean(kl[:3]) if kl[0] is not None else None,
        "kl_last": statistics.fmean(kl[-10:]) if kl[0] is not None else None,
        "seconds_per_step": statistics.median(row["time/step"] for row in run.metrics),
        "update_seconds": statistics.median(row["time/update"] for row in run.metrics),
        **{axis: run.total_at(axis, last) for axis in AXES},
        "commit": run.environment["commit"],
    }


def read_all(directory: pathlib.Path) -> tuple[list[dict], list[str]]:
    rows, missing = [], []
    for point in read_points(directory):
        if point.status != "done":
            missing.append(point.id)
            continue
        asked = point.overrides
        rows.append({
            "id": point.id,
            "recipe": asked["estimator"],
            "rate": point.config["optimizer"]["learning_rate"],
            "rows": point.config["train"]["prompts_per_step"],
            "seed": point.config["seed"],
            "is_grid": "evaluation.source" in asked,
            **numbers(read_run(point.workdir)),
        })  # fmt: skip
    return rows, missing


def grid_of(rows: list[dict]) -> dict[str, dict[float, float]]:
    """recipe -> rate -> gain in avg@8 on validation prompts."""
    grid: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["is_grid"]:
            grid.setdefault(row["recipe"], {})[row["rate"]] = row["gain"]
    return grid


def pick(rows: list[dict], recipe: str, rate: float, batch: int = 64) -> list[dict]:
    found = [r for r in rows if not r["is_grid"] and (r["recipe"], r["rate"], r["rows"]) == (recipe, rate, batch)]
    return sorted(found, key=lambda row: row["seed"])


def spread(rows: list[dict], name: str, digits: int = 3) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    if not values:
        return ""
    mean, half = seed_interval(values)
    return f"{mean:.{digits}f}" if math.isinf(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def paired(left: list[dict], right: list[dict], name: str) -> tuple[float, float, int]:
    """(mean of right - left over common seeds, half of its 95 % interval, their number)."""
    ours = {row["seed"]: row[name] for row in left}
    differences = [row[name] - ours[row["seed"]] for row in right if row["seed"] in ours]
    return *seed_interval(differences), len(differences)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)])


def grid_table(grid, rates) -> str:
    def cell(gains, rate):
        best = gains.get(rate) == max(gains.values())
        return "" if rate not in gains else f"**{gains[rate]:+.3f}**" if best else f"{gains[rate]:+.3f}"

    return markdown(["recipe", *(f"{rate:g}" for rate in rates)], [[name, *(cell(g, rate) for rate in rates)] for name, g in grid.items()])


def score_table(rows, names, rate_of) -> str:
    header = ["recipe", "rate", "n", "avg@8", "greedy", "pass@8", "prompt interval", "gradient norm", "KL at the end"]
    lines = []
    for name in names:
        runs = pick(rows, name, rate_of(name))
        cells = [spread(runs, column) for column in SCORES]
        prompts = statistics.fmean(row["prompt_interval"] for row in runs)
        lines.append(
            [
                f"`{name}`",
                f"{rate_of(name):g}",
                str(len(runs)),
                *cells,
                f"± {prompts:.3f}",
                spread(runs, "grad_norm"),
                spread(runs, "kl_last"),
            ]
        )
    return markdown(header, lines)


def axes_table(rows, names, best) -> str:
    header = ["recipe", "avg@8 halfway", "avg@8 at the end", *(f"{axis}, thousands" for axis in list(AXES)[1:4]), "update seconds a step"]
    lines = []
    for name in names:
        runs = pick(rows, name, best[name])
        tokens = [f"{statistics.fmean(row[axis] for row in runs) / 1000:.1f}" for axis in list(AXES)[1:4]]
        lines.append(
            [
                f"`{name}`",
                spread(runs, "halfway"),
                spread(runs, "avg@k"),
                *tokens,
                f"{statistics.median(r['update_seconds'] for r in runs):.3f}",
            ]
        )
    return markdown(header, lines)


def pair_table(rows, names, best) -> str:
    lines = []
    for name in names:
        if name == "opd":
            continue
        cells = []
        for column in SCORES:
            mean, half, count = paired(pick(rows, "opd", best["opd"]), pick(rows, name, best[name]), column)
            cells.append(f"{mean:+.3f} ± {half:.3f}")
        lines.append([f"`{name}`", *cells, str(count)])
    return markdown(["recipe less `opd`, each at its best rate", "avg@8", "greedy", "pass@8", "pairs"], lines)


def batch_table(rows, names, best) -> str:
    lines = []
    for name in names:
        for batch in (16, 64, 128):
            runs = pick(rows, name, best[name], batch)
            lines.append([f"`{name}`", str(batch), str(len(runs)), *(spread(runs, column) for column in SCORES), spread(runs, "grad_norm")])
    return markdown(["recipe", "rollouts a step", "n", "avg@8", "greedy", "pass@8", "gradient norm"], lines)


def claims(rows, best) -> list[list[str]]:
    """Each claim of the vOPD paper, what was found, and the verdict by a rule that is stated with it."""

    def difference(left, right, name="avg@k"):
        mean, half, count = paired(pick(rows, left, best[left]), pick(rows, right, best[right]), name)
        return mean, half, f"{mean:+.3f} ± {half:.3f} avg@8 ({count} pairs)"

    def is_above(mean, half):
        return mean - half > 0

    def is_equal(mean, half):
        return abs(mean) + half < MARGIN

    better, equal = "seen where the interval lies above 0", f"seen where the interval lies within ± {MARGIN}"
    found = []
    mean, half, text = difference("opd", "vopd_full")
    found.append(["vOPD is more accurate than OPD (+2.4 to +6.2 points)", text, better, is_above(mean, half)])
    mean, half, text = difference("full_kl_reverse", "vopd_full")
    found.append(["vOPD is as accurate as the exact full-vocabulary KL", text, equal, is_equal(mean, half)])
    mean, half, text = difference("vopd_full", "vopd_k100")
    found.append(["the baseline on the top 100 ids does what the full one does", text, equal, is_equal(mean, half)])
    pairs = [difference("vopd_full", f"vopd_k{k}") for k in (5, 20, 100)]
    text = "; ".join(f"k = {k}: {pair[2]}" for k, pair in zip((5, 20, 100), pairs))
    found.append(["accuracy is flat in k, even at k = 5", text, equal, all(is_equal(*pair[:2]) for pair in pairs)])
    mean, half, text = difference("topk_kl_renormalize", "vopd_k5")
    found.append(["the biased top-k KL gains less than vOPD with the top-k baseline, same k", text, better, is_above(mean, half)])
    ratios = [a["grad_norm"] / b["grad_norm"] for a, b in zip(pick(rows, "opd", 3e-4), pick(rows, "vopd_full", 3e-4))]
    mean, half = seed_interval(ratios)
    text = f"OPD's median norm is {mean:.2f} ± {half:.2f} times vOPD's, both at the common rate"
    found.append(
        ["gradient norms of vOPD are one to two orders of magnitude below OPD's", text, "seen where the ratio is over 10", mean - half > 10]
    )
    slow, fast = (statistics.median(r["update_seconds"] for r in pick(rows, name, best[name])) for name in ("full_kl_reverse", "vopd_k20"))
    text = f"an update takes {fast:.3f} s against {slow:.3f} s ({1 - fast / slow:.0%} less), V = 214, on a shared machine"
    found.append(
        [
            "a step of vOPD (top-k) takes 58 % less time than one of the exact KL",
            text,
            "seen where it is 40 % less or more",
            1 - fast / slow > 0.4,
        ]
    )
    return [[claim, text, rule, "seen" if holds else "not seen at this size"] for claim, text, rule, holds in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "experiments" / "results" / "white_box")
    args = parser.parse_args()
    sweep = load_sweep()
    names, best = (*sweep.ON_POLICY, *sweep.OFF_POLICY), sweep.BEST_RATE
    rows, missing = read_all(args.runs)
    grid = grid_of(rows)
    chosen = {name: max(gains, key=gains.get) for name, gains in grid.items()}
    if not best:
        print(f"{len(missing)} points are missing\nBEST_RATE = {chosen}\n{grid_table(grid, sweep.GRID)}")
        return
    if best != chosen:
        raise SystemExit(f"BEST_RATE of the sweep is {best}; the grid says {chosen}")
    attempts = [json.loads(line) for file in args.runs.glob("*/attempts.jsonl") for line in file.read_text().splitlines()]
    spent = sum(row.get("seconds", 0.0) for row in attempts) / 60
    before = read_run(args.runs / next(row["id"] for row in rows if not row["is_grid"])).result["eval_before"]
    commits = sorted({row["commit"][:10] for row in rows})
    parts = {
        "grid": grid_table(grid, sweep.GRID),
        "best": score_table(rows, names, best.__getitem__),
        "common_rows": score_table(rows, names, lambda _: sweep.COMMON_RATE),
        "axes": axes_table(rows, names, best),
        "pairs": pair_table(rows, names, best),
        "batches": batch_table(rows, sweep.OTHER_BATCHES, best),
        "claims": markdown(["claim of arXiv 2605.07865", "found", "rule", "verdict"], claims(rows, best)),
    }
    text = TEXT.format(
        runs=len(rows), missing=", ".join(missing) or "none", minutes=spent, commits=", ".join(commits), steps=sweep.BASE.train.num_steps,
        batch=sweep.BASE.train.prompts_per_step, k=sweep.BASE.evaluation.num_samples, prompts=sweep.BASE.evaluation.num_prompts,
        common=sweep.COMMON_RATE, avg=before["avg@k"], greedy=before["greedy"], passk=before["pass@k"],
        longest=max(row["seconds"] for row in rows if not row["is_grid"]), **parts,
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text)
    args.out.with_suffix(".json").write_text(
        json.dumps({"best_rate": best, "common_rate": sweep.COMMON_RATE, "runs": rows, "missing": missing}, indent=1) + "\n"
    )
    print(text)


TEXT = """# White-box recipes on the mini pair

    opdjax sweep experiments/sweeps/white_box.py --workdir runs/white_box --jobs 2
    python scripts/white_box_study.py runs/white_box

{runs} runs at commit {commits}, two cores of an AMD EPYC, {minutes:.0f} minutes of runs
added up, two at a time with one core each, on a machine that did other work as well; missing points: {missing}.
Every run: {steps} steps of {batch} completions (one a prompt) unless said, cosine learning rate, the last checkpoint
evaluated on the same {prompts} test prompts, {k} samples each at T = 1, with the same draws.
The untrained student: avg@8 {avg:.3f}, greedy {greedy:.3f}, pass@8 {passk:.3f}. The longest run trained for {longest:.0f} s.

"±" after a mean is half a 95 % interval over seeds (Student's t); "prompt interval" is the mean over runs of each run's own
interval over prompts. The two are never pooled: all runs answer the same prompts, so that differences between recipes do
not contain the prompts' share.

## Learning rates: gain in avg@8 on validation prompts, seed 100, one run each

{grid}

## Each recipe at its best rate, test prompts

{best}

## All at the common rate {common:g}

{common_rows}

## Paired by seed

{pairs}

## What it cost, at the best rate

All recipes take the same number of steps on the same prompts. Seconds are medians of a step's update alone, on a shared machine: read
them as an order, `scripts/benchmark_vocab.py` is the measurement.

{axes}

## Batch size, at the best rate of 64 rollouts

{batches}

## The paper's claims, at this size

{claims}
"""


if __name__ == "__main__":
    main()
