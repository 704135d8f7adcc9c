"""Everything a run works with, read and checked before anything is computed."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opdjax.config import STUDENT, Config, DataConfig, ModelConfig
from opdjax.config.validation import ConfigError, require
from opdjax.data.chat import (
    TokenizerMismatchError,
    check_same_vocabulary,
    load_tokenizer,
    valid_vocab,
)
from opdjax.data.grading import require_grader
from opdjax.data.prompt_rows import first_of_each, read_prompts, require_field
from opdjax.data.prompts import PromptSet, encode_prompts, load_rows
from opdjax.data.sources import ColumnMap
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import Evaluator
from opdjax.engine.update import UpdateSpec, scored_temperature, spec_of
from opdjax.estimators import estimator_of
from opdjax.judge.prompts import template_versions
from opdjax.models.attention import CUDNN_MAX_HEAD_SIZE, SPLASH_HEAD_SIZES, Implementation
from opdjax.models.decoder import Params, head_of
from opdjax.models.hf import Checkpoint, CheckpointError, fingerprint, load_params, open_checkpoint
from opdjax.models.lora import combine, init_adapters
from opdjax.models.partitioning import constrain, require_divides
from opdjax.ops.sharding import make_mesh, num_row_shards
from opdjax.ops.tile import Head
from opdjax.rollouts.requirements import (
    _learner_devices,
    _require_reward_data,
    _require_room,
    require_rows_divide,
)
from opdjax.runs.workdir import environment


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The model that supervises: a frozen one, or the student itself with the weights of each step,
    which `with_current_teacher` fills in.
    """

    checkpoint: Checkpoint
    params: Params | None
    head: Head | None
    tokenizer: Any
    decoding: Decoding  # how it writes answers, where it does
    shares_vocabulary: bool  # with the student: only then can their logits be compared


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works with and never changes."""

    config: Config
    mesh: Mesh
    student: Checkpoint
    dtype: str  # of the student's forward pass
    tokenizer: Any
    teacher: Teacher | None  # None where the recipe never asks one
    prompts: PromptSet
    decoding: Decoding
    evaluator: Evaluator | None
    reference_policy: Teacher | None = (
        None  # the student as it starts, where there is a penalty on leaving it
    )


def prepare(config: Config) -> Setup:
    """Read and check everything a run needs, before anything is computed."""
    mesh = make_mesh(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, _learner_devices(config)
    )
    require_rows_divide(config, num_row_shards(mesh))
    student = _for_this_machine(open_student(config), config.student, "student")
    require_divides(student.config, mesh.shape, "the student")
    tokenizer = load_tokenizer(student.path)
    decoding = _decoding(config, student, tokenizer, config.sampling.stop_token_ids)
    asked = None
    if needs_teacher(config):
        asked = (
            student
            if config.teacher_is_student
            else open_checkpoint(config.teacher.path, config.teacher.revision)
        )
        asked = _for_this_machine(asked, config.teacher_model, "teacher")
        require_divides(asked.config, mesh.shape, "the teacher")
    teacher_tokenizer = tokenizer if asked is None else load_tokenizer(asked.path)
    shares_vocabulary = _shares_vocabulary(config, tokenizer, teacher_tokenizer)
    rows = load_rows(config.data, tokenizer)
    if config.sampling.completions_from == "references" and config.data.references is None:
        column = config.data.reference_column or "references"
        require_field(
            rows,
            "references",
            column,
            config.data.source,
            "training on the data's own answers needs them",
        )
    _require_reward_data(config, rows)
    prompts = encode_prompts(rows, config.data, tokenizer, teacher_tokenizer)
    _require_room(config, prompts)
    if asked is not None and config.teacher_is_student and prompts.teacher_ids is None:
        raise ConfigError(
            f"teacher.path is {STUDENT} and the teacher is shown what the student is: the same model on the same tokens has nothing to "
            "teach; show it more with data.teacher_prompt_format, such as '{prompt} (a correct solution: {reference})'"
        )
    evaluator = make_evaluator(config, student, tokenizer, mesh)
    # The weights come last: what is wrong with the data is said before gigabytes are read.
    teacher = (
        None
        if asked is None
        else _load_teacher(config, asked, teacher_tokenizer, shares_vocabulary, mesh)
    )
    reference = _load_reference(
        config, Teacher(student, None, None, tokenizer, decoding, shares_vocabulary=True), mesh
    )
    return Setup(
        config,
        mesh,
        student,
        compute_dtype(config.student),
        tokenizer,
        teacher,
        prompts,
        decoding,
        evaluator,
        reference,
    )


def open_student(config: Config) -> Checkpoint:
    """The student's checkpoint, its model set up for the run's adapters where it has any."""
    student = open_checkpoint(config.student.path, config.student.revision)
    return dataclasses.replace(
        student, config=dataclasses.replace(student.config, lora_scale=config.lora.scale)
    )


def _for_this_machine(checkpoint: Checkpoint, model: ModelConfig, role: str) -> Checkpoint:
    """The checkpoint, its model with the attention that the config asks for."""
    attention = attention_of(model, checkpoint.config.head_size, role)
    return dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, attention=attention)
    )


def attention_of(
    model: ModelConfig, head_size: int, role: str, backend: str | None = None
) -> Implementation:
    """The implementation of a model's attention on a backend (None: this machine's); ConfigError
    where what is asked for cannot run.
    """
    backend, asked = backend or jax.default_backend(), f"{role}.attention"
    if model.attention == "auto":
        return "splash" if backend == "tpu" and head_size in SPLASH_HEAD_SIZES else "xla"
    if model.attention == "splash":
        require(
            backend == "tpu",
            asked,
            "splash",
            f"auto or xla: splash attention needs a TPU, this is a {backend}",
        )
        require(
            head_size in SPLASH_HEAD_SIZES,
            asked,
            "splash",
            f"auto or xla: its heads are of {SPLASH_HEAD_SIZES}, {role}'s of {head_size}",
        )
    if model.attention == "cudnn":
        require(
            backend == "gpu",
            asked,
            "cudnn",
            f"auto or xla: cuDNN needs an NVIDIA GPU, this is a {backend}",
        )
        require(
            compute_dtype(model, backend) != "float32",
            asked,
            "cudnn",
            f"auto or xla: cuDNN computes in bfloat16, {role}.dtype is float32",
        )
        is_small = head_size <= CUDNN_MAX_HEAD_SIZE and head_size % 8 == 0
        require(
            is_small,
            asked,
            "cudnn",
            f"auto or xla: cuDNN's heads are of 8 to 128 in steps of 8, {role}'s of {head_size}",
        )
    return model.attention


def load_student(setup: Setup) -> tuple[Params, Params | None]:
    """What is trained, in float32, as it is before the first step, and what stays frozen beside it,
    in the type of the forward pass.

    With adapters these are what is trained; without, everything is and None stays frozen.
    """
    config, mesh, over = setup.config, setup.mesh, setup.config.student.split_over
    if not config.lora.rank:
        return load_params(setup.student, "float32", mesh, over), None
    adapters = jax.jit(
        lambda: constrain(init_adapters(setup.student.config, config.lora, config.seed), mesh, over)
    )()
    # Adapters start at 0: the student without them is the reference, and one copy serves both.
    return adapters, load_params(
        setup.student, setup.dtype, mesh, over
    ) if setup.reference_policy is None else setup.reference_policy.params


def published(setup: Setup, params: Params) -> Params:
    """A copy of what is trained, as rollouts are drawn with it: cast before it is sent."""
    copies = jax.tree.map(lambda x: jnp.array(x, setup.dtype, copy=True), params)
    return constrain(copies, setup.mesh, setup.config.sampling.split_over)


def initial_weights(setup: Setup) -> Params:
    """What rollouts are drawn with before the first update."""
    trained, frozen = load_student(setup)
    return combine(frozen, jax.jit(partial(published, setup))(trained))


def needs_teacher(config: Config) -> bool:
    """Whether the run asks a teacher for scores or for answers."""
    return reads_scores(config) or config.sampling.completions_from == "teacher"


def reads_scores(config: Config) -> bool:
    """Whether the teacher's numbers are compared with the student's, id by id."""
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
    # Ids that were added for the student's tokenizer mean nothing in another one.
    more = config.sampling.stop_token_ids if shares_vocabulary else ()
    decoding = _decoding(config, checkpoint, tokenizer, more)
    teacher = Teacher(checkpoint, None, None, tokenizer, decoding, shares_vocabulary)
    if config.teacher_is_student:
        return teacher
    return with_teacher_weights(
        teacher,
        load_params(checkpoint, compute_dtype(config.teacher), mesh, config.teacher.split_over),
        config,
    )


def _load_reference(config: Config, start: Teacher, mesh: Mesh) -> Teacher | None:
    """`start` with the weights of the student's checkpoint, as a forward pass reads them; None
    where nothing is compared with it.
    """
    if not config.estimator.reference_kl_coef:
        return None
    return with_teacher_weights(
        start,
        load_params(
            start.checkpoint, compute_dtype(config.student), mesh, config.student.split_over
        ),
        config,
    )


def with_teacher_weights(teacher: Teacher, params: Params, config: Config) -> Teacher:
    """The teacher with these weights, and their head as its scores are made with it."""
    head = head_of(
        params, valid_vocab=teacher.decoding.valid_vocab, temperature=scored_temperature(config)
    )
    return dataclasses.replace(teacher, params=params, head=head)


def with_current_teacher(setup: Setup, published: Params) -> Setup:
    """The setup whose teacher, where it is the student, has the weights `published` for a step;
    they are not copied.
    """
    if setup.teacher is None or not setup.config.teacher_is_student:
        return setup
    return dataclasses.replace(
        setup, teacher=with_teacher_weights(setup.teacher, published, setup.config)
    )


def update_spec(setup: Setup) -> UpdateSpec:
    """What the run's update is made of."""
    return spec_of(
        setup.config, setup.student.config, setup.dtype, setup.decoding.valid_vocab, setup.mesh
    )


def _decoding(
    config: Config, checkpoint: Checkpoint, tokenizer: Any, more: tuple[int, ...]
) -> Decoding:
    sampling, width = config.sampling, num_ids(checkpoint, tokenizer)
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
        sampling.min_p,
        valid_vocab=width,
        kv_dtype=sampling.kv_dtype,
    )


def make_evaluator(
    config: Config, student: Checkpoint, tokenizer: Any, mesh: Mesh | None
) -> Evaluator | None:
    """The evaluation of a config, on the prompts that it names; None where it names none."""
    if config.evaluation.source is None:
        return None
    require_grader(config.evaluation.grader)
    names = ("prompt_column", "answer_column")
    columns = {
        name: getattr(config.evaluation, name) or getattr(config.data, name) for name in names
    }
    data = dataclasses.replace(
        student_view(config.data),
        source=config.evaluation.source,
        reference_column=None,
        references=None,
        **columns,
    )
    rows = read_prompts(
        data.source,
        dataclasses.replace(
            ColumnMap.from_config(data), benchmark=config.evaluation.benchmark_column
        ),
    )
    rows = first_of_each(rows, config.evaluation.num_prompts)
    require_field(
        rows, "answer", data.answer_column or "answer", data.source, "evaluation needs them"
    )
    prompts = encode_prompts(rows, data, tokenizer, tokenizer)
    stop = stop_ids(student, tokenizer, config.sampling.stop_token_ids)
    return Evaluator(
        student.config,
        prompts,
        tokenizer,
        config.evaluation,
        stop,
        num_ids(student, tokenizer),
        mesh,
    )


def student_view(data: DataConfig) -> DataConfig:
    """The data as the student alone reads them: nothing of what its teacher is shown."""
    shown = {"teacher_format": None, "teacher_enable_thinking": None, "teacher_prompt_format": None}
    if data.format == "raw":
        shown |= {"system_prompt": None, "enable_thinking": None}  # they were the teacher's
    return dataclasses.replace(data, **shown)


def num_ids(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """How many ids the tokenizer has; CheckpointError where the embedding has no rows for them."""
    rows, width = checkpoint.config.vocab_size, valid_vocab(tokenizer)
    if rows < width:
        raise CheckpointError(
            f"the embedding of {checkpoint.path} has {rows} rows, its tokenizer {width} ids; expected the model's own tokenizer"
        )
    return width


def stop_ids(checkpoint: Checkpoint, tokenizer: Any, more: tuple[int, ...] = ()) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config and of the tokenizer (ValueError where there are
    none), and `more`.
    """
    ids = {*checkpoint.stop_token_ids} | ({tokenizer.eos_token_id} - {None})
    if not ids:
        raise ConfigError(
            f"{checkpoint.path} names no end-of-sequence id; set eos_token_id in its generation_config.json"
        )
    return tuple(sorted(ids | set(more)))


def compute_dtype(model: ModelConfig, backend: str | None = None) -> str:
    """The type of a model's forward pass on a backend; None: this machine's."""
    if model.dtype != "auto":
        return model.dtype
    return "float32" if (backend or jax.default_backend()) == "cpu" else "bfloat16"


def facts(setup: Setup) -> dict[str, Any]:
    """What identifies the run beside its config, and what bit-identical continuation depends on."""
    evaluation = setup.evaluator.prompts.digest if setup.evaluator else None
    data = {
        "prompts": setup.prompts.digest,
        "evaluation": evaluation,
        "num_prompts": len(setup.prompts),
        "num_skipped": setup.prompts.num_skipped,
        "student": fingerprint(setup.student),
        "teacher": _teacher_fingerprint(setup),
    }
    if setup.config.is_judged:
        data["judge_prompts"] = template_versions(setup.config.rubrics.templates)
    devices = [device.device_kind for device in setup.mesh.devices.flat]
    return {"data": data, "environment": environment(devices)}


def _teacher_fingerprint(setup: Setup) -> str | None:
    if setup.teacher is None or setup.config.teacher_is_student:
        return STUDENT if setup.teacher else None
    return fingerprint(setup.teacher.checkpoint)
