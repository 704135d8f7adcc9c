"""The whole audit: everything it measures, as one JSON document for the table and the page."""

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
from opdjax.config.recipes import EXACT, WITH_BASELINE
from opdjax.config.validation import ConfigError
from opdjax.diagnose.audit.batches import audit_batch_pitfalls, audit_costs
from opdjax.diagnose.audit.gradients import audit_gradients, num_uniforms
from opdjax.diagnose.audit.pair import audit_contexts, collect_states
from opdjax.diagnose.audit.subjects import Subject, subject
from opdjax.diagnose.audit.tree import audit_tree
from opdjax.diagnose.audit.vocabulary import audit_vocabulary
from opdjax.estimators import TOKEN_LOSSES
from opdjax.estimators.pitfalls import PITFALLS
from opdjax.rollouts.setup import Setup, prepare
from opdjax.runs.workdir import environment


def audit(
    config: Config,
    subjects: Sequence[Subject],
    settings: AuditConfig,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the subjects and return a JSON document.

    They are measured on the config's pair of models, at random contexts and on an enumerated tree.
    The pair's contexts are sampled from the student at temperature 1 without filters, whatever the
    config says.
    """
    setup = _prepare(config, settings)  # first: it refuses wrong models or data within seconds
    uncoupled = [each for each in subjects if not each.is_coupled]
    coupled = [each for each in subjects if each.is_coupled]
    document: dict[str, Any] = {
        "subjects": {each.name: describe(each) for each in subjects},
        "settings": dataclasses.asdict(settings),
        # Of all pitfalls: those of a batch are not among the subjects.
        "pitfalls": {name: pitfall.about for name, pitfall in PITFALLS.items()},
    }
    document |= _audit_pair(setup, config, uncoupled, coupled, settings, log)
    log(
        f"{len(uncoupled)} estimators at {settings.num_contexts} random contexts, "
        f"each with all {settings.vocab} tokens"
    )
    document["vocabulary"] = audit_vocabulary(
        uncoupled, num_contexts=settings.num_contexts, vocab=settings.vocab, seed=config.seed
    )
    log("a tree of every sequence of three tokens")
    document["tree"] = audit_tree(seed=config.seed)
    devices = [device.device_kind for device in jax.devices()]
    return document | {"seed": config.seed, "environment": environment(devices)}


def _prepare(config: Config, settings: AuditConfig) -> Setup:
    """Set up models and data for the recipe that needs most: teacher weights, one vocabulary."""
    sampling = SamplingConfig(
        max_completion_length=config.sampling.max_completion_length,
        stop_token_ids=config.sampling.stop_token_ids,
    )
    train = dataclasses.replace(
        config.train, prompts_per_step=settings.num_prompts, gradient_accumulation_steps=1
    )
    return prepare(
        dataclasses.replace(
            config,
            estimator=EstimatorConfig(WITH_BASELINE),
            sampling=sampling,
            train=train,
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
    settings: AuditConfig,
    log: Callable[[str], None],
) -> dict[str, Any]:
    subjects = [*uncoupled, *coupled]
    states = collect_states(
        setup,
        num_prompts=settings.num_prompts,
        num_generations=settings.num_generations,
        seed=config.seed,
        num_uniforms=num_uniforms(subjects),
        rows_at_once=config.rows_per_step // config.train.gradient_accumulation_steps,
    )
    log(
        f"{int(states.mask.sum())} contexts of {config.student.path} on {settings.num_prompts} "
        f"prompts, teacher {config.teacher.path}"
    )
    found: dict[str, Any] = {
        "student": config.student.path,
        "teacher": config.teacher.path,
        "contexts": audit_contexts(states, uncoupled),
    }
    log("seconds and bytes a token")
    found["costs"] = audit_costs(states, subjects)
    found["batch_pitfalls"] = audit_batch_pitfalls(states)
    if settings.parameter_space:
        log("gradients of all parameters, rollout by rollout")
        # Estimators that sample no token differ in bias alone, so only three of them are measured:
        # the two exact ones and the config's own, which comes first.
        exact = [subject(EXACT, divergence=name).name for name in ("reverse", "forward")]
        exact.append(uncoupled[0].name)
        measured = [each for each in subjects if each.is_sampled or each.name in exact]
        found["gradients"] = audit_gradients(states, measured, log)
    return found


def describe(each: Subject) -> dict[str, Any]:
    """Return the document's entry for a subject."""
    about = each.pitfall.about if each.recipe is None else each.row.description
    if each.row is not None and "student" not in each.row.completions:
        about += " Measured at the student's contexts with the teacher's tokens;"
        about += " in training the contexts are the teacher's too."
    if each.row is not None and each.row.cross_entropy is None:
        about += " Measured on all of the student's own tokens;"
        about += " in training an older student samples them and a filter selects some."
    return {
        "recipe": each.recipe,
        "options": each.options,
        "is_pitfall": each.recipe is None,
        "advertises": each.advertises,
        "is_sampled": each.is_sampled,
        "is_coupled": each.is_coupled,
        "about": about,
    }


def explain(name: str) -> str:
    """Return the documentation of a recipe or a pitfall.

    That of a recipe states its equation, what is detached, its cost, when to use it and its
    options. ConfigError on an unknown name.
    """
    if name in TOKEN_LOSSES:
        return inspect.getdoc(TOKEN_LOSSES[name])
    if name in PITFALLS:
        return PITFALLS[name].about
    known = [*TOKEN_LOSSES, *PITFALLS]
    raise ConfigError(f"there is no recipe and no pitfall {name!r}; expected one of {known}")
