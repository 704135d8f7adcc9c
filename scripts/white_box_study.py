"""What the white-box sweep says: python scripts/white_box_study.py RUNS [--out
experiments/results/white_box]

Reads the runs of experiments/sweeps/white_box.py and writes OUT.md and OUT.json. While BEST_RATE in
the sweep file is empty it prints the best rates of the grid instead; where it differs from the grid
it refuses.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import statistics

from benchmark_vocab import cpu_model

from opdjax.runs.results import AXES, Run, mean, read_points, read_run
from opdjax.runs.statistics import seed_interval

ROOT = pathlib.Path(__file__).parents[1]
SCORES = ("avg@k", "greedy", "pass@k")
MARGIN = 0.02  # of avg@8: recipes this close count as equal


def load_sweep():
    spec = importlib.util.spec_from_file_location(
        "white_box", ROOT / "experiments" / "sweeps" / "white_box.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(run: Run) -> dict:
    """The numbers of one run; intervals here are over prompts."""
    after, norms = (
        run.result["eval_after"],
        [row["grad/norm"] for row in run.metrics if row.get("grad/norm") is not None],
    )
    last = run.metrics[-1]["step"]
    return {
        **{name: run.score(name) for name in SCORES},
        "prompt_interval": after["avg@k_interval"],
        "gain": run.gain,
        "halfway": next(
            (row["avg@k"] for row in run.evaluations if row["step"] == last // 2), None
        ),
        "grad_norm": run.median("grad/norm"),
        "grad_norm_first": statistics.median(norms[:10]),
        "kl_first": mean(run.column("kl/student_teacher")[:3]),
        "kl_last": run.last_mean("kl/student_teacher"),
        "signal_to_noise": signal_to_noise(run),
        **{axis: run.total_at(axis, last) for axis in AXES},
        "commit": run.environment["commit"],
    }


def signal_to_noise(run: Run) -> float | None:
    """Of the gradient of a step: both squares are averaged over the run before they are divided,
    for one step's may be negative.
    """
    signal, noise = (mean(run.column(f"grad/{name}_squared")) for name in ("signal", "noise"))
    return math.sqrt(max(signal, 0) / noise) if noise else None


def read_all(directory: pathlib.Path) -> tuple[list[dict], list[str]]:
    rows, missing = [], []
    for point in read_points(directory):
        if point.status != "done":
            missing.append(point.id)
            continue
        asked = point.overrides
        rows.append(
            {
                "id": point.id,
                "recipe": asked["estimator"],
                "rate": point.config["optimizer"]["learning_rate"],
                "rows": point.config["train"]["prompts_per_step"],
                "parts": point.config["train"]["gradient_accumulation_steps"],
                "seed": point.config["seed"],
                "is_grid": "evaluation.source" in asked,
                **numbers(read_run(point.workdir)),
            }
        )
    return rows, missing


def grid_of(rows: list[dict], parts: int) -> dict[str, dict[float, float]]:
    """recipe -> rate -> gain in avg@8 on validation prompts, of runs with so many micro-batches."""
    grid: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["is_grid"] and row["parts"] == parts:
            grid.setdefault(row["recipe"], {})[row["rate"]] = row["gain"]
    return grid


def pick(rows: list[dict], recipe: str, rate: float, batch: int = 64, parts: int = 1) -> list[dict]:
    found = [
        r
        for r in rows
        if not r["is_grid"]
        and (r["recipe"], r["rate"], r["rows"], r["parts"]) == (recipe, rate, batch, parts)
    ]
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
    return *(seed_interval(differences) if differences else (math.nan, math.inf)), len(differences)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        [
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )


def grid_table(grid, rates) -> str:
    def cell(gains, rate):
        best = gains.get(rate) == max(gains.values())
        return (
            ""
            if rate not in gains
            else f"**{gains[rate]:+.3f}**"
            if best
            else f"{gains[rate]:+.3f}"
        )

    return markdown(
        ["recipe", *(f"{rate:g}" for rate in rates)],
        [[name, *(cell(g, rate) for rate in rates)] for name, g in grid.items()],
    )


def score_table(rows, names, rate_of) -> str:
    header = [
        "recipe",
        "rate",
        "n",
        "avg@8",
        "greedy",
        "pass@8",
        "prompt interval",
        "gradient norm",
        "KL at the end",
    ]
    lines = []
    for name in names:
        if not (runs := pick(rows, name, rate_of(name))):
            continue
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


def variant_table(rows, names, rate_of, parts) -> str:
    """The variants of the sampled-token estimator beside what they are compared with; pairs by
    seed.
    """
    header = [
        "recipe",
        "rate",
        "n",
        "avg@8",
        "less `opd`",
        "less `vopd_full`",
        "greedy",
        "gradient norm",
        "signal / noise",
        "seconds a step",
    ]
    timed, lines = read_seconds(), []
    anchors = [pick(rows, name, rate_of(name), parts=parts) for name in ("opd", "vopd_full")]
    for name in names:
        runs = pick(rows, name, rate_of(name), parts=parts)
        beside = [
            "" if runs == anchor else "{:+.3f} ± {:.3f}".format(*paired(anchor, runs, "avg@k"))
            for anchor in anchors
        ]
        cells = [spread(runs, column) for column in ("greedy", "grad_norm", "signal_to_noise")]
        step = timed.get(name, {}).get("time/step", math.nan)
        lines.append(
            [
                f"`{name}`",
                f"{rate_of(name):g}",
                str(len(runs)),
                spread(runs, "avg@k"),
                *beside,
                *cells,
                f"{step:.3f}",
            ]
        )
    return markdown(header, lines)


def read_seconds() -> dict[str, dict[str, float]]:
    file = ROOT / "experiments" / "results" / "white_box_seconds.json"
    return json.loads(file.read_text()) if file.exists() else {}


def axes_table(rows, names, best) -> str:
    counts = list(AXES)[1:4]
    header = [
        "recipe",
        "avg@8 halfway",
        "avg@8 at the end",
        *(f"{axis}, thousands" for axis in counts),
        "seconds a step",
        "seconds in all",
    ]
    timed, lines = read_seconds(), []
    for name in names:
        if not (runs := pick(rows, name, best[name])):
            continue
        tokens = [f"{statistics.fmean(row[axis] for row in runs) / 1000:.1f}" for axis in counts]
        step = timed.get(name, {}).get("time/step", math.nan)
        seconds = [f"{step:.3f}", f"{step * runs[0]['steps']:.1f}"]
        lines.append(
            [f"`{name}`", spread(runs, "halfway"), spread(runs, "avg@k"), *tokens, *seconds]
        )
    return markdown(header, lines)


def pair_table(rows, names, best) -> str:
    lines = []
    for name in names:
        ours, theirs = pick(rows, "opd", best["opd"]), pick(rows, name, best[name])
        if name == "opd" or not {row["seed"] for row in ours} & {row["seed"] for row in theirs}:
            continue
        cells = []
        for column in SCORES:
            mean, half, count = paired(ours, theirs, column)
            cells.append(f"{mean:+.3f} ± {half:.3f}")
        lines.append([f"`{name}`", *cells, str(count)])
    return markdown(
        ["recipe less `opd`, each at its best rate", "avg@8", "greedy", "pass@8", "pairs"], lines
    )


def batch_table(rows, names, best) -> str:
    lines = []
    for name in names:
        for batch in (16, 64, 128):
            if not (runs := pick(rows, name, best[name], batch)):
                continue
            lines.append(
                [
                    f"`{name}`",
                    str(batch),
                    str(len(runs)),
                    *(spread(runs, column) for column in SCORES),
                    spread(runs, "grad_norm"),
                ]
            )
    return markdown(
        ["recipe", "rollouts a step", "n", "avg@8", "greedy", "pass@8", "gradient norm"], lines
    )


def paired_ratio(left: list[dict], right: list[dict], name: str) -> tuple[float, float]:
    """(geometric mean of left / right over common seeds, the factor that its 95 % interval
    multiplies and divides it by).
    """
    ours = {row["seed"]: row[name] for row in right}
    ratios = [math.log(row[name] / ours[row["seed"]]) for row in left if row["seed"] in ours]
    mean, half = seed_interval(ratios) if ratios else (math.nan, math.inf)
    return math.exp(mean), math.exp(half)


def judge(low: float, high: float, claimed: tuple[float, float]) -> str:
    """`reproduced` where the whole interval lies in what is claimed, `contradicted` where none of it
    does, else `inconclusive`.
    """
    if claimed[0] < low and high < claimed[1]:
        return "reproduced"
    return "contradicted" if high <= claimed[0] or low >= claimed[1] else "inconclusive"


def claims(rows, best, common) -> list[list[str]]:
    """Each claim of the vOPD paper, what was found, and the verdict by a rule that is stated with
    it.
    """

    def difference(left, right, name="avg@k"):
        mean, half, count = paired(
            pick(rows, left, best[left]), pick(rows, right, best[right]), name
        )
        return (mean - half, mean + half), f"{mean:+.3f} ± {half:.3f} avg@8 ({count} pairs)"

    better, equal = (0, math.inf), (-MARGIN, MARGIN)
    found = []

    def add(claim, text, rule, verdict):
        found.append([claim, text, rule, verdict])

    interval, text = difference("opd", "vopd_full")
    add(
        "vOPD is more accurate than OPD (+2.4 to +6.2 points)",
        text,
        "above 0",
        judge(*interval, better),
    )
    interval, text = difference("full_kl_reverse", "vopd_full")
    add(
        "vOPD is as accurate as the exact full-vocabulary KL",
        text,
        f"within ± {MARGIN}",
        judge(*interval, equal),
    )
    pairs = [difference("vopd_full", f"vopd_k{k}") for k in (5, 20, 100)]
    text = "; ".join(f"k = {k}: {pair[1]}" for k, pair in zip((5, 20, 100), pairs))
    verdicts = {judge(*pair[0], equal) for pair in pairs}
    verdict = (
        "reproduced"
        if verdicts == {"reproduced"}
        else "contradicted"
        if "contradicted" in verdicts
        else "inconclusive"
    )
    add(
        "the top-k baseline does what the full one does, flat in k, even at k = 5",
        text,
        f"each within ± {MARGIN}",
        verdict,
    )
    interval, text = difference("topk_kl_renormalize", "vopd_k5")
    add(
        "the biased top-k KL gains less than vOPD with the top-k baseline (here at k = 5)",
        text,
        "above 0",
        judge(*interval, better),
    )
    ratio, factor = paired_ratio(
        pick(rows, "opd", common), pick(rows, "vopd_full", common), "grad_norm"
    )
    text = (
        f"OPD's median norm is {ratio:.2f} (×/÷ {factor:.2f}) times vOPD's, both at the common rate"
    )
    verdict = judge(ratio / factor, ratio * factor, (10, math.inf))
    add(
        "gradient norms of vOPD lie one to two orders of magnitude below OPD's",
        text,
        "ratio above 10",
        verdict,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "experiments" / "results" / "white_box"
    )
    args = parser.parse_args()
    sweep = load_sweep()
    names, best = (*sweep.ON_POLICY, *sweep.OFF_POLICY), sweep.BEST_RATE
    rows, missing = read_all(args.runs)
    parts_of_variants = sweep.MICRO_BATCHES[0]["train.gradient_accumulation_steps"].value
    variant_grid = grid_of(rows, parts_of_variants)
    grid = grid_of(rows, 1)
    gains_of = grid | variant_grid
    incomplete = [
        name for name in (*names, *sweep.VARIANTS) if set(gains_of.get(name, ())) != set(sweep.GRID)
    ]
    if incomplete:
        raise SystemExit(
            f"the grid lacks rates of {', '.join(incomplete)}; finish the sweep first ({len(missing)} points are missing)"
        )
    chosen = {name: max(gains, key=gains.get) for name, gains in gains_of.items()}
    if best != chosen:
        differing = {name: rate for name, rate in chosen.items() if best.get(name) != rate}
        raise SystemExit(
            f"BEST_RATE of the sweep differs from the grid, which says {differing} ({len(missing)} points are missing)"
        )
    attempts = [
        json.loads(line)
        for file in args.runs.glob("*/attempts.jsonl")
        for line in file.read_text().splitlines()
    ]
    spent = sum(row.get("seconds", 0.0) for row in attempts) / 60
    before = read_run(args.runs / next(row["id"] for row in rows if not row["is_grid"])).result[
        "eval_before"
    ]
    commits = sorted({row["commit"][:10] for row in rows})
    parts = {
        "grid": grid_table(grid, sweep.GRID),
        "best": score_table(rows, names, best.__getitem__),
        "common_rows": score_table(rows, names, lambda _: sweep.COMMON_RATE),
        "axes": axes_table(rows, names, best),
        "pairs": pair_table(rows, names, best),
        "batches": batch_table(rows, sweep.OTHER_BATCHES, best),
        "claims": markdown(
            ["claim of arXiv 2605.07865", "found", "claimed", "verdict"],
            claims(rows, best, sweep.COMMON_RATE),
        ),
        "variant_grid": grid_table(variant_grid, sweep.GRID),
        "variants": variant_table(
            rows, (*sweep.ANCHORS, *sweep.VARIANTS), best.__getitem__, parts_of_variants
        ),
        "variants_common": variant_table(
            rows, (*sweep.ANCHORS, *sweep.VARIANTS), lambda _: sweep.COMMON_RATE, parts_of_variants
        ),
        "edges": ", ".join(
            f"`{name}`" for name in best if best[name] in (min(sweep.GRID), max(sweep.GRID))
        )
        or "none",
    }
    text = TEXT.format(
        runs=len(rows),
        missing=", ".join(missing) or "none",
        minutes=spent,
        commits=", ".join(commits),
        steps=sweep.BASE.train.num_steps,
        batch=sweep.BASE.train.prompts_per_step,
        k=sweep.BASE.evaluation.num_samples,
        prompts=sweep.BASE.evaluation.num_prompts,
        machine=cpu_model(),
        common=sweep.COMMON_RATE,
        avg=before["avg@k"],
        greedy=before["greedy"],
        passk=before["pass@k"],
        **parts,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text)
    args.out.with_suffix(".json").write_text(
        json.dumps(
            {"best_rate": best, "common_rate": sweep.COMMON_RATE, "runs": rows, "missing": missing},
            indent=1,
        )
        + "\n"
    )
    print(text)


TEXT = """# White-box recipes on the mini pair

    opdjax sweep experiments/sweeps/white_box.py --workdir runs/white_box --jobs 2
    python scripts/white_box_study.py runs/white_box

{runs} runs at commit {commits}, {minutes:.0f} minutes of runs added up (two at a time, one core each); missing points: {missing}.
Machine: {machine}, two cores; it did other work as well, so times of single runs say nothing.
Every run: {steps} steps of {batch} completions (one a prompt) unless said, cosine learning rate, the last checkpoint
evaluated on the same {prompts} test prompts, {k} samples each at T = 1, with the same draws.
The untrained student: avg@8 {avg:.3f}, greedy {greedy:.3f}, pass@8 {passk:.3f}.

"±" after a mean is half a 95 % interval over seeds (Student's t); "prompt interval" is the mean over runs of each run's own
interval over prompts. The two are never pooled: all runs answer the same prompts, so that differences between recipes do
not contain the prompts' share. "KL at the end" is the mean over the last ten steps of KL(student || teacher) on
the student's completions: exact, but for `opd` and the top-k baselines, where it is the mean log-ratio of sampled tokens.

## Learning rates: gain in avg@8 on validation prompts, seed 100, one run each

{grid}

Best at the edge of the grid: {edges}.

## Each recipe at its best rate, test prompts

{best}

## All at the common rate {common:g}

{common_rows}

## Paired by seed

{pairs}

## What it cost, at the best rate

All recipes take the same number of steps on the same prompts. Seconds are of `scripts/time_recipes.py`, one recipe after
the other on a quiet machine, both cores: sampling, teacher and update of a step, and 100 such steps. With 214 ids and
0.35 million parameters all cost the same; `scripts/benchmark_recipes.py` measures what a recipe costs at 151,936 ids.

{axes}

## Batch size, at the best rate of 64 rollouts

{batches}

## Variants of the sampled-token estimator

All in eight micro-batches a step, the runs that they are compared with too: the same gradient, and an estimate of how much
of it is chance. "Signal / noise" is of the gradient of one step of {batch} completions: the norm of its expectation over its standard
deviation, both squares averaged over the {steps} steps first. `opd_floor`: rewards of at least -2 nats. `opd_power`: teacher(y)^0.5 -
student(y)^0.5. `opd_3_draws`, `opd_15_draws`: so many more tokens drawn at each context. `opd_to_go`: discount 1;
`opd_to_go_expected`: with -KL in place of later rewards. `vopd_optimal`: b*; `vopd_batch_mean`: the mean of the other sequences.

{variant_grid}

Each at its best rate:

{variants}

All at the common rate {common:g}:

{variants_common}

## The paper's claims, at this size

"Seen" means that the whole 95 % interval lies in what is claimed, "contradicted" that none of it does, "inconclusive" the rest.
Five claims are judged, without a correction for their number.

{claims}
"""


if __name__ == "__main__":
    main()
