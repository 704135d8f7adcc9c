"""Which checkpoints a run uses."""

import dataclasses
import pathlib
import re

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

    # Directory in Hugging Face layout (also on gs://), a hub id such as Qwen/Qwen3-1.7B-Base, with
    # @REVISION a branch, tag or commit of it, or @mini_teacher or @mini_student, the built-in pair.
    # The directory of a PEFT adapter (LoRA) is its base model with the adapter merged; the adapter
    # of the student is trained further where lora has its rank, alpha and targets.
    # For the teacher also @student: the student is its own teacher, with the weights of each step
    # and without a gradient through them; data.teacher_prompt_format then shows the teacher more.
    # optimizer.teacher_ema_decay gives it a moving average of these weights.
    # To use the untrained student as a frozen teacher, give the student's path.
    path: str = ""

    @property
    def place(self) -> tuple[str, str | None]:
        """(directory or hub id, revision of the hub id)."""
        name, at, revision = self.path.rpartition("@")
        is_hub_id = at and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        if not is_hub_id or pathlib.Path(self.path).exists():
            return self.path, None
        return name, revision
