"""Write the results of the white-box sweep.

    python scripts/white_box_study.py RUNS [--out experiments/results/white_box]

Reads the runs of experiments/sweeps/white_box.py and writes OUT.md and OUT.json. If BEST_RATE in
the sweep file differs from the grid's best rates, it exits with an error that names them.
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
MARGIN = 0.02  # in avg@8: recipes this close count as equal


def load_sweep():
    spec = importlib.util.spec_from_file_location(
        "white_box", ROOT / "experiments" / "sweeps" / "white_box.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(run: Run) -> dict:
    """Return the numbers of one run; intervals are over prompts."""
    after, last = run.result["eval_after"], run.metrics[-1]["step"]
    norms = [row["grad/norm"] for row in run.metrics if row.get("grad/norm") is not None]
    halfway = (row["avg@k"] for row in run.evaluations if row["step"] == last // 2)
    return {
        **{name: run.score(name) for name in SCORES},
        "prompt_interval": after["avg@k_interval"],
        "gain": run.gain,
        "halfway": next(halfway, None),
        "grad_norm": run.median("grad/norm"),
        "grad_norm_first": statistics.median(norms[:10]),
        "kl_first": mean(run.column("kl/student_teacher")[:3]),
        "kl_last": run.last_mean("kl/student_teacher"),
        "signal_to_noise": signal_to_noise(run),
        **{axis: run.total_at(axis, last) for axis in AXES},
        "commit": run.environment["commit"],
    }


def signal_to_noise(run: Run) -> float | None:
    """Return the signal-to-noise ratio of a step's gradient.

    Both squares are averaged over the run first, because those of one step may be negative.
    """
    signal, noise = (mean(run.column(f"grad/{name}_squared")) for name in ("signal", "noise"))
    return math.sqrt(max(signal, 0) / noise) if noise else None


def read_all(directory: pathlib.Path) -> tuple[list[dict], list[str]]:
    rows, missing = [], []
    for point in read_points(directory):
        if point.status != "done":
            missing.append(point.id)
            continue
        overrides = point.overrides
        rows.append(
            {
                "id": point.id,
                "recipe": overrides["estimator"],
                "rate": point.config["optimizer"]["learning_rate"],
                "rows": point.config["train"]["prompts_per_step"],
                "parts": point.config["train"]["gradient_accumulation_steps"],
                "seed": point.config["seed"],
                "is_grid": "evaluation.source" in overrides,
                **numbers(read_run(point.workdir)),
            }
        )
    return rows, missing


def grid_of(rows: list[dict], parts: int) -> dict[str, dict[float, float]]:
    """Return the gain in avg@8 on validation prompts, by recipe and rate.

    Only runs with `parts` micro-batches.
    """
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
    """Return (mean of right - left over common seeds, half its 95 % interval, their number)."""
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
        if rate not in gains:
            return ""
        text = f"{gains[rate]:+.3f}"
        return f"**{text}**" if gains[rate] == max(gains.values()) else text

    return markdown(
        ["recipe", *(f"{rate:g}" for rate in rates)],
        [[name, *(cell(g, rate) for rate in rates)] for name, g in grid.items()],
    )


def score_table(rows, names, rate_of) -> str:
    header = ["recipe", "rate", "n", "avg@8", "greedy", "pass@8"]
    header += ["prompt interval", "gradient norm", "final KL"]
    lines = []
    for name in names:
        if not (runs := pick(rows, name, rate_of(name))):
            continue
        cells = [f"`{name}`", f"{rate_of(name):g}", str(len(runs))]
        cells += [spread(runs, column) for column in SCORES]
        cells.append(f"± {statistics.fmean(row['prompt_interval'] for row in runs):.3f}")
        lines.append([*cells, spread(runs, "grad_norm"), spread(runs, "kl_last")])
    return markdown(header, lines)


def variant_table(rows, names, rate_of, parts) -> str:
    """Return a table of the sampled-token estimator's variants, compared by seed."""
    header = ["recipe", "rate", "n", "avg@8", "minus `opd`", "minus `vopd_full`", "greedy"]
    header += ["gradient norm", "signal / noise", "seconds a step"]
    timed, lines = read_seconds(), []
    anchors = [pick(rows, name, rate_of(name), parts=parts) for name in ("opd", "vopd_full")]
    for name in names:
        runs = pick(rows, name, rate_of(name), parts=parts)
        differences = [
            "" if runs == anchor else "{:+.3f} ± {:.3f}".format(*paired(anchor, runs, "avg@k"))
            for anchor in anchors
        ]
        cells = [spread(runs, column) for column in ("greedy", "grad_norm", "signal_to_noise")]
        step = timed.get(name, {}).get("time/step", math.nan)
        first = [f"`{name}`", f"{rate_of(name):g}", str(len(runs)), spread(runs, "avg@k")]
        lines.append([*first, *differences, *cells, f"{step:.3f}"])
    return markdown(header, lines)


def read_seconds() -> dict[str, dict[str, float]]:
    file = ROOT / "experiments" / "results" / "white_box_seconds.json"
    return json.loads(file.read_text()) if file.exists() else {}


def axes_table(rows, names, best) -> str:
    counts = list(AXES)[1:4]
    header = ["recipe", "avg@8 halfway", "final avg@8"]
    header += [*(f"{axis}, thousands" for axis in counts), "seconds a step", "total seconds"]
    timed, lines = read_seconds(), []
    for name in names:
        if not (runs := pick(rows, name, best[name])):
            continue
        tokens = [f"{statistics.fmean(row[axis] for row in runs) / 1000:.1f}" for axis in counts]
        step = timed.get(name, {}).get("time/step", math.nan)
        seconds = [f"{step:.3f}", f"{step * runs[0]['steps']:.1f}"]
        scores = [spread(runs, "halfway"), spread(runs, "avg@k")]
        lines.append([f"`{name}`", *scores, *tokens, *seconds])
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
        ["recipe minus `opd`, each at its best rate", "avg@8", "greedy", "pass@8", "pairs"], lines
    )


def batch_table(rows, names, best) -> str:
    lines = []
    for name in names:
        for batch in (16, 64, 128):
            if not (runs := pick(rows, name, best[name], batch)):
                continue
            scores = [spread(runs, column) for column in (*SCORES, "grad_norm")]
            lines.append([f"`{name}`", str(batch), str(len(runs)), *scores])
    return markdown(
        ["recipe", "rollouts a step", "n", "avg@8", "greedy", "pass@8", "gradient norm"], lines
    )


def paired_ratio(left: list[dict], right: list[dict], name: str) -> tuple[float, float]:
    """Return (geometric mean of left / right over common seeds, factor of its 95 % interval).

    The interval is from the mean divided by the factor to the mean times the factor.
    """
    ours = {row["seed"]: row[name] for row in right}
    ratios = [math.log(row[name] / ours[row["seed"]]) for row in left if row["seed"] in ours]
    mean, half = seed_interval(ratios) if ratios else (math.nan, math.inf)
    return math.exp(mean), math.exp(half)


def judge(low: float, high: float, claimed: tuple[float, float]) -> str:
    """Return `reproduced` if the whole interval is in the claimed range, `contradicted` if none is.

    Otherwise `inconclusive`.
    """
    if claimed[0] < low and high < claimed[1]:
        return "reproduced"
    return "contradicted" if high <= claimed[0] or low >= claimed[1] else "inconclusive"


def claims(rows, best, common) -> list[list[str]]:
    """Return the claims of the vOPD paper: claim, number here, rule, verdict."""

    def difference(left, right, name="avg@k"):
        mean, half, count = paired(
            pick(rows, left, best[left]), pick(rows, right, best[right]), name
        )
        return (mean - half, mean + half), f"{mean:+.3f} ± {half:.3f} avg@8 ({count} pairs)"

    better, equal, within = (0, math.inf), (-MARGIN, MARGIN), f"within ± {MARGIN}"
    found = []
    add = lambda *cells: found.append(list(cells))
    interval, text = difference("opd", "vopd_full")
    claim = "vOPD is more accurate than OPD (+2.4 to +6.2 points)"
    add(claim, text, "above 0", judge(*interval, better))
    interval, text = difference("full_kl_reverse", "vopd_full")
    claim = "vOPD is as accurate as the exact full-vocabulary KL"
    add(claim, text, within, judge(*interval, equal))
    pairs = [difference("vopd_full", f"vopd_k{k}") for k in (5, 20, 100)]
    text = "; ".join(f"k = {k}: {pair[1]}" for k, pair in zip((5, 20, 100), pairs))
    verdicts = {judge(*pair[0], equal) for pair in pairs}
    # The worst of the three counts.
    verdict = next(v for v in ("contradicted", "inconclusive", "reproduced") if v in verdicts)
    claim = "the top-k baseline is as accurate as the full one for every k, even k = 5"
    add(claim, text, f"each {within}", verdict)
    interval, text = difference("topk_kl_renormalize", "vopd_k5")
    claim = "the biased top-k KL gains less than vOPD with the top-k baseline (here at k = 5)"
    add(claim, text, "above 0", judge(*interval, better))
    ratio, factor = paired_ratio(
        pick(rows, "opd", common), pick(rows, "vopd_full", common), "grad_norm"
    )
    text = f"OPD's median norm is {ratio:.2f} (×/÷ {factor:.2f}) times vOPD's, at the common rate"
    verdict = judge(ratio / factor, ratio * factor, (10, math.inf))
    claim = "gradient norms of vOPD are one to two orders of magnitude below OPD's"
    add(claim, text, "ratio above 10", verdict)
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
            f"the grid lacks rates of {', '.join(incomplete)}; finish the sweep first "
            f"({len(missing)} points are missing)"
        )
    chosen = {name: max(gains, key=gains.get) for name, gains in gains_of.items()}
    if best != chosen:
        differing = {name: rate for name, rate in chosen.items() if best.get(name) != rate}
        raise SystemExit(
            f"BEST_RATE of the sweep differs from the grid's {differing}; {len(missing)} points "
            "are missing"
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

{runs} runs at commit {commits}, {minutes:.0f} minutes of runs in total (two at a time, one core
each); missing points: {missing}. Machine: {machine}, two cores, with other load, so times of single
runs are meaningless.

Every run makes {steps} steps of {batch} completions (one a prompt) unless stated otherwise, with a
cosine learning rate. The last checkpoint is evaluated on the same {prompts} test prompts, with {k}
samples each at T = 1 and the same random draws. The untrained student has avg@8 {avg:.3f}, greedy
{greedy:.3f}, pass@8 {passk:.3f}.

"±" after a mean is half a 95 % interval over seeds (Student's t); "prompt interval" is the mean
over runs of each run's own interval over prompts. The two are never pooled: all runs answer the
same prompts, so differences between recipes do not include the choice of prompts. "Final KL" is the
mean over the last ten steps of KL(student || teacher) on the student's completions. It is exact,
except for `opd` and the top-k baselines, where it is the mean log-ratio of the sampled tokens.

## Learning rates: gain in avg@8 on validation prompts, seed 100, one run each

{grid}

Best at the edge of the grid: {edges}.

## Each recipe at its best rate, test prompts

{best}

## All at the common rate {common:g}

{common_rows}

## Paired by seed

{pairs}

## Cost at the best rate

All recipes take the same number of steps on the same prompts. `scripts/time_recipes.py` measured
the seconds, one recipe after the other on an idle machine with both cores: sampling, teacher and
update of a step, and 100 such steps. With 214 ids and 0.35 million parameters all recipes cost the
same; `scripts/benchmark_recipes.py` measures their cost at 151,936 ids.

{axes}

## Batch size, at the best rate of 64 rollouts

{batches}

## Variants of the sampled-token estimator

All runs of this section use eight micro-batches a step, which gives the same gradient and an
estimate of its noise. "Signal / noise" is that of the gradient of one step of {batch} completions:
the norm of its expectation over its standard deviation, both squares averaged over the {steps}
steps first. `opd_floor`: rewards of at least -2 nats. `opd_power`: teacher(y)^0.5 - student(y)^0.5.
`opd_3_draws`, `opd_15_draws`: 3 or 15 more tokens sampled at each context. `opd_to_go`: discount 1;
`opd_to_go_expected`: with -KL in place of later rewards. `vopd_optimal`: b*; `vopd_batch_mean`: the
mean of the other sequences.

{variant_grid}

Each at its best rate:

{variants}

All at the common rate {common:g}:

{variants_common}

## The paper's claims, at this size

Reproduced: the whole 95 % interval is in the claimed range. Contradicted: none of it is.
Inconclusive: the rest. The intervals are not corrected for the five claims.

{claims}
"""


if __name__ == "__main__":
    main()
