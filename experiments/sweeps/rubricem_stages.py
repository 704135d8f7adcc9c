"""RubricEM's stage credit as far as it needs no tools: a score for each stage of a worked solution,
beside one score for all of it.

    opdjax sweep experiments/sweeps/rubricem_stages.py --workdir runs/rubricem_stages
    opdjax table runs/rubricem_stages --paper rubricem_stages

Paper: "RubricEM: Meta-RL with Rubric-guided Policy Decomposition beyond Verifiable Rewards", arXiv
2605.10899. Its student is a research agent, Qwen3-8B with search tools, whose stages are plan,
research, review and answer; here Qwen3-4B, without thinking, writes the plan, the derivation, a
check and the answer of a contest problem under headings that the prompt asks for. No tools, no
bank, no meta-policy, no fine-tuning on structured answers first. Judge: Qwen3-30B-A3B-Instruct-2507
behind vLLM at port 8000, the paper's is Gemini-3-Flash. Data and evaluation: dapo17k.jsonl and
contests.jsonl as in ropd_black_box.py; no references. Settings of the paper's section F: 32 prompts
x 8 rollouts, lr 5e-7 constant, KL to the start 0.001 (k3), population standard deviation, clip 0.2,
600 steps as in its ablations; rubrics that evolve, graded 0, 1, 2, flaws too, at most 3, 2, 2, 3
criteria a stage, of the answer alone 5, as in the code base that the paper builds on [T].

Hardware: the paper's ablations take two nodes of eight [P], hours not told. Here 6 runs of 600
steps; by ROPD's 6.6 minutes a step of this student on eight A100, 66 hours a run [D]. Never run
here. The paper's numbers: a figure whose bars were not recovered; answer-only < stage-structured on
each of its benchmarks [P]. Deviations: models, data, stages and judge, as said; criteria weigh 1 to
5, the paper's 1 to 3.
"""

from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EndpointConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, arms, points, product, seeds

PROMPT = (
    "{prompt}\n\nAnswer in four parts under these headings, each on a line of its own: ## Plan, ## Derivation, ## Check, ## Answer. "
    "Put your final answer within \\boxed{}."
)
LOSS = {
    "advantage": "mean_std",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 0.0,
    "reference_kl_coef": 0.001,
    "reference_kl": "k3_direct",
}
KEPT = {"refresh": "evolving", "grades": "graded", "polarity": "signed", "num_references": 0}
NAMES = ("plan", "derivation", "check", "answer")
MARKERS = ("(?m)^## Derivation", "(?m)^## Check", "(?m)^## Answer")
ARMS = {
    "ropd": {
        "estimator": EstimatorConfig("ropd", **LOSS),
        "rubrics": RubricsConfig(stage_caps=(5,), **KEPT),
    },
    "ropd_stages": {
        "estimator": EstimatorConfig("ropd_stages", stage_credit="paper", **LOSS),
        "rubrics": RubricsConfig(
            stage_names=NAMES, stage_markers=MARKERS, stage_caps=(3, 2, 2, 3), **KEPT
        ),
    },
}


def judge(**fields) -> EndpointConfig:
    """A role of the local model."""
    return EndpointConfig(
        "http://127.0.0.1:8000/v1", "Qwen/Qwen3-30B-A3B-Instruct-2507", concurrency=16, **fields
    )


def get_sweep() -> list[SweepPoint]:
    base = Config(
        student=ModelConfig("Qwen/Qwen3-4B"),
        data=DataConfig(
            source="dapo17k.jsonl",
            prompt_format=PROMPT,
            enable_thinking=False,
            max_prompt_length=2048,
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=8192),
        estimator=ARMS["ropd"]["estimator"],
        rubricator=judge(temperature=0.7, seed=0),
        verifier=judge(temperature=0.0, max_tokens=4096),
        optimizer=OptimizerConfig(learning_rate=5e-7, schedule="constant"),
        train=TrainConfig(
            num_steps=600, prompts_per_step=32, gradient_accumulation_steps=32, remat="layer"
        ),
        evaluation=EvaluationConfig(
            source="contests.jsonl",
            benchmark_column="benchmark",
            grader="boxed",
            num_samples=16,
            temperature=1.0,
            top_p=0.95,
            max_completion_length=8192,
            batch_size=64,
        ),
        checkpoint=CheckpointConfig(every=50),
        log=LogConfig(samples_every=50),
    )
    return points(base, product(arms({"qwen3_4b_stages": {}}, "pair"), arms(ARMS), seeds(3)))
