"""opd, vopd and full_kl at equal steps on the mini pair: a table of what each reaches, how, and at which learning rate.

    python scripts/compare_recipes.py --workdir runs/compare      # resumable: finished runs are not repeated

Each recipe's learning rate is chosen from one small grid on validation prompts with a seed of its own; then three seeds
run at that rate and at the common one, on test prompts. All runs answer the same test prompts with the same draws.
"""

import argparse
import dataclasses
import pathlib
import statistics

from opdjax.cli import load_experiment
from opdjax.config import Config
from opdjax.train import train
from opdjax.workdir import read_lines

RECIPES = ("opd", "vopd", "full_kl")
GRID = (1e-4, 3e-4, 1e-3)
COMMON = 3e-4
GRID_SEED, SEEDS = 100, (0, 1, 2)
EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"


def make_config(recipe: str, learning_rate: float, seed: int, split: str, args) -> Config:
    config = load_experiment(str(EXPERIMENTS / f"mini_{recipe}.py"))
    return dataclasses.replace(
        config,
        seed=seed,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=learning_rate),
        train=dataclasses.replace(config.train, num_steps=args.steps, prompts_per_step=args.rows),
        evaluation=dataclasses.replace(config.evaluation, source=f"arithmetic:{split}", extra_temperatures=()),
        mesh=dataclasses.replace(config.mesh, data=1),
    )


def run(recipe: str, learning_rate: float, seed: int, split: str, args) -> dict:
    """The numbers of one run."""
    workdir = args.workdir / f"{recipe}-lr{learning_rate:g}-seed{seed}-{split}"
    result = train(make_config(recipe, learning_rate, seed, split, args), workdir)
    rows = read_lines(workdir / "metrics.jsonl")
    kl = [row["kl/student_teacher"] for row in rows]
    return {
        "gain": result["eval_after"]["avg@k"] - result["eval_before"]["avg@k"],
        "avg@k": result["eval_after"]["avg@k"],
        "greedy": result["eval_after"]["greedy"],
        "pass@k": result["eval_after"]["pass@k"],
        "grad": statistics.median(row["grad/norm"] for row in rows if row["grad/norm"] is not None),
        "kl_before": statistics.mean(kl[:3]),
        "kl_after": statistics.mean(kl[-10:]),
    }


def spread(runs: list[dict], name: str) -> str:
    values = [numbers[name] for numbers in runs]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=64, help="prompts a step, one rollout each")
    args = parser.parse_args()
    best = {}
    grid_lines = []
    for recipe in RECIPES:
        gains = {rate: run(recipe, rate, GRID_SEED, "validation", args)["gain"] for rate in GRID}
        best[recipe] = max(gains, key=gains.get)
        grid_lines.append(f"| {recipe} | " + " | ".join(f"{gain:+.3f}" for gain in gains.values()) + " |")
    table = []
    for recipe in RECIPES:
        for label, rate in (("common", COMMON), ("best", best[recipe])):
            runs = [run(recipe, rate, seed, "test", args) for seed in SEEDS]
            cells = [spread(runs, name) for name in ("avg@k", "greedy", "pass@k", "grad", "kl_before", "kl_after")]
            table.append(f"| {recipe} | {label} {rate:g} | " + " | ".join(cells) + " |")
    print("\nGain in avg@8 on validation prompts, one seed\n")
    print("| recipe | " + " | ".join(f"lr {rate:g}" for rate in GRID) + " |\n|" + "---|" * (len(GRID) + 1))
    print("\n".join(grid_lines))
    print(f"\nTest prompts, {len(SEEDS)} seeds, {args.steps} steps of {args.rows} rollouts; mean ± standard deviation over seeds\n")
    print("| recipe | learning rate | avg@8 | greedy | pass@8 | median gradient norm | token KL, first 3 steps | last 10 |\n|" + "---|" * 8)
    print("\n".join(table))


if __name__ == "__main__":
    main()
