"""RubricEM's stage credit without tools: a score per stage of a worked solution against one score
for the whole solution.

    opdjax sweep experiments/sweeps/rubricem_stages.py --workdir runs/rubricem_stages
    opdjax table runs/rubricem_stages --paper rubricem_stages

Paper: "RubricEM: Meta-RL with Rubric-guided Policy Decomposition beyond Verifiable Rewards", arXiv
2605.10899. Its student is a research agent, Qwen3-8B with search tools, with the stages plan,
research, review and answer. Here Qwen3-4B, without thinking, writes the plan, the derivation, a
check and the answer of a contest problem under headings that the prompt asks for. There are no
tools, no memory bank, no meta-policy and no fine-tuning on structured answers. Judge:
Qwen3-30B-A3B-Instruct-2507 behind vLLM at port 8000; the paper's is Gemini-3-Flash. Data and
evaluation: dapo17k.jsonl and contests.jsonl as in ropd_black_box.py; no references. Settings of the
paper's section F: 32 prompts x 8 rollouts, lr 5e-7 constant, KL to the initial student 0.001 (k3),
population standard deviation, clip 0.2, 600 steps as in its ablations; evolving rubrics with grades
0, 1, 2 and criteria for flaws; at most 3, 2, 2, 3 criteria per stage, 5 for the answer alone, as in
the code base that the paper builds on [T].

Hardware: the paper's ablations use two nodes of eight devices [P]; hours are not stated. Here 6
runs of 600 steps; with ROPD's 6.6 minutes per step of this student on eight A100, 66 hours per run
[D]. Never run here. The paper's numbers: a figure whose bars were not recovered; answer-only <
stage-structured on each of its benchmarks [P]. Deviations: models, data, stages and judge, as
stated; criteria have weights 1 to 5, the paper's 1 to 3.
"""

from dataclasses import replace

from opdjax.config import (
    ApiConfig,
    EstimatorConfig,
    JudgeConfig,
    OptimizerConfig,
    RubricsConfig,
    TeachConfig,
)
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, points, product, seeds

PROMPT = (
    "{prompt}\n\nAnswer in four parts under these headings, each on a line of its own: ## Plan, "
    "## Derivation, ## Check, ## Answer. Put your final answer within \\boxed{}."
)
LOSS = {
    "advantage": "mean_std",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 0.0,
    "reference_kl_coef": 0.001,
    "reference_kl": "k3_direct",
}
RUBRICS = RubricsConfig(
    refresh="evolving", grades="graded", polarity="signed", num_references=0, stage_caps=(5,)
)
ARMS = {
    "ropd": {"estimator": EstimatorConfig("ropd", **LOSS), "rubrics": RUBRICS},
    "ropd_stages": {
        "estimator": EstimatorConfig("ropd_stages", stage_credit="paper", **LOSS),
        "rubrics": replace(
            RUBRICS,
            stages=(
                "plan",
                "derivation=(?m)^## Derivation",
                "check=(?m)^## Check",
                "answer=(?m)^## Answer",
            ),
            stage_caps=(3, 2, 2, 3),
        ),
    },
}
MODEL = "Qwen/Qwen3-30B-A3B-Instruct-2507"


def get_sweep() -> list[SweepPoint]:
    ropd = config_beside(__file__, "../ropd_math.py")
    base = replace(
        ropd,
        data=replace(ropd.data, prompt_format=PROMPT, references=None),
        estimator=ARMS["ropd"]["estimator"],
        rubrics=RUBRICS,
        rubricator=JudgeConfig(MODEL, temperature=0.7),
        verifier=JudgeConfig(MODEL, temperature=0.0),
        teach=TeachConfig(),
        api=ApiConfig("http://127.0.0.1:8000/v1", concurrency=16),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="constant"),
        train=replace(ropd.train, num_steps=600),
        evaluation=replace(
            ropd.evaluation,
            source="contests.jsonl",
            columns=("benchmark=benchmark",),
            num_prompts=512,
        ),
    )
    return points(base, product(arms({"qwen3_4b_stages": {}}, "pair"), arms(ARMS), seeds(3)))
