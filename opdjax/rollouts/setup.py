"""Everything that a run works with, read and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from opdjax.config import STUDENT, Config, DataConfig, FrozenWeights, TrainConfig
from opdjax.config.validation import ConfigError, MissingExtraError, require
from opdjax.data.chat import TokenizerMismatchError, check_same_vocabulary, valid_vocab
from opdjax.data.grading import require_grader, require_readable
from opdjax.data.prompt_rows import Prompt, first_of_each, read_prompts, require_field
from opdjax.data.prompts import PromptSet, dated, encode_prompts, load_rows
from opdjax.data.sources import ColumnMap
from opdjax.data.stop_strings import find_stop_strings
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.decoding import Decoding
from opdjax.engine.divergence import DivergenceEvaluator, make_divergence_evaluator
from opdjax.engine.evaluate import Evaluator
from opdjax.engine.scheduling import require_slots
from opdjax.engine.update import TrainState, UpdateSpec, scored_temperature, spec_of
from opdjax.estimators import estimator_of
from opdjax.estimators.advantage import credit_matrix
from opdjax.judge.prompts import template_versions
from opdjax.models.attention import CUDNN_MAX_HEAD_SIZE, SPLASH_HEAD_SIZES, Implementation
from opdjax.models.decoder import Params, head_of
from opdjax.models.hf import Checkpoint, CheckpointError, fingerprint, load_params, open_checkpoint
from opdjax.models.lora import with_adapters
from opdjax.models.partitioning import require_divides
from opdjax.ops.multihost import on_process_zero
from opdjax.ops.sharding import make_mesh, num_row_shards
from opdjax.ops.tile import Head
from opdjax.rollouts.start import copy_logs, state_of_start, with_start_step
from opdjax.runs.workdir import environment


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The model that supervises; if it is the student, `with_current_teacher` gives the weights."""

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
    divergence: DivergenceEvaluator | None = None


def prepare(config: Config, today: str | None = None) -> Setup:
    """Read and check everything a run needs, before anything is computed. The config of the setup
    has train.num_steps instead of train.num_epochs.

    `today`, YYYY-MM-DD (None: by the clock), becomes `data.date` where that is None and a chat
    template reads the clock.
    """
    shape = config.mesh
    mesh = make_mesh(shape.data, shape.fsdp, shape.tensor, learner_devices(config))
    require_rows_divide(config, num_row_shards(mesh))
    student = _with_attention(open_student(config), config.train, "student")
    config = with_start_step(config, student)
    require_divides(student.config, mesh.shape, "the student")
    tokenizer = load_tokenizer(student.path)
    sampling = config.sampling
    names = ("max_completion_length", "temperature", "top_k", "top_p", "kv_dtype")
    own = {name: getattr(sampling, name) for name in names}
    decoding = decoding_of(student, tokenizer, sampling.stop_token_ids, **own)
    checkpoint, teacher_tokenizer = None, tokenizer
    if needs_teacher(config):
        checkpoint = student
        if not config.teacher_is_student:
            checkpoint = open_teacher(config)
        checkpoint = _with_attention(checkpoint, config.train, "teacher")
        require_divides(checkpoint.config, mesh.shape, "the teacher")
        teacher_tokenizer = load_tokenizer(checkpoint.path)
    shares_vocabulary = True
    try:
        check_same_vocabulary(tokenizer, teacher_tokenizer, config.estimator.recipe)
    except TokenizerMismatchError:
        if reads_scores(config):
            raise
        shares_vocabulary = False
    data = dated(config.data, tokenizer, teacher_tokenizer, today)
    config = dataclasses.replace(config, data=data)
    rows = load_rows(config.data, tokenizer, decoding.stop_token_ids, student.stop_strings)
    require_reward_data(config, rows)
    prompts = encode_prompts(rows, config.data, tokenizer, teacher_tokenizer)
    config = config.with_steps_over(len(prompts))
    train = config.train
    if train.first_step:
        expected = f"at least {train.first_step}, the step of {train.start[0]} that it starts from"
        is_reached = train.first_step <= train.num_steps
        require(is_reached, "train.num_steps", train.num_steps, expected)
    require_room(config, prompts)
    if checkpoint is not None and config.teacher_is_student and prompts.teacher_ids is None:
        raise ConfigError(
            f"teacher.path is {STUDENT}, and the teacher reads the same prompts as the student: "
            "the same model on the same tokens has nothing to teach; show it more with "
            "data.teacher_prompt_format, such as '{prompt} (a correct solution: {reference})'"
        )
    evaluator = make_evaluator(config, student, tokenizer, mesh)
    # Weights are loaded last, so that errors in the data appear before gigabytes are read.
    dtype, teacher, reference = compute_dtype(config.train.dtype), None, None

    def load(model: Teacher, weights: FrozenWeights) -> Teacher:
        params = load_params(model.checkpoint, dtype, mesh, weights=weights)
        return with_teacher_weights(model, params, config)

    if checkpoint is not None:
        # Stop ids that were added for the student's tokenizer have no meaning in another one.
        more = sampling.stop_token_ids if shares_vocabulary else ()
        how = decoding_of(checkpoint, teacher_tokenizer, more, **own)
        teacher = Teacher(checkpoint, None, None, teacher_tokenizer, how, shares_vocabulary)
        teacher = (
            teacher if config.teacher_is_student else load(teacher, config.train.frozen_weights)
        )
    if config.estimator.reference_kl_coef:
        start = Teacher(student, None, None, tokenizer, decoding, shares_vocabulary=True)
        reference = load(start, config.base_weights)
    divergence = None
    if config.evaluation.measures:
        models = student.config, teacher.checkpoint.config, teacher.params
        tokenizers, how = (tokenizer, teacher_tokenizer), (decoding, teacher.decoding)
        divergence = make_divergence_evaluator(config, models, tokenizers, how, mesh)
    models = student, dtype, tokenizer, teacher
    return Setup(config, mesh, *models, prompts, decoding, evaluator, reference, divergence)


def as_recorded(config: Config, setup: Setup) -> Config:
    """The config that a work directory records: with the first step and the day of the setup."""
    given = {name: getattr(config.train, name) for name in ("num_steps", "num_epochs")}
    train = dataclasses.replace(setup.config.train, **given)
    data = dataclasses.replace(config.data, date=setup.config.data.date)
    return dataclasses.replace(config, train=train, data=data)


def open_student(config: Config) -> Checkpoint:
    """The student's checkpoint, with the scale of the run's adapters and its stop strings."""
    student = with_adapters(open_checkpoint(*config.student.place), config.lora)
    return _with_stop_strings(student, config)


def open_teacher(config: Config) -> Checkpoint:
    """The checkpoint `teacher.path`, with the run's stop strings."""
    return _with_stop_strings(open_checkpoint(*config.teacher.place), config)


def _with_stop_strings(checkpoint: Checkpoint, config: Config) -> Checkpoint:
    texts = dict.fromkeys((*checkpoint.stop_strings, *config.sampling.stop_strings))
    return dataclasses.replace(checkpoint, stop_strings=tuple(texts))


def _with_attention(checkpoint: Checkpoint, train: TrainConfig, role: str) -> Checkpoint:
    attention = attention_of(train, checkpoint.config.head_size, role)
    config = dataclasses.replace(checkpoint.config, attention=attention)
    return dataclasses.replace(checkpoint, config=config)


def attention_of(
    train: TrainConfig, head_size: int, role: str, backend: str | None = None
) -> Implementation:
    """A model's attention on a backend (None: this one's); ConfigError if it cannot run there."""
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


def take_over(setup: Setup, workdir: pathlib.Path, own: TrainState) -> TrainState:
    """The state in which a run goes on from another one, with its own weights if it takes only the
    optimizer; else the logs are taken over too.
    """
    config = setup.config
    taken = state_of_start(config, setup.student, setup.mesh)
    if config.train.start_with == "optimizer":
        return taken.replace(params=own.params)
    on_process_zero(lambda: copy_logs(config, workdir))
    return taken


def needs_teacher(config: Config) -> bool:
    """Whether the run reads scores or answers of a teacher."""
    return reads_scores(config) or config.sampling.completions_from == "teacher"


def reads_scores(config: Config) -> bool:
    """Whether the teacher's log-probs are compared with the student's, id by id."""
    is_filtered = config.near_policy.filter != "none"
    reads = estimator_of(config.estimator).teacher != "none"
    return reads or is_filtered or config.evaluation.measures


def with_teacher_weights(teacher: Teacher, params: Params, config: Config) -> Teacher:
    """The teacher with these weights, and with their head at the temperature of scoring."""
    temperature, width = scored_temperature(config), teacher.decoding.valid_vocab
    head = head_of(params, valid_vocab=width, temperature=temperature)
    return dataclasses.replace(teacher, params=params, head=head)


def with_current_teacher(setup: Setup, params: Params) -> Setup:
    """If the student is its own teacher, the setup whose teacher has these weights, not copied."""
    if setup.teacher is None or not setup.config.teacher_is_student:
        return setup
    teacher = with_teacher_weights(setup.teacher, params, setup.config)
    return dataclasses.replace(setup, teacher=teacher)


def update_spec(setup: Setup) -> UpdateSpec:
    """The static arguments of the run's update."""
    return spec_of(
        setup.config, setup.student.config, setup.dtype, setup.decoding.valid_vocab, setup.mesh
    )


def decoding_of(
    checkpoint: Checkpoint, tokenizer: Any, more_stops: tuple[int, ...] = (), **own: Any
) -> Decoding:
    """How a checkpoint writes answers: up to its stop ids, `more_stops` or its stop strings; `own`:
    other fields of `Decoding`. ConfigError if a stop id stands for no token.
    """
    width, stops = num_ids(checkpoint, tokenizer), stop_ids(checkpoint, tokenizer, more_stops)
    if beyond := [token for token in more_stops if not 0 <= token < width]:
        raise ConfigError(
            f"sampling.stop_token_ids has {beyond}; expected ids from 0 to {width - 1}"
        )
    texts = checkpoint.stop_strings
    strings = find_stop_strings(texts, tokenizer, width) if texts else None
    return Decoding(stop_token_ids=stops, valid_vocab=width, stop_strings=strings, **own)


def make_evaluator(
    config: Config, student: Checkpoint, tokenizer: Any, mesh: Mesh | None
) -> Evaluator | None:
    """The evaluator of a config with its prompts; None if the config has no evaluation."""
    evaluation = dataclasses.replace(config.evaluation, grader=config.grader)
    if not evaluation.grades:
        return None
    require_grader(evaluation.grader)
    view = student_view(config.data)
    data = dataclasses.replace(view, source=evaluation.source, columns=(), references=None)
    names = config.data.column_names | evaluation.column_names
    names.pop("reference", None)
    rows = read_prompts(data.source, ColumnMap(**names), skips_bad_rows=data.skip_bad_rows)
    rows = first_of_each(rows, evaluation.num_prompts)
    require_field(rows, "answer", names, data.source, "evaluation needs them")
    require_readable(evaluation.grader, [row.answer for row in rows], evaluation.source)
    prompts = encode_prompts(rows, data, tokenizer, tokenizer)
    own = {n: getattr(evaluation, n) for n in ("max_completion_length", "top_k", "top_p")}
    decoding = decoding_of(student, tokenizer, config.sampling.stop_token_ids, **own)
    slots = config.sampling.slots
    return Evaluator(student.config, prompts, tokenizer, evaluation, decoding, mesh, slots)


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
    """End-of-sequence ids of checkpoint and tokenizer, ConfigError for none; and `more`."""
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


# What the data, the packages and the devices must have


def require_reward_data(config: Config, rows: list[Prompt]) -> None:
    """The data, packages and settings that given answers and rewards need must be there."""
    data, rubrics, estimator = config.data, config.rubrics, config.estimator

    def require_references(reason: str) -> None:
        if data.references is None:
            require_field(rows, "references", data.column_names, data.source, reason)

    if config.sampling.completions_from == "references":
        require_references("training on the data's own answers needs them")
    if config.is_judged and all(row.answer is not None for row in rows):
        require_grader(config.grader)  # the record of scores contains right answers
    if estimator.task_reward_coef or config.recipe.reward == "task":
        require_grader(config.grader)
        reason = "a task reward needs them"
        require_field(rows, "answer", data.column_names, data.source, reason)
        require_readable(config.grader, [row.answer for row in rows], data.source)
    if rubrics.stage_names:  # checked before anyone pays for scores that no stage can use
        try:
            credit_matrix(estimator.stage_credit, len(rubrics.stage_names))
        except ValueError as error:
            raise ConfigError(f"estimator.{error}") from error
    _require_own_criteria(config, rows)
    if not config.is_judged:
        return
    missing = [name for name in ("openai", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"judge requests need {' and '.join(missing)}: pip install 'opdjax[judge]'"
        )
    if rubrics.num_references:
        reason = "judges are shown a teacher's answers: write them with opdjax references "
        require_references(f"{reason}(data.references), or set rubrics.num_references to 0")


def _require_own_criteria(config: Config, rows: list[Prompt]) -> None:
    """The criteria that come with the prompts must fit the config's rubrics."""
    rubrics, stages = config.rubrics, config.rubrics.stage_names
    known = f"one of {list(stages)}" if stages else "none: rubrics.stage_names is ()"
    for number, row in enumerate(rows):
        problem = None
        if rubrics.refresh == "given" and not row.criteria:
            problem = "has no criteria, and with rubrics.refresh given no judge writes any"
        for criterion in row.criteria:
            if criterion.is_flaw and rubrics.polarity == "positive":
                problem = "has a criterion of negative weight; set rubrics.polarity to signed"
            elif criterion.stage not in (stages or (None,)):
                problem = f"has a criterion of stage {criterion.stage!r}; expected {known}"
        if problem is not None:
            where = f"prompt {number} of {config.data.source} (rubric in data.columns)"
            raise ConfigError(f"{where} {problem}")


def require_room(config: Config, prompts: PromptSet) -> None:
    """Every rollout must fit into a packed row, for the student and for the teacher."""
    length, answer = config.train.pack_length, config.sampling.max_completion_length
    if length is None:
        return
    longest = max(map(len, prompts.student_ids + (prompts.teacher_ids or ())))
    prompt = f"the longest prompt of {config.data.source}, of {longest} tokens"
    teacher = config.data.max_teacher_prompt_length if config.judged_fields else 0
    text = f"a teacher prompt with judges' texts, of up to {teacher} tokens"
    for needed, name in ((teacher, text), (longest, prompt)):
        expected = f"at least {needed + answer}: {name}, and an answer of "
        expected += f"sampling.max_completion_length, {answer}"
        require(needed + answer <= length, "train.pack_length", length, expected)


def require_rows_divide(config: Config, shards: int) -> None:
    """The rows of a step must divide into the micro-batches and the row shards of the mesh."""
    parts, rows = config.train.gradient_accumulation_steps, config.rows_per_step
    if rows % (shards * parts):
        fitting = (str(n) for n in range(1, rows + 1) if rows % (shards * n) == 0)
        raise ConfigError(
            f"{rows} rows a step (train.prompts_per_step x sampling.num_generations) do not divide "
            f"into {parts} micro-batches (train.gradient_accumulation_steps) on {shards} devices "
            f"(mesh.data x mesh.fsdp); micro-batches that divide: {', '.join(fitting) or 'none'}"
        )
    require_slots(config.sampling.slots, shards)


def learner_devices(config: Config) -> list[jax.Device] | None:
    """The devices that a generator thread leaves to the learner; None: all devices."""
    if config.near_policy.generator != "thread":
        return None
    tensor, available = config.mesh.tensor, len(jax.devices())
    count = config.mesh.generator_devices(available)
    expected = f"a mesh that leaves some of the {available} devices to the generator thread, "
    expected += f"a multiple of mesh.tensor, {tensor}, and has one or more"
    is_possible = 0 < count < available and count % tensor == 0
    require(is_possible, "mesh.data", config.mesh.data, expected)
    require_slots(config.sampling.slots, count // tensor)
    return jax.devices()[:-count]
