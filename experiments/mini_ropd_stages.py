"""Stage-structured credit on the mini pair: each step of a worked answer has its own score and is
credited with the scores of later steps.

Papers: SS-GRPO of RubricEM (arXiv 2605.10899, section 3.3) on the rubrics of ROPD (arXiv
2605.07396), without tools, search or a memory bank. An answer such as 34-17=17;17+25=42#42 has
three stages: up to the semicolon, up to the #, and the rest. Everything else is as in mini_ropd.py.

    opdjax train experiments/mini_ropd_stages.py --workdir runs/mini_ropd_stages

The paper defines its credit for four stages. `decay` is ours, for three: weight 1 for the stage
itself, 0.8 for the last stage, 0.5 for stages in between. Alternatives: --estimator.stage-credit
last (plain ROPD on the last stage's score), --estimator.stage-credit identity,
--estimator.aggregation stage_token_mean.

Hardware: two CPU cores, three minutes. Expected on 512 test problems, three seeds: avg@8 0.409 ->
0.541 ± 0.033, greedy 0.543 -> 0.895.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig, RubricsConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    return replace(
        config_beside(__file__, "mini_ropd.py"),
        estimator=EstimatorConfig("ropd_stages", stage_credit="decay"),
        rubrics=RubricsConfig(stages=("first step", "second step=;", "answer=#")),
    )
