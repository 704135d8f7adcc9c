"""Finished work directories of a small study, written as opdjax train writes them, without training
anything.
"""

import dataclasses
import json

from opdjax.config import Config, EstimatorConfig, EvaluationConfig, TrainConfig
from opdjax.config.grid import SCORED_ON, arms, points, product, rate_grid, seeds
from opdjax.config.validation import to_dict

DATA = {
    "prompts": "d1",
    "evaluation": "d2",
    "num_prompts": 64,
    "num_skipped": 0,
    "student": "s",
    "teacher": "t",
}
ENVIRONMENT = {
    "opdjax": "0.1.0",
    "commit": "c0ffee",
    "python": "3.11.7",
    "jax": "0.10.2",
    "devices": ["cpu"],
}
RECIPES = {
    "opd": EstimatorConfig("opd"),
    "vopd": EstimatorConfig("vopd", baseline="full"),
    "vopd_k100": EstimatorConfig("vopd", baseline="student_topk", support_top_k=100),
    "full_kl": EstimatorConfig("full_kl", divergence="reverse"),
    "opd_topk": EstimatorConfig("topk_kl", support="student", support_top_k=5),
    # Any two recipes do where only what comes of them is compared.
    "lopd": EstimatorConfig("opd"),
    "ropd": EstimatorConfig("sft"),
    "teacher": EstimatorConfig("npd"),
}
BASE = Config(
    evaluation=EvaluationConfig(every=10), train=TrainConfig(num_steps=40, prompts_per_step=16)
)


GRID = (1e-6, BASE.optimizer.learning_rate, 1e-4)


def make(directory, scores, *, pair="mini", seeds_of=None, base=BASE, grids=None, **more):
    """A sweep with these arms, and a run for each score: `{"opd": (0.5, 0.6)}` are seeds 0 and 1,
    None a run that is not there.

    A score may be a mapping, of benchmarks; `more` of `write_point`. Each arm has a grid of
    learning rates, whose best is that of the comparison; `grids` gives the scores of the rates of
    an arm instead, `{}` none.
    """
    wanted = arms({name: {"estimator": RECIPES[name], **_source(name)} for name in scores})
    made = points(
        base,
        product(
            arms({pair: {}}, "pair"), wanted, seeds(seeds_of or max(map(len, scores.values())))
        ),
    )
    tuned = product(arms({pair: {}}, "pair"), wanted)
    default = {name: dict(zip(GRID, (0.1, 0.2, 0.15))) for name in scores}
    for point in points(base, rate_grid(tuned, GRID, {"source": "validation.jsonl"}, 100)):
        rates = (default if grids is None else default | grids).get(point.overrides["arm"], {})
        rate = point.config.optimizer.learning_rate
        if rate in rates:
            write_point(directory, point, rates[rate])
    for point in made:
        values = scores[point.overrides["arm"]]
        seed = point.config.seed
        write_point(directory, point, values[seed] if seed < len(values) else None, **more)
    return made


def _source(name):
    return {"sampling.completions_from": "teacher"} if name == "ropd" else {}


def write_point(
    directory,
    point,
    score,
    *,
    start=0.3,
    curve=None,
    data=DATA,
    environment=ENVIRONMENT,
    metrics=None,
    per_prompt=None,
    attempt=None,
):
    """One point; its result where it has a score. `metrics` by arm are further ones of all steps,
    `per_prompt` by arm and seed the right ones of 8 answers to each prompt, `attempt` gives a
    point's (start, end).
    """
    workdir = directory / point.id
    workdir.mkdir(parents=True)
    config = to_dict(point.config)
    (workdir / "point.json").write_text(
        json.dumps({"id": point.id, "overrides": point.overrides, "config": config})
    )
    if score is None:
        return
    (workdir / "config.json").write_text(
        json.dumps({"config": config, "data": data, "environment": environment})
    )
    arm = point.overrides["arm"]
    result = {
        "student": "student",
        "seconds": 30.0,
        "eval_before": evaluation(0, start),
        "eval_after": evaluation(40, score),
    }
    rows = [
        evaluation(step, value) for step, value in (curve or {}).get(arm, ((0, start), (40, score)))
    ]
    lines = [
        {
            "step": step,
            "time/step": 0.5,
            "grad/norm": 2.0,
            "loss/objective": f"{arm}, seed {point.config.seed}",  # no two arms train alike
            **(metrics or {}).get(arm, {}),
        }
        for step in range(1, 41)
    ]
    right = (per_prompt or {}).get((arm, point.config.seed))
    if right is not None and SCORED_ON not in point.overrides:
        result["eval_after"]["per_prompt"] = right
    if attempt is not None:
        start, end = attempt(point)
        events = [{"event": "start", "host": "h", "time": start}, {"event": "end", "time": end}]
        (workdir / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (workdir / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "result.json").write_text(json.dumps(result))


def evaluation(step, score):
    """A row of eval.jsonl; a mapping of scores is one of benchmarks."""
    row = {"step": step, "temperature": 1.0, "k": 8, "num_prompts": 64}
    if not isinstance(score, dict):
        return row | {"avg@k": score, "avg@k_interval": 0.02}
    mean = sum(score.values()) / len(score)
    named = {name: {"avg@k": value} for name, value in (score | {"mean": mean}).items()}
    return row | {"avg@k": mean, "avg@k_interval": 0.02, "benchmarks": named}


def renamed(config, **fields):
    """The config with fields of its evaluation changed."""
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **fields))
