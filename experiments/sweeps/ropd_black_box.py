"""The ROPD paper's tables with a black-box teacher: table 1 in both modes, table 3 with another
student, and the ablations of table 6.

    python scripts/join_benchmarks.py contests.jsonl \
        AIME24=hf:HuggingFaceH4/aime_2024#train,problem,answer \
        AIME25=hf:MathArena/aime_2025#train,problem,answer \
        "HMMT25 Feb=hf:MathArena/hmmt_feb_2025#train,problem,answer" \
        "HMMT25 Nov=hf:MathArena/hmmt_nov_2025#train,problem,answer"
    python scripts/join_benchmarks.py gpqa.jsonl \
        GPQA-Diamond=hf:fingertap/GPQA-Diamond#test,question,answer
    export OPENAI_API_KEY=...
    opdjax sweep experiments/sweeps/ropd_black_box.py --workdir runs/ropd_black_box --shard 1/8
    opdjax table runs/ropd_black_box --paper ropd_table1
        # also ropd_table1_thinking, ropd_table3, ropd_table6

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396. Models: Qwen3-4B, without and with
thinking, from GPT-5.2-chat-latest as teacher, rubricator and verifier. Table 3 has Gemma3-4B-it,
which is not a supported family; Qwen3-1.7B replaces it. Data: DAPO-Math-17K (dapo17k.jsonl), 531
steps; for GPQA-Diamond RaR-Science-20k (rar_science.jsonl), 625 steps; rows have `prompt`. The
teacher answers each prompt four times before the first point that reads the answers. HealthBench
and IFEval have no grader here. Settings of the paper's table A2: 32 prompts x 8 rollouts, AdamW at
1e-6 with a cosine after 100 steps of warm-up, b2 0.95, weight decay 0.1, clip 1, answers of up to
8,192 tokens at temperature 1, four references, 4 to 12 criteria. The loss is the released one
(rewards minus their mean, token mean, clip 0.2 / 0.28, dual clip 3, no KL). Evaluation: 16 samples
at T = 1 and top-p 0.95, up to 32,768 tokens.

Hardware: eight A100 of 80 GB; the paper's figures give about 6.6 minutes per step, 58 hours for 531
steps [D]. Here 48 runs, 36 of which learn from judges, so some 2,200 hours of such a machine; a run
makes some 34 thousand judge calls [D] of up to 98 thousand tokens each. Never run here; before a
run, set prices and a cap (ApiConfig.prices and max_dollars) in a copy of this file. The paper's
numbers, AIME24 and AIME25 [P]: non-thinking from 24.17 and 20.83, T-Judge 62.50 and 56.64, ROPD
65.02 and 58.75; thinking from 70.42 and 59.58, T-Judge 72.50 and 65.48, ROPD 75.41 and 68.75;
GPQA-Diamond 36.50 and 55.05; on AIME24 one reference 47.08, a rubric per rollout 61.25, not blind
61.75; Gemma3-4B-it 10.00 from 6.67. Deviations: one update of 256 rollouts a step, the release
makes four of 64; no importance weight between sampler and trainer, which use the same kernels here;
references at temperature 1, because four at temperature 0 would be identical; the last checkpoint
is scored, the paper's is the best on validation; judges think with high effort, as released, so the
paper's temperatures are not sent; `ropd_sft` learns at 1e-5. Ours, where the sources differ or are
silent: that rate, the temperature of the references (0 in the paper), 531 steps (paper; the release
has 500), and the clip of the release.
"""

from dataclasses import replace

from opdjax.config import (
    ROPD_CODE,
    EstimatorConfig,
    JudgeConfig,
    ModelConfig,
    OptimizerConfig,
    RubricsConfig,
)
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds

ROPD = config_beside(__file__, "../ropd_math.py")


def judged(estimator: EstimatorConfig = ROPD_CODE, **rubrics) -> dict:
    """An arm that learns from the judge."""
    return {
        "estimator": estimator,
        "rubrics": RubricsConfig(**rubrics),
        "rubricator": ROPD.rubricator,
        "verifier": ROPD.verifier,
    }


T_JUDGE = EstimatorConfig("tjudge", advantage="mean", clip_low=0.2, clip_high=0.28, dual_clip=3.0)
COMPARED = {
    "ropd": judged(),
    "ropd_tjudge": judged(T_JUDGE),
    "ropd_sft": {
        "estimator": EstimatorConfig("sft"),
        "sampling.completions_from": "references",
        "optimizer.learning_rate": 1e-5,
    },
}
ABLATIONS = {
    "ropd_one_reference": judged(num_references=1),
    "ropd_per_student": judged(rubric_of="student"),
    "ropd_not_blind": judged(blind=False),
}
SCIENCE = {
    "data.source": "rar_science.jsonl",
    "data.references": "references/gpt_rar_science.jsonl",
    "data.prompt_format": "{prompt}",
    "evaluation.source": "gpqa.jsonl",
    "train.num_steps": 625,
}
THINKING = {"data.format": "thinking"}
PAIRS = {
    "qwen3_4b_gpt": {},
    "qwen3_4b_gpt_science": SCIENCE,
    "qwen3_4b_gpt_thinking": THINKING,
    "qwen3_4b_gpt_thinking_science": THINKING | SCIENCE,
}
SMALLER = {"qwen3_1_7b_gpt": {"student": ModelConfig("Qwen/Qwen3-1.7B")}}


def get_sweep() -> list[SweepPoint]:
    base = replace(
        ROPD,
        data=replace(ROPD.data, references="references/gpt_dapo17k.jsonl"),
        sampling=replace(ROPD.sampling, slots=32),  # evaluations have 32,768 tokens
        estimator=EstimatorConfig(),
        rubricator=JudgeConfig(),
        verifier=JudgeConfig(),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, schedule="cosine", warmup_steps=100, b2=0.95, weight_decay=0.1
        ),
        evaluation=replace(
            ROPD.evaluation,
            source="contests.jsonl",
            columns=("benchmark=benchmark",),
            num_prompts=512,
            max_completion_length=32768,
        ),
    )
    compared = product(arms(PAIRS, "pair"), arms(COMPARED), seeds(3))
    ablations = product(arms({"qwen3_4b_gpt": {}}, "pair"), arms(ABLATIONS), seeds(3))
    smaller = product(arms(SMALLER, "pair"), arms({"ropd": judged()}), seeds(3))
    return points(base, chain(compared, ablations, smaller))
