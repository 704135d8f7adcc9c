"""The audit as a whole: everything measured, as one document that a table and a page are made of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from opdjax.config import (
    AuditConfig,
    Config,
    EstimatorConfig,
    MeshConfig,
    NearPolicyConfig,
    SamplingConfig,
)
from opdjax.diagnose.audit.batches import audit_batch_pitfalls, audit_costs
from opdjax.diagnose.audit.gradients import audit_gradients, num_uniforms
from opdjax.diagnose.audit.pair import audit_contexts, reach
from opdjax.diagnose.audit.subjects import Subject
from opdjax.diagnose.audit.tree import audit_tree
from opdjax.diagnose.audit.vocabulary import audit_vocabulary
from opdjax.estimators import TOKEN_LOSSES
from opdjax.estimators.pitfalls import PITFALLS
from opdjax.rollouts.setup import Setup, prepare
from opdjax.runs.workdir import environment


def audit(
    config: Config,
    subjects: Sequence[Subject],
    how: AuditConfig,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the subjects on the config's pair of models, on random contexts and on an enumerated
    tree; a JSON document.

    The pair's contexts are sampled from the student at temperature 1 without filters, whatever the
    config samples with.
    """
    setup = _prepare(
        config, how
    )  # first: what is wrong with models or data is said before anything is measured
    uncoupled, coupled = (
        [each for each in subjects if each.is_coupled == wanted] for wanted in (False, True)
    )
    document: dict[str, Any] = {
        "subjects": {each.name: describe(each) for each in subjects},
        "how": dataclasses.asdict(how),
    }
    document["pitfalls"] = {
        name: pitfall.about for name, pitfall in PITFALLS.items()
    }  # those of a batch are no subjects
    document |= _audit_pair(setup, config, uncoupled, coupled, how, tell)
    tell(
        f"{len(uncoupled)} estimators at {how.num_contexts} random contexts of {how.vocab} tokens, every draw enumerated"
    )
    document["vocabulary"] = audit_vocabulary(
        uncoupled, num_contexts=how.num_contexts, vocab=how.vocab, seed=config.seed
    )
    tell("a tree of every sequence of three tokens")
    document["tree"] = audit_tree(seed=config.seed)
    devices = [device.device_kind for device in jax.devices()]
    return document | {"seed": config.seed, "environment": environment(devices)}


def _prepare(config: Config, how: AuditConfig) -> Setup:
    """The config's models and data, for what a recipe with the most needs reads: the teacher's
    weights, one vocabulary on both sides.
    """
    sampling = SamplingConfig(
        max_completion_length=config.sampling.max_completion_length,
        stop_token_ids=config.sampling.stop_token_ids,
    )
    return prepare(
        dataclasses.replace(
            config,
            estimator=EstimatorConfig(recipe="vopd", tile=config.estimator.tile),
            sampling=sampling,
            train=dataclasses.replace(
                config.train, prompts_per_step=how.num_prompts, gradient_accumulation_steps=1
            ),
            evaluation=dataclasses.replace(config.evaluation, source=None),
            mesh=MeshConfig(1),
            near_policy=NearPolicyConfig(),
        )
    )


def _audit_pair(
    setup: Setup,
    config: Config,
    uncoupled: list[Subject],
    coupled: list[Subject],
    how: AuditConfig,
    tell,
) -> dict[str, Any]:
    states = reach(
        setup,
        num_prompts=how.num_prompts,
        num_generations=how.num_generations,
        seed=config.seed,
        num_uniforms=num_uniforms([*uncoupled, *coupled]),
        rows_at_once=config.rows_per_step // config.train.gradient_accumulation_steps,
    )
    tell(
        f"{int(states.mask.sum())} contexts of {config.student.path} on {how.num_prompts} prompts, supervised by {config.teacher.path}"
    )
    found: dict[str, Any] = {
        "student": config.student.path,
        "teacher": config.teacher.path,
        "contexts": audit_contexts(states, uncoupled),
    }
    tell("seconds and bytes a token")
    found["costs"] = audit_costs(states, [*uncoupled, *coupled])
    found["batch_pitfalls"] = audit_batch_pitfalls(states)
    if how.parameter_space:
        tell("gradients of all parameters, rollout by rollout")
        # Of those that draw nothing, the two exact ones and the config's own, which stands first:
        # the others differ in bias alone.
        exact = ("full_kl divergence=reverse", "full_kl divergence=forward", uncoupled[0].name)
        found["gradients"] = audit_gradients(
            states, [s for s in (*uncoupled, *coupled) if s.is_sampled or s.name in exact], tell
        )
    return found


def describe(each: Subject) -> dict[str, Any]:
    """What a reader of the document is told of a subject."""
    about = each.pitfall.about if each.recipe is None else summary(each.recipe)
    if each.recipe == "sft":
        about += " Measured at the student's contexts with the teacher's tokens; in training the contexts are the teacher's too."
    if each.recipe == "npd":
        about += " Measured on all of the student's own tokens; in training a student of earlier updates drew them and a filter chose."
    return {
        "recipe": each.recipe,
        "options": each.options,
        "is_pitfall": each.recipe is None,
        "advertises": each.advertises,
        "is_sampled": each.is_sampled,
        "is_coupled": each.is_coupled,
        "about": about,
    }


def summary(recipe: str) -> str:
    """The first line of a recipe's page."""
    return inspect.getdoc(TOKEN_LOSSES[recipe]).partition("\n")[0]


def explain(name: str) -> str:
    """The page of a recipe: equation, what is detached, cost, use, options; or what is known of a
    pitfall.
    """
    if name in TOKEN_LOSSES:
        return inspect.getdoc(TOKEN_LOSSES[name])
    if name in PITFALLS:
        return PITFALLS[name].about
    raise ValueError(
        f"there is no recipe and no pitfall {name!r}; expected one of {[*TOKEN_LOSSES, *PITFALLS]}"
    )
