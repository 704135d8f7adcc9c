"""The student's weights of a run: trained and frozen ones, as they are updated, sampled from and
exported.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opdjax.config import FrozenWeights
from opdjax.models.decoder import Params
from opdjax.models.hf import load_params
from opdjax.models.lora import combine, continues, init_adapters, stored_adapters
from opdjax.models.partitioning import SAMPLER_AXES, constrain, shardings_of
from opdjax.ops.sharding import is_process_zero
from opdjax.rollouts.setup import Setup
from opdjax.rollouts.start import first_params


def load_student(setup: Setup) -> tuple[Params, Params | None]:
    """(parameters to train, frozen parameters) of step 0.

    Without adapters: all parameters in float32, and None. With adapters: the adapters in float32,
    and the student's own parameters in the dtype of the forward pass.
    """
    config, mesh, student = setup.config, setup.mesh, setup.student
    adapters, is_continued = first_params(config, student, mesh), continues(student, config.lora)
    if student.adapter is not None and is_process_zero():
        end = "trained further" if is_continued else "merged into its base: lora is set otherwise"
        print(f"the adapter {student.adapter.path} of {student.adapter.base[0]} is {end}")
    if not config.lora.rank:
        return adapters or load_params(student, "float32", mesh), None
    if adapters is None and is_continued:
        adapters = jax.jit(lambda x: constrain(x, mesh))(stored_adapters(student, config.lora))
    if adapters is None:
        adapters = jax.jit(
            lambda: constrain(init_adapters(student.config, config.lora, config.seed), mesh)
        )()
    # New adapters start at 0, so the student without them is the reference policy: one copy is
    # enough.
    if setup.reference_policy is not None and not is_continued:
        return adapters, setup.reference_policy.params
    return adapters, load_base(setup, config.base_weights)


def load_base(setup: Setup, weights: FrozenWeights) -> Params:
    """The student's own parameters below the run's adapters."""
    with_adapter = not continues(setup.student, setup.config.lora)
    return load_params(
        setup.student, setup.dtype, setup.mesh, with_adapter=with_adapter, weights=weights
    )


def whole_student(setup: Setup, trained: Params, frozen: Params | None) -> Params:
    """The student that is exported: adapters over the base as it was stored, also where the run
    holds the base in 8 bits.
    """
    if setup.config.base_weights != "dtype":
        frozen = load_base(setup, "dtype")
    return combine(frozen, trained)


def sampling_weights(setup: Setup, frozen: Params | None) -> Callable[[Params], Params]:
    """Trained parameters -> the whole student's weights for sampling.

    The trained part is copied even if its dtype stays: the update overwrites the state's arrays,
    and may read the copy as its teacher's head. The frozen part is not copied if it is in place.
    """
    mesh = setup.mesh
    own_frozen = frozen and jax.device_put(frozen, shardings_of(frozen, mesh, SAMPLER_AXES))

    @jax.jit
    def copied(params: Params) -> Params:  # cast before it is sent to other devices
        copies = jax.tree.map(lambda x: jnp.array(x, setup.dtype, copy=True), params)
        return constrain(copies, mesh, SAMPLER_AXES)

    return lambda params: combine(own_frozen, copied(params))


def initial_weights(setup: Setup) -> Params:
    """The weights that sample before the first update."""
    trained, frozen = load_student(setup)
    return sampling_weights(setup, frozen)(trained)
