"""Which checkpoints a run uses, and how they compute."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

# Models by name: such a name is no directory's and no hub id's, and means the same on every machine
# that reads a config.
MINI_TEACHER, MINI_STUDENT = "@mini_teacher", "@mini_student"  # the built-in pair


STUDENT = (
    "@student"  # as teacher.path: the student that is trained, with the weights it has at each step
)


PACKAGE = pathlib.Path(__file__).parents[1]


MINI_PAIR = PACKAGE / "assets" / "mini_pair"  # where it lies: `teacher` and `student`


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of the run."""

    # Directory in Hugging Face layout (also on gs://), a hub id such as Qwen/Qwen3-1.7B-Base, or
    # @mini_teacher or @mini_student, the built-in pair. Of the teacher also @student: the student
    # in training is its own teacher, with the weights of each step, through which no gradient
    # flows; data.teacher_prompt_format shows the teacher more. The student's own path is its frozen
    # start instead.
    path: str = ""
    revision: str | None = None  # branch, tag or commit of a hub id
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the forward pass; auto: bfloat16 on TPU and GPU, float32 on CPU
    )
    # Mesh axes that its parameters, and the optimizer's state of the student, lie split over.
    # Without fsdp every device of that axis holds them whole and no weight is sent: for a frozen
    # teacher that fits.
    split_over: tuple[Literal["fsdp", "tensor"], ...] = ("fsdp", "tensor")
    # In training and scoring; the sampler's is always xla. xla holds T x T scores a head and runs
    # everywhere; splash (TPU, heads of 64, 128 or 256) and cudnn (NVIDIA GPU, bfloat16, heads of up
    # to 128) are fused kernels that never do. auto: splash on a TPU where it can run, else xla;
    # cudnn has not been timed yet
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
