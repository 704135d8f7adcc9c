"""NPD at the scale of its controlled experiment: Qwen2.5-Math-1.5B from Qwen2.5-Math-7B-Instruct.

Paper: "Near-Policy: Accelerating On-Policy Distillation via Asynchronous Generation and Selective
Packing", arXiv 2605.05940. The student answers 50 thousand prompts of MetaMathQA before the first
of ten epochs and again before the sixth. An answer is kept if 0 <= IFD_teacher - IFD_student <=
0.8; rows are packed. The loss is 0.9 of the forward KL on the teacher's top 10 ids and 0.1 of
cross-entropy on the kept answers; one teacher pass stores what both need. Learning rate 1e-5 with a
cosine, clip 1.

    opdjax train experiments/npd_math.py --workdir runs/npd_math

Data: MetaMathQA and MATH-500, from the hub (`pip install 'opdjax[data,eval]'`), without a format
of their own: the models' chat template asks for a box. `--data.source
preset:metamathqa:plain=FILE --evaluation.source suite:math500:plain=FILE` name copies. To sample
and annotate on separate machines, train with `--near-policy.generator process` and run `opdjax
sample --store runs/npd_math` there. `--near-policy.filter none` keeps all answers. The paper varies
--near-policy.ifd-max, --estimator.kd-weight, --estimator.support-top-k,
--near-policy.refresh-epochs and --train.pack-length.

Hardware: not stated for this pair; the paper's main run takes 366 hours on one Ascend NPU, 300 of
them for generation. By `opdjax plan --topology a100-1` it fits an A100 of 80 GB. Expected score
from the paper, MATH-500: 76.6 from 62.0 (teacher: 80.0), GSM8K: 82.9 from 77.3 (teacher: 89.3). Not
run here yet. Deviations: the cosine ends at 0, the paper's at 1e-6; rows have 4,096 tokens, the
model's context and fast with any attention, the paper's 32,768. The paper does not state batch
size, temperature and answer length; those here are ours, as are IFD as a ratio of mean negative
log-likelihoods and a KL that is not renormalised on the top k. Its student is first fine-tuned on
answers: pass such a student as --student.path.
"""

from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    NearPolicyConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        student=ModelConfig("Qwen/Qwen2.5-Math-1.5B"),
        teacher=ModelConfig("Qwen/Qwen2.5-Math-7B-Instruct"),
        data=DataConfig(
            "preset:metamathqa:plain=hf:meta-math/MetaMathQA#train[:50000]", max_prompt_length=1024
        ),
        sampling=SamplingConfig(
            num_generations=1,
            max_completion_length=2048,
            stop_token_ids=(151645,),  # <|im_end|>: the base model's files name <|endoftext|> alone
            slots=32,
        ),
        near_policy=NearPolicyConfig(
            "refresh", num_epochs=10, refresh_epochs=(5,), filter="ifd", ifd_min=0.0, ifd_max=0.8
        ),
        estimator=EstimatorConfig("npd", kd_weight=0.9, support_top_k=10),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", max_grad_norm=1.0),
        train=TrainConfig(
            num_steps=3900,
            prompts_per_step=128,
            gradient_accumulation_steps=32,
            remat="layer",
            pack_length=4096,
        ),
        evaluation=EvaluationConfig(
            source="suite:math500:plain",
            grader="boxed",
            num_prompts=500,
            num_samples=8,
            temperatures=(0.6,),
            max_completion_length=2048,
        ),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(samples_every=100),
        seed=42,
    )
