"""The whole audit: everything it measures, as one JSON document for the table and the page."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from tqdm import tqdm

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
from opdjax.diagnose.audit.contexts import audit_vocabulary
from opdjax.diagnose.audit.gradients import NUM_REDRAWS, audit_batch_pitfalls, audit_gradients
from opdjax.diagnose.audit.pair import States, audit_contexts, audit_costs, collect_states
from opdjax.diagnose.audit.subjects import Subject, subject
from opdjax.diagnose.audit.tree import audit_tree, own_case
from opdjax.estimators import TOKEN_LOSSES
from opdjax.estimators.pitfalls import PITFALLS
from opdjax.rollouts.setup import Setup, prepare
from opdjax.runs.workdir import environment


def audit(
    config: Config,
    subjects: list[Subject],
    settings: AuditConfig,
    *,
    skip_cost: bool = False,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measure the subjects and return a JSON document; progress is shown on stderr.

    They are measured on the config's pair of models, at random contexts and on an enumerated tree.
    The pair's contexts are sampled from the student at temperature 1 without filters, whatever the
    config says. The document has a key for each part that was measured, and `unfinished` names the
    parts to come; `save(document)` is called after each part.
    """
    setup = _prepare(config, settings)  # first: it refuses wrong models or data within seconds
    progress = lambda part: partial(tqdm, desc=part, mininterval=1.0)
    states = collect_states(
        setup,
        settings,
        num_uniforms=NUM_REDRAWS * max(each.num_draws for each in subjects),
        rows_at_once=config.rows_per_step // config.train.gradient_accumulation_steps,
        progress=progress("sampling"),
    )
    document: dict[str, Any] = {
        "subjects": {each.name: describe(each) for each in subjects},
        "settings": dataclasses.asdict(settings),
        # Of all pitfalls: those of a batch are not among the subjects.
        "pitfalls": {name: pitfall.about for name, pitfall in PITFALLS.items()},
        "student": config.student.path,
        "teacher": config.teacher.path,
        "seed": config.seed,
        "environment": environment([device.device_kind for device in jax.devices()]),
    }
    skipped = {"costs"} if skip_cost else set()
    skipped |= set() if settings.parameter_space else {"gradients"}
    parts = _parts(states, config, subjects, settings)
    names = [name for name in parts if name not in skipped]
    for number, name in enumerate(names, 1):
        document[name] = parts[name](progress=progress(f"{name} ({number}/{len(names)})"))
        document["unfinished"] = names[number:]
        save(document)
    return document


def _parts(
    states: States, config: Config, subjects: list[Subject], settings: AuditConfig
) -> dict[str, Callable[..., dict[str, Any]]]:
    """Return the parts of the audit by their keys in the document, the slowest ones last."""
    ordered = sorted(subjects, key=lambda each: each.is_coupled)
    uncoupled = [each for each in ordered if not each.is_coupled]
    # Estimators that sample no token differ in bias alone, so only three of them are measured in
    # parameter space: the two exact ones and the config's own.
    exact = [subject(EXACT, divergence=name) for name in ("reverse", "forward")]
    varying = [each for each in ordered if each.is_sampled or each.is_own or each in exact]
    own = [own_case(each, config.estimator.aggregation) for each in subjects if each.is_own]
    size = {"num_contexts": settings.num_contexts, "vocab": settings.vocab}
    return {
        "contexts": partial(audit_contexts, states, uncoupled),
        "batch_pitfalls": partial(audit_batch_pitfalls, states),
        "vocabulary": partial(audit_vocabulary, uncoupled, **size, seed=config.seed),
        "tree": partial(audit_tree, own, seed=config.seed),
        "costs": partial(audit_costs, states, [each for each in ordered if each.recipe]),
        "gradients": partial(audit_gradients, states, varying),
    }


def _prepare(config: Config, settings: AuditConfig) -> Setup:
    """Set up models and data for the recipe that needs most: teacher weights, one vocabulary."""
    change, sampling = dataclasses.replace, config.sampling
    return prepare(
        change(
            config,
            estimator=EstimatorConfig(WITH_BASELINE),
            sampling=SamplingConfig(
                max_completion_length=sampling.max_completion_length,
                stop_token_ids=sampling.stop_token_ids,
            ),
            train=change(
                config.train, prompts_per_step=settings.num_prompts, gradient_accumulation_steps=1
            ),
            evaluation=change(config.evaluation, source=None),
            mesh=MeshConfig(1),
            near_policy=NearPolicyConfig(),
        )
    )


def describe(each: Subject) -> dict[str, Any]:
    """Return the document's entry for a subject."""
    about = each.pitfall.about if each.row is None else each.row.description
    if not each.is_on_policy:
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
        "is_own": each.is_own,
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
