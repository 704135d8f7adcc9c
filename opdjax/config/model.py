"""Which checkpoints a run uses, and how they compute."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

# The built-in pair. Such a name is neither a directory nor a hub id, and means the same on every
# machine that reads a config.
MINI_TEACHER, MINI_STUDENT = "@mini_teacher", "@mini_student"
# As teacher.path: the student in training, with the weights of each step.
STUDENT = "@student"
PACKAGE = pathlib.Path(__file__).parents[1]
MINI_PAIR = PACKAGE / "assets" / "mini_pair"  # contains `teacher` and `student`


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of the run."""

    # Directory in Hugging Face layout (also on gs://), a hub id such as Qwen/Qwen3-1.7B-Base, or
    # @mini_teacher or @mini_student, the built-in pair. For the teacher also @student: the student
    # is its own teacher, with the weights of each step and without a gradient through them;
    # data.teacher_prompt_format then shows the teacher more. To use the untrained student as a
    # frozen teacher, give the student's path.
    path: str = ""
    # Branch, tag or commit of a hub id.
    revision: str | None = None
    # Dtype of the forward pass; auto: bfloat16 on TPU and GPU, float32 on CPU.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Mesh axes that shard the parameters, and the student's optimizer state. Without fsdp, every
    # device of that axis holds all of them and none are sent: good for a small frozen teacher.
    split_over: tuple[Literal["fsdp", "tensor"], ...] = ("fsdp", "tensor")
    # Attention in training and scoring; the sampler always uses xla. xla runs everywhere and holds
    # T x T scores per head. splash (TPU, heads of 64, 128 or 256) and cudnn (NVIDIA GPU, bfloat16,
    # heads of up to 128) are fused kernels that do not. auto: splash on a TPU if it can run, else
    # xla; cudnn has not been timed yet.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
