"""The built-in task as a TFDS dataset, `tfds:opdjax_arithmetic#train`: same rows, same order.

Importing this module registers the builder, which is prepared on first use in TFDS_DATA_DIR.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from opdjax.data.tasks import arithmetic


class OpdjaxArithmetic(tfds.core.GeneratorBasedBuilder):
    """Chains of sums and differences, with final values and worked answers."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar = {}  # nothing is downloaded, so there is no file of checksums

    def __init__(self, *, file_format: str = "array_record", **options: Any):
        # Only TensorFlow reads and writes tfrecord, the default of TFDS.
        super().__init__(file_format=file_format, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        columns = {name: tfds.features.Text() for name in ("prompt", "answer", "reference")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Chains of sums and differences, answered step by step.",
            features=tfds.features.FeaturesDict(columns),
            disable_shuffling=True,  # keeps the order of `arithmetic:SPLIT`: both give one run
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {split: self._generate_examples(split) for split in arithmetic.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        for number, problem in enumerate(arithmetic.problems(split)):
            row = {"prompt": problem.prompt, "answer": problem.answer}
            yield number, row | {"reference": problem.reference}
