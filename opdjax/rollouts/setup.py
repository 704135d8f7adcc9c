"""Everything that a run works with, read and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import datetime
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opdjax.config import STUDENT, Config, DataConfig, SamplingConfig, TrainConfig
from opdjax.config.validation import ConfigError, require
from opdjax.data.chat import (
    TokenizerMismatchError,
    check_same_vocabulary,
    reads_clock,
    valid_vocab,
)
from opdjax.data.grading import require_grader, require_readable
from opdjax.data.prompt_rows import first_of_each, read_prompts, require_field
from opdjax.data.prompts import PromptSet, encode_prompts, load_rows
from opdjax.data.sources import ColumnMap
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import Evaluator
from opdjax.engine.update import UpdateSpec, scored_temperature, spec_of
from opdjax.estimators import estimator_of
from opdjax.judge.prompts import template_versions
from opdjax.models.attention import CUDNN_MAX_HEAD_SIZE, SPLASH_HEAD_SIZES, Implementation
from opdjax.models.decoder import Params, head_of
from opdjax.models.hf import Checkpoint, CheckpointError, fingerprint, load_params, open_checkpoint
from opdjax.models.lora import combine, init_adapters
from opdjax.models.partitioning import SAMPLER_AXES, constrain, require_divides
from opdjax.ops.sharding import make_mesh, num_row_shards
from opdjax.ops.tile import Head
from opdjax.rollouts.requirements import (
    learner_devices,
    require_given_answers,
    require_reward_data,
    require_room,
    require_rows_divide,
)
from opdjax.runs.workdir import environment


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The model that supervises: a frozen one, or the student, whose weights `with_current_teacher`
    fills in at each step.
    """

    checkpoint: Checkpoint
    params: Params | None
    head: Head | None
    tokenizer: Any
    decoding: Decoding  # how it writes answers, if the run asks it for answers
    shares_vocabulary: bool  # with the student; only then can their logits be compared


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works with; it does not change during the run."""

    config: Config
    mesh: Mesh
    student: Checkpoint
    dtype: str  # of the student's forward pass
    tokenizer: Any
    teacher: Teacher | None  # None if the recipe needs none
    prompts: PromptSet
    decoding: Decoding
    evaluator: Evaluator | None
    # The untrained student, if there is a penalty for leaving it.
    reference_policy: Teacher | None = None


def prepare(config: Config, today: str | None = None) -> Setup:
    """Read and check everything a run needs, before anything is computed.

    `today`, YYYY-MM-DD (None: by the clock), becomes `data.date` where that is None and a chat
    template reads the clock.
    """
    shape = config.mesh
    mesh = make_mesh(shape.data, shape.fsdp, shape.tensor, learner_devices(config))
    require_rows_divide(config, num_row_shards(mesh))
    student = _with_attention(open_student(config), config.train, "student")
    require_divides(student.config, mesh.shape, "the student")
    tokenizer = load_tokenizer(student.path)
    decoding = _decoding(config.sampling, student, tokenizer, config.sampling.stop_token_ids)
    checkpoint, teacher_tokenizer = None, tokenizer
    if needs_teacher(config):
        checkpoint = student
        if not config.teacher_is_student:
            checkpoint = open_checkpoint(*config.teacher.place)
        checkpoint = _with_attention(checkpoint, config.train, "teacher")
        require_divides(checkpoint.config, mesh.shape, "the teacher")
        teacher_tokenizer = load_tokenizer(checkpoint.path)
    shares_vocabulary = _shares_vocabulary(config, tokenizer, teacher_tokenizer)
    data = dated(config.data, tokenizer, teacher_tokenizer, today)
    config = dataclasses.replace(config, data=data)
    rows = load_rows(config.data, tokenizer)
    require_given_answers(config, rows)
    require_reward_data(config, rows)
    prompts = encode_prompts(rows, config.data, tokenizer, teacher_tokenizer)
    require_room(config, prompts)
    if checkpoint is not None and config.teacher_is_student and prompts.teacher_ids is None:
        raise ConfigError(
            f"teacher.path is {STUDENT}, and the teacher reads the same prompts as the student: "
            "the same model on the same tokens has nothing to teach; show it more with "
            "data.teacher_prompt_format, such as '{prompt} (a correct solution: {reference})'"
        )
    evaluator = make_evaluator(config, student, tokenizer, mesh)
    # Weights are loaded last, so that errors in the data appear before gigabytes are read.
    teacher = None
    if checkpoint is not None:
        teacher = _load_teacher(config, checkpoint, teacher_tokenizer, shares_vocabulary, mesh)
    start = Teacher(student, None, None, tokenizer, decoding, shares_vocabulary=True)
    return Setup(
        config,
        mesh,
        student,
        compute_dtype(config.train.dtype),
        tokenizer,
        teacher,
        prompts,
        decoding,
        evaluator,
        _load_reference_policy(config, start, mesh),
    )


def dated(data: DataConfig, student: Any, teacher: Any, today: str | None = None) -> DataConfig:
    """The data section with a date if one of these tokenizers' templates reads the clock."""
    formats = (data.student_template[0], data.teacher_template[0])
    read = [reads_clock(t) for t, f in zip((student, teacher), formats) if f == "chat"]
    if data.date is not None or not any(read):
        return data
    return dataclasses.replace(data, date=today or datetime.date.today().isoformat())


def open_student(config: Config) -> Checkpoint:
    """The student's checkpoint, with the scale of the run's adapters in its model config."""
    student = open_checkpoint(*config.student.place)
    model = dataclasses.replace(student.config, lora_scale=config.lora.scale)
    return dataclasses.replace(student, config=model)


def _with_attention(checkpoint: Checkpoint, train: TrainConfig, role: str) -> Checkpoint:
    attention = attention_of(train, checkpoint.config.head_size, role)
    config = dataclasses.replace(checkpoint.config, attention=attention)
    return dataclasses.replace(checkpoint, config=config)


def attention_of(
    train: TrainConfig, head_size: int, role: str, backend: str | None = None
) -> Implementation:
    """The attention implementation of a model on a backend (None: this machine's); ConfigError if
    the requested one cannot run.
    """
    backend, name = backend or jax.default_backend(), train.attention
    if name == "auto":
        return "splash" if backend == "tpu" and head_size in SPLASH_HEAD_SIZES else "xla"

    def check(is_met: bool, reason: str) -> None:
        require(is_met, "train.attention", name, f"auto or xla: {reason}")

    if name == "splash":
        check(backend == "tpu", f"splash attention needs a TPU, this is a {backend}")
        reason = f"splash needs heads of {SPLASH_HEAD_SIZES}, {role}'s are of {head_size}"
        check(head_size in SPLASH_HEAD_SIZES, reason)
    if name == "cudnn":
        check(backend == "gpu", f"cuDNN needs an NVIDIA GPU, this is a {backend}")
        reason = "cuDNN computes in bfloat16, train.dtype is float32"
        check(compute_dtype(train.dtype, backend) != "float32", reason)
        is_small = head_size <= CUDNN_MAX_HEAD_SIZE and head_size % 8 == 0
        check(is_small, f"cuDNN needs heads of 8 to 128 in steps of 8, {role}'s are of {head_size}")
    return name


def load_student(setup: Setup) -> tuple[Params, Params | None]:
    """(parameters to train, frozen parameters) before the first step.

    Without adapters: all parameters in float32, and None. With adapters: the adapters in float32,
    and the student's own parameters in the dtype of the forward pass.
    """
    config, mesh = setup.config, setup.mesh
    if not config.lora.rank:
        return load_params(setup.student, "float32", mesh), None
    adapters = jax.jit(
        lambda: constrain(init_adapters(setup.student.config, config.lora, config.seed), mesh)
    )()
    # Adapters start at 0, so the student without them is the reference policy: one copy is enough.
    if setup.reference_policy is not None:
        return adapters, setup.reference_policy.params
    return adapters, load_params(setup.student, setup.dtype, mesh)


def sampling_copy(setup: Setup, params: Params) -> Params:
    """A copy of the trained parameters for sampling, cast before it is sent to other devices."""
    copies = jax.tree.map(lambda x: jnp.array(x, setup.dtype, copy=True), params)
    return constrain(copies, setup.mesh, SAMPLER_AXES)


def initial_weights(setup: Setup) -> Params:
    """The weights that sample before the first update."""
    trained, frozen = load_student(setup)
    return combine(frozen, jax.jit(partial(sampling_copy, setup))(trained))


def needs_teacher(config: Config) -> bool:
    """Whether the run reads scores or answers of a teacher."""
    return reads_scores(config) or config.sampling.completions_from == "teacher"


def reads_scores(config: Config) -> bool:
    """Whether the teacher's log-probs are compared with the student's, id by id."""
    return estimator_of(config.estimator).teacher != "none" or config.near_policy.filter != "none"


def _shares_vocabulary(config: Config, student: Any, teacher: Any) -> bool:
    try:
        check_same_vocabulary(student, teacher, config.estimator.recipe)
    except TokenizerMismatchError:
        if reads_scores(config):
            raise
        return False
    return True


def _load_teacher(
    config: Config, checkpoint: Checkpoint, tokenizer: Any, shares_vocabulary: bool, mesh: Mesh
) -> Teacher:
    # Stop ids that were added for the student's tokenizer have no meaning in another one.
    more = config.sampling.stop_token_ids if shares_vocabulary else ()
    decoding = _decoding(config.sampling, checkpoint, tokenizer, more)
    teacher = Teacher(checkpoint, None, None, tokenizer, decoding, shares_vocabulary)
    if config.teacher_is_student:
        return teacher
    params = load_params(checkpoint, compute_dtype(config.train.dtype), mesh)
    return with_teacher_weights(teacher, params, config)


def _load_reference_policy(config: Config, start: Teacher, mesh: Mesh) -> Teacher | None:
    """`start` with the weights of the student's checkpoint; None if there is no penalty."""
    if not config.estimator.reference_kl_coef:
        return None
    params = load_params(start.checkpoint, compute_dtype(config.train.dtype), mesh)
    return with_teacher_weights(start, params, config)


def with_teacher_weights(teacher: Teacher, params: Params, config: Config) -> Teacher:
    """The teacher with these weights, and with their head at the temperature of scoring."""
    temperature, width = scored_temperature(config), teacher.decoding.valid_vocab
    head = head_of(params, valid_vocab=width, temperature=temperature)
    return dataclasses.replace(teacher, params=params, head=head)


def with_current_teacher(setup: Setup, params: Params) -> Setup:
    """If the student is its own teacher, the setup whose teacher has these weights (not copied);
    else the setup unchanged.
    """
    if setup.teacher is None or not setup.config.teacher_is_student:
        return setup
    teacher = with_teacher_weights(setup.teacher, params, setup.config)
    return dataclasses.replace(setup, teacher=teacher)


def update_spec(setup: Setup) -> UpdateSpec:
    """The static arguments of the run's update."""
    return spec_of(
        setup.config, setup.student.config, setup.dtype, setup.decoding.valid_vocab, setup.mesh
    )


def _decoding(
    sampling: SamplingConfig, checkpoint: Checkpoint, tokenizer: Any, more: tuple[int, ...]
) -> Decoding:
    width = num_ids(checkpoint, tokenizer)
    beyond = [token for token in more if not 0 <= token < width]
    if beyond:
        raise ConfigError(
            f"sampling.stop_token_ids has {beyond}; expected ids from 0 to {width - 1}"
        )
    return Decoding(
        sampling.max_completion_length,
        stop_ids(checkpoint, tokenizer, more),
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        valid_vocab=width,
        kv_dtype=sampling.kv_dtype,
    )


def make_evaluator(
    config: Config, student: Checkpoint, tokenizer: Any, mesh: Mesh | None
) -> Evaluator | None:
    """The evaluator of a config with its prompts; None if the config has no evaluation."""
    evaluation = dataclasses.replace(config.evaluation, grader=config.grader)
    if evaluation.source is None:
        return None
    require_grader(evaluation.grader)
    view = student_view(config.data)
    data = dataclasses.replace(view, source=evaluation.source, columns=(), references=None)
    names = config.data.column_names | evaluation.column_names
    names.pop("reference", None)
    rows = first_of_each(read_prompts(data.source, ColumnMap(**names)), evaluation.num_prompts)
    require_field(rows, "answer", names, data.source, "evaluation needs them")
    require_readable(evaluation.grader, [row.answer for row in rows], evaluation.source)
    prompts = encode_prompts(rows, data, tokenizer, tokenizer)
    stop = stop_ids(student, tokenizer, config.sampling.stop_token_ids)
    width = num_ids(student, tokenizer)
    slots = config.sampling.slots
    return Evaluator(student.config, prompts, tokenizer, evaluation, stop, width, mesh, slots)


def student_view(data: DataConfig) -> DataConfig:
    """The data section without what only the teacher is shown."""
    shown = {"teacher_format": None, "teacher_prompt_format": None}
    if data.format == "raw":  # only the teacher reads it then
        shown |= {"system_prompt": None}
    return dataclasses.replace(data, **shown)


def teacher_view(data: DataConfig) -> DataConfig:
    """The data section of a run whose student is shown the same text, in the teacher's template."""
    format = data.teacher_format or data.format
    system = None if format == "raw" else data.system_prompt
    own = {"format": format, "system_prompt": system}
    return dataclasses.replace(data, teacher_format=None, teacher_prompt_format=None, **own)


def num_ids(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """Number of ids of the tokenizer; CheckpointError if the embedding has fewer rows."""
    rows, width = checkpoint.config.vocab_size, valid_vocab(tokenizer)
    if rows < width:
        raise CheckpointError(
            f"the embedding of {checkpoint.path} has {rows} rows, its tokenizer {width} ids; "
            "expected the model's own tokenizer"
        )
    return width


def stop_ids(checkpoint: Checkpoint, tokenizer: Any, more: tuple[int, ...] = ()) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config and of the tokenizer, and `more`; ConfigError if
    the former two name none.
    """
    ids = {*checkpoint.stop_token_ids} | ({tokenizer.eos_token_id} - {None})
    if not ids:
        raise ConfigError(
            f"{checkpoint.path} names no end-of-sequence id; set eos_token_id in its "
            "generation_config.json"
        )
    return tuple(sorted(ids | set(more)))


def compute_dtype(dtype: str, backend: str | None = None) -> str:
    """The dtype of a forward pass, `train.dtype`, on a backend (None: this machine's)."""
    if dtype != "auto":
        return dtype
    return "float32" if (backend or jax.default_backend()) == "cpu" else "bfloat16"


def facts(setup: Setup) -> dict[str, Any]:
    """What identifies the run besides its config, and what bit-identical continuation needs."""
    teacher = setup.teacher and (
        STUDENT if setup.config.teacher_is_student else fingerprint(setup.teacher.checkpoint)
    )
    data = {
        "prompts": setup.prompts.digest,
        "evaluation": setup.evaluator.prompts.digest if setup.evaluator else None,
        "num_prompts": len(setup.prompts),
        "num_skipped": setup.prompts.num_skipped,
        "student": fingerprint(setup.student),
        "teacher": teacher,
    }
    if setup.config.is_judged:
        data["judge_prompts"] = template_versions(setup.config.rubrics.templates)
    devices = [device.device_kind for device in setup.mesh.devices.flat]
    return {"data": data, "environment": environment(devices)}
