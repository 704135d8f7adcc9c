"""The training loop: updates, optimizer, adapters, devices, checkpoints and logs."""

from typing import Annotated, Literal, get_args

from opdjax.config.validation import Section

LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]  # the kernels of a layer
FrozenWeights = Literal["dtype", "int8", "int8_head"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
# Those of optax that treat a parameter of all layers, stacked, as they treat each layer's: none
# that needs a parameter's norm (lamb, lars, novograd) or weights of its own for evaluation.
AdamLike = Literal["adamw", "nadamw", "radam", "adabelief", "ademamix"]
OptimizerName = Literal[AdamLike, "adan", "lion", "muon", "adafactor", "rmsprop", "sgd"]


class TrainConfig(Section):
    """The training loop."""

    # Optimizer updates.
    num_steps: Annotated[int, "at least 1"] = 100
    # Prompts per update.
    prompts_per_step: Annotated[int, "at least 1"] = 64
    # Micro-batches per update, each with the same number of rows. Saves memory and does not change
    # the gradient.
    gradient_accumulation_steps: Annotated[int, "at least 1"] = 1
    # What the backward pass recomputes. none: nothing. layer: each layer from its input, the least
    # memory for one more forward pass. dots: everything but the products with the layers' kernels,
    # which are most of the work.
    remat: Literal["none", "dots", "layer"] = "none"
    # Pack rollouts into rows of this many tokens; None: one rollout per row. Saves time only with
    # gradient accumulation, because empty micro-batches are skipped. Attention cost grows with the
    # square.
    pack_length: Annotated[int | None, "at least 2, or none"] = None
    # Dtype of the forward passes of student and teacher; auto: bfloat16 on TPU and GPU, float32 on
    # CPU, where bfloat16 is slower.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Attention in training and scoring; the sampler always uses xla. xla runs everywhere and holds
    # T x T scores per head. splash (TPU, heads of 64, 128 or 256) and cudnn (NVIDIA GPU, bfloat16,
    # heads of up to 128) are fused kernels that do not. auto: splash if it can run, else xla.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    # Another run to start from: RUN, its work directory (also on gs://), or RUN@STEP for another
    # checkpoint than its newest. It must have the same student.path and lora, and stay where it is.
    start_from: str | None = None
    # What is taken from it. both: its student, its optimizer, the number of the step and its logs,
    # so that it goes on to train.num_steps, with the settings of this run. student: the weights;
    # the steps begin at 0, the only way with a near_policy.schedule. optimizer: its moments and the
    # number of the step.
    start_with: Literal["both", "student", "optimizer"] = "both"
    # Passes over the prompts, instead of num_steps: as many updates as show every prompt this
    # often, the last one filled with prompts of a further pass. None: num_steps counts.
    num_epochs: Annotated[int | None, "at least 1, or none for num_steps"] = None
    # End the run after this many evaluations in a row without a new best avg@8, where the untrained
    # student's counts as the first; 0: never. The run exports its last student; the best checkpoint
    # is kept for opdjax export --step best.
    early_stopping_patience: Annotated[int, "0 (off) or more"] = 0
    # How weights that are not trained are held, the teacher's and those below adapters. dtype: in
    # the dtype of the forward pass. int8: the kernels of the layers in 8 bits, with a scale for
    # each output channel; int8_head: the teacher's embedding and unembedding too.
    frozen_weights: FrozenWeights = "dtype"

    def __post_init__(self):
        super().__post_init__()
        if self.start_from is None:
            self.require_default("start_with", "where train.start_from is none")
        if self.num_epochs is not None:
            self.require_default("num_steps", "where train.num_epochs is given")

    @property
    def start(self) -> tuple[str, str]:
        """(work directory, step or `latest`) of `start_from`."""
        run, at, step = (self.start_from or "").rpartition("@")
        return (run, step) if at and step.isdecimal() else (self.start_from, "latest")

    @property
    def first_step(self) -> int:
        """The number of steps before the first one of this run, where `start_from` names a step."""
        return 0 if self.start_from is None or self.start_with == "student" else int(self.start[1])

    def steps_over(self, num_prompts: int) -> int:
        """Updates of a run over this many prompts."""
        if self.num_epochs is None:
            return self.num_steps
        return -(-self.num_epochs * num_prompts // self.prompts_per_step)


class OptimizerConfig(Section):
    """The optimizer, its learning rate and its weight decay."""

    # Learning rate after the warm-up.
    learning_rate: Annotated[float, "more than 0"] = 1e-5
    # Learning rate after the warm-up: constant, or falling to min_lr_ratio at the last step.
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    # Steps in which the learning rate rises linearly from 0.
    warmup_steps: Annotated[int, "0 or more"] = 0
    # Decay rate of Adam's mean of squared gradients; for adamw, nadamw, radam, adabelief, ademamix,
    # and NAdamW's part of muon.
    b2: Annotated[float, "at least 0 and less than 1"] = 0.999
    # Decoupled weight decay, times the learning rate, with every optimizer; norms and biases are
    # not decayed. 0: off.
    weight_decay: Annotated[float, "0 (off) or more"] = 0.0
    # Clip gradients to this global norm; 0: off.
    max_grad_norm: Annotated[float, "0 (off) or more"] = 1.0
    # Learning rate of the last step of linear and cosine, as a share of learning_rate.
    min_lr_ratio: Annotated[float, "from 0 to 1"] = 0.0
    # The optimizer, with optax's constants. muon: kernels and adapters by Muon, whose updates are
    # as large as AdamW's (arXiv 2502.16982), so that AdamW's learning rates fit; the rest by
    # NAdamW. adafactor: learning_rate is absolute, not a share of a parameter's size. sgd: without
    # momentum.
    name: OptimizerName = "adamw"
    # Where teacher.path is @student: the teacher has a moving average of the student's weights,
    # decay x average + (1 - decay) x weights after every update, kept in float32 and in checkpoints
    # (with adapters: of the adapters). 0: the weights of each step.
    teacher_ema_decay: Annotated[float, "at least 0 and less than 1"] = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.schedule == "constant":
            self.require_default("min_lr_ratio", "where the schedule is constant: it does not fall")
        if self.name not in (*get_args(AdamLike), "muon"):
            self.require_default("b2", f"where optimizer.name is {self.name}: it does not read it")


class LoraConfig(Section):
    """Low-rank adapters of the student: only they are trained and saved in checkpoints."""

    # Rank of every adapter; 0: no adapters, all parameters are trained.
    rank: Annotated[int, "0 (off) or more"] = 0
    # An adapter's product is multiplied by alpha / rank.
    alpha: Annotated[float, "more than 0"] = 16.0
    # Kernels with an adapter: q, k, v, o of the attention; gate, up, down of the MLP.
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)

    def __post_init__(self):
        super().__post_init__()
        is_set = 0 < len(self.targets) == len(set(self.targets))
        expected = f"one or more of {', '.join(get_args(LoraTarget))}, each once"
        self.require(is_set, "targets", expected)
        for name in ("alpha", "targets") if self.rank == 0 else ():
            self.require_default(name, "where lora.rank is 0: no adapters")

    @property
    def scale(self) -> float:
        """Factor of an adapter's product; 1 without adapters."""
        return self.alpha / self.rank if self.rank else 1.0


class MeshConfig(Section):
    """How devices are used."""

    # Copies of the parameters, each with its own rows; -1: as many as there are devices for.
    data: Annotated[int, "-1 (all there are) or at least 1"] = -1
    # Devices that shard the parameters, the optimizer state and the rows.
    fsdp: Annotated[int, "at least 1"] = 1
    # Devices that shard the attention heads, the MLP and the vocabulary.
    tensor: Annotated[int, "at least 1"] = 1
    # Processes of this run, usually one per host, all started with the same command; -1: as many as
    # the cluster says. With more than one, jax.distributed.initialize() connects them: in the
    # environment of a TPU or of Slurm, or by JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID.
    processes: Annotated[int, "-1 (all there are) or at least 1"] = 1

    def generator_devices(self, available: int) -> int:
        """Devices of a generator thread, the last ones: those that the mesh leaves to it."""
        if self.data == -1:
            return self.tensor
        return available - self.data * self.fsdp * self.tensor


class CheckpointConfig(Section):
    """How often checkpoints are saved, and which are kept."""

    # Steps between checkpoints; the last step is always saved.
    every: Annotated[int, "at least 1"] = 50
    # Number of the newest checkpoints to keep, besides the one with the best sampled score.
    keep: Annotated[int, "at least 1"] = 2
    # Where the newest checkpoint is damaged: stop, or set it aside and continue from the previous.
    on_damage: Literal["stop", "previous"] = "stop"


class LogConfig(Section):
    """What is logged in addition to metrics.jsonl."""

    # Steps between rollouts written to samples.jsonl; 0: never.
    samples_every: Annotated[int, "0 (off) or more"] = 50
    # Where metrics and scores of evaluations also go; each needs the extra of its name.
    # tensorboard: event files in the work directory. wandb, trackio: a run named after the work
    # directory, in the project WANDB_PROJECT or TRACKIO_PROJECT (default: opdjax).
    trackers: tuple[TrackerName, ...] = ()
    # Steps between diagnostics: entropies, overlap of student and teacher, quantiles of the reward;
    # 0: never.
    diagnostics_every: Annotated[int, "0 (off) or more"] = 10

    def __post_init__(self):
        super().__post_init__()
        expected = f"one or more of {', '.join(get_args(TrackerName))}, each once, or none"
        self.require(len(self.trackers) == len(set(self.trackers)), "trackers", expected)
