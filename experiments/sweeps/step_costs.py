"""What parts of a training step cost on the built-in mini pair: padding or packed rows, the
diagnostics, generation before or beside learning.

    python scripts/benchmark.py step experiments/sweeps/step_costs.py --clock cpu --repeats 5 \
        --only rows diagnostics
    JAX_NUM_CPU_DEVICES=2 python scripts/benchmark.py step experiments/sweeps/step_costs.py \
        --only async

Arms whose names begin with `rows`: 64 answers of at most 48 or 240 tokens a step, one a row or
packed into rows as long or twice as long, in one micro-batch or eight. `diagnostics`: computed
never, in every step, or in one of ten. `async`: rollouts sampled by the learner's process between
two updates, or on a device of their own beside them, 2 or 8 updates ahead; `opdjax sweep` and
`opdjax report` draw the timeline of such runs. Hardware: two CPU cores, a minute for each arm.
"""

from dataclasses import replace

from opdjax.config import EstimatorConfig, EvaluationConfig, LogConfig, NearPolicyConfig
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, points

PROMPT = 32  # tokens of a prompt
FORMS = {"padded_1": (1, None), "padded_8": (8, None), "packed_8": (8, 1), "packed_8_twice": (8, 2)}
ROWS = {
    f"rows_{most}_{name}": {
        "sampling.max_completion_length": most,
        "train.gradient_accumulation_steps": parts,
        "train.pack_length": times and times * (PROMPT + most),
    }
    for most in (48, 240)
    for name, (parts, times) in FORMS.items()
}
RECIPES = {"opd": {}, "vopd": {"baseline": "full"}, "full_kl": {"divergence": "reverse"}}
DIAGNOSTICS = {
    f"diagnostics_{name}_{every}": {
        "estimator": EstimatorConfig(name, **options),
        "log.diagnostics_every": every,
    }
    for name, options in RECIPES.items()
    for every in (0, 1, 10)
}
BESIDE = NearPolicyConfig("continuous", generator="thread")
AHEAD = {
    "on_policy": NearPolicyConfig(),
    "synchronous": NearPolicyConfig("continuous"),
    "lag_2": replace(BESIDE, max_staleness=2),
    "lag_8": replace(BESIDE, max_staleness=8),
    "free_8": replace(BESIDE, max_staleness=8, lag="free"),
}
ASYNC = {
    f"async_{name}": {"near_policy": near, "estimator": EstimatorConfig("npd"), "mesh.data": -1}
    for name, near in AHEAD.items()
}


def get_sweep() -> list[SweepPoint]:
    mini = config_beside(__file__, "../mini_vopd.py")
    base = replace(
        mini,
        train=replace(mini.train, prompts_per_step=64),
        evaluation=EvaluationConfig(source=None),
        log=LogConfig(samples_every=0, diagnostics_every=0),
        mesh=replace(mini.mesh, data=1),
    )
    return points(base, arms(ROWS | DIAGNOSTICS | ASYNC))
