"""The built-in task as a TFDS dataset, `tfds:opdjax_arithmetic#train`: the rows of
`arithmetic:train` in their order.

Importing this module is what makes the builder known to TFDS. It is prepared on first use, without
TensorFlow, or by

    python -c "from opdjax.data.tasks.arithmetic_tfds import OpdjaxArithmetic as A;
    A().download_and_prepare()"

into TFDS_DATA_DIR (~/tensorflow_datasets where that is not set).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from opdjax.data.tasks import arithmetic


class OpdjaxArithmetic(tfds.core.GeneratorBasedBuilder):
    """Chains of sums and differences with their values and worked answers."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar = {}  # nothing is downloaded: no checksums to look for beside this file

    def __init__(self, *, file_format: str = "array_record", **options: Any):
        # The default of TFDS, tfrecord, is written and read by TensorFlow alone.
        super().__init__(file_format=file_format, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        columns = {name: tfds.features.Text() for name in ("prompt", "answer", "reference")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Chains of sums and differences, answered step by step.",
            features=tfds.features.FeaturesDict(columns),
            # the stored order is that of `arithmetic:SPLIT`, so that both give the same run
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {split: self._generate_examples(split) for split in arithmetic.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        for number, problem in enumerate(arithmetic.problems(split)):
            yield (
                number,
                {
                    "prompt": problem.prompt,
                    "answer": problem.answer,
                    "reference": problem.reference,
                },
            )
