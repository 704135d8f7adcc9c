"""Bytes and operations, worked by hand for a tiny pair, and against what XLA says of the same
programs on this machine.
"""

import dataclasses

import jax
import pytest

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.topology import topology
from opdjax.diagnose.plan.aot import lower_update, measure
from opdjax.diagnose.plan.estimate import cache_bytes, estimate, kept_activations
from opdjax.diagnose.plan.table import fits, verdict
from opdjax.diagnose.plan.workload import abstract_mesh, bytes_of, read_workload
from opdjax.models.attention import NO_WINDOW
from opdjax.models.decoder import init_params, num_parameters
from opdjax.ops.sharding import make_mesh
from opdjax.ops.vocab import TILE

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
# A layer's kernels: q and o 8 x 8, k and v 8 x 4, three of the MLP 8 x 16; its norms 2 x 8. The
# embedding 32 x 8, the last norm 8.
KERNELS, NORMS, EMBEDDING = 2 * (2 * 64 + 2 * 32 + 3 * 128), 2 * 2 * 8 + 8, 256


def sizes(plan, phase):
    return {item.name: item.num_bytes for item in plan.items if phase in item.phases}


def parameter_bytes(workload, mesh, *params):
    return bytes_of(dataclasses.replace(workload, layout=abstract_mesh(mesh)).params(*params))


def test_parameters(run_of):
    workload = run_of("v5e-4")
    student, both = workload.student, ("fsdp", "tensor")
    assert num_parameters(student) == KERNELS + NORMS + EMBEDDING
    assert parameter_bytes(workload, ONE, student, "float32", both) == 4 * (
        KERNELS + NORMS + EMBEDDING
    )
    mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    # Norms are replicated.
    assert parameter_bytes(workload, mesh, student, "bfloat16", both) == 2 * (
        (KERNELS + EMBEDDING) // 2 + NORMS
    )
    assert parameter_bytes(workload, mesh, student, "bfloat16", ("tensor",)) == 2 * (
        KERNELS + NORMS + EMBEDDING
    )
    real = sum(
        leaf.size
        for leaf in jax.tree.leaves(
            jax.eval_shape(lambda key: init_params(student, key), jax.random.key(0))
        )
    )
    assert num_parameters(student) == real


def test_what_each_phase_holds(run_of):
    """4 devices as 2 x 2: two rows a device, one at a time, of 16 + 16 columns."""
    plan = estimate(run_of("v5e-4"))
    kept, published = 4 * ((KERNELS + EMBEDDING) // 2 + NORMS), 2 * (KERNELS + NORMS + EMBEDDING)
    update, teacher = sizes(plan, "loss") | sizes(plan, "backward"), sizes(plan, "teacher")
    assert update["student's trained parameters, float32"] == kept
    assert update["optimizer's state"] == 2 * kept
    assert update["published copy of the student"] == published
    assert update["gradient, float32"] == kept
    assert update["student's parameters, cast"] == update["gradient of a micro-batch"] == kept // 2
    assert update["teacher's head"] == 32 * 16 * 2 // 2
    assert update["teacher's head, gathered"] == 32 * 16 * 2
    assert update["student's head, gathered"] == 32 * 8 * 2
    assert update["head's gradient, summed in float32"] == 32 * 8 * 4
    assert update["vocabulary tiles, 4 of them"] == 4 * 8 * 32 * 4
    assert (
        update["teacher's hidden states, whole batch"]
        == teacher["teacher's hidden states, whole batch"]
        == 2 * 32 * 16 * 2
    )
    assert sizes(plan, "sample")["KV cache, prompt and completion"] == 2 * 2 * 2 * 32 * 1 * 4 * 2
    assert sizes(plan, "sample")["KV cache of waiting prompts"] == 2 * 2 * 1 * 16 * 1 * 4 * 2
    assert plan.phases == ("prefill", "sample", "teacher", "loss", "backward")
    assert plan.program_bytes("update") == max(
        plan.held(phase) - plan.outside_bytes(phase) for phase in ("loss", "backward")
    )


def test_a_recipe_without_the_teachers_distribution_holds_less(run_of):
    of_tokens = estimate(run_of("v5e-4", recipe="opd"))
    of_text = estimate(run_of("v5e-4", recipe="sft", **taught()))
    assert "teacher's hidden states, whole batch" not in sizes(of_tokens, "loss")
    assert "vocabulary tiles, 1 of them" in sizes(of_tokens, "loss")
    assert "vocabulary tiles of the teacher" in sizes(of_tokens, "teacher")
    assert not {name for name in sizes(of_text, "teacher") if "vocabulary" in name}
    # Two rows of 32 columns a device, ten ids and log-probs each.
    of_top_k = estimate(run_of("v5e-4", recipe="npd"))
    for phase in ("teacher", "loss"):
        more = sizes(of_top_k, phase)["teacher's most likely ids, with log-probabilities"]
        assert more == of_top_k.held(phase) - of_tokens.held(phase) == 2 * 32 * 10 * 8
    assert of_top_k.bounds == of_tokens.bounds
    assert of_text.bounds["teacher"].seconds == of_text.bounds["sample"].seconds == 0


def taught():
    return {"sampling": SamplingConfig(max_completion_length=16, completions_from="references")}


def test_a_save_is_counted_where_the_state_lies_in_the_memory_of_the_host(run_of):
    plan = estimate(run_of("cpu", mesh=MeshConfig()))
    state = 3 * 4 * (KERNELS + NORMS + EMBEDDING)  # with two moments
    assert sizes(plan, "save")["checkpoint, a copy and its encoded form"] == 2 * state
    assert plan.held("save") - plan.held("teacher") < 2 * state
    adapters = estimate(run_of("cpu", mesh=MeshConfig(), lora=LoraConfig(rank=1)))
    small = sizes(adapters, "save")
    assert small["checkpoint, a copy and its encoded form"] < 2 * state / 3
    assert small["student's frozen parameters"] == state // 3


def test_tensor_splits_heads_mlp_and_vocabulary(run_of):
    workload = run_of("v5e-4")
    student = dataclasses.replace(workload.student, num_kv_heads=2)
    assert cache_bytes(student, "bfloat16", 3, 10, tensor=2) * 2 == cache_bytes(
        student, "bfloat16", 3, 10
    )
    mesh = {"data": 1, "fsdp": 1, "tensor": 2}
    grown = 2 * 2 * 4 * 8  # k and v are twice as wide now
    assert parameter_bytes(workload, mesh, student, "float32", ("tensor",)) == 4 * (
        (KERNELS + grown + EMBEDDING) // 2 + NORMS
    )


def test_recomputing_keeps_only_the_residual_stream(run_of):
    without, with_remat = (
        estimate(run_of("v5e-4", train=train(remat))) for remat in ("none", "layer")
    )
    deeper = dataclasses.replace(
        with_remat.workload, student=dataclasses.replace(with_remat.workload.student, num_layers=5)
    )
    kept = kept_activations(with_remat.workload)
    assert kept_activations(deeper) - kept == 3 * 32 * 8 * 2  # layers x tokens x width, bfloat16
    assert kept_activations(without.workload) > 4 * kept
    assert with_remat.bounds["update"].flops > without.bounds["update"].flops


def train(remat):
    return TrainConfig(prompts_per_step=8, gradient_accumulation_steps=2, remat=remat)


def test_work_of_a_step(run_of):
    """8 rows of 32 tokens: the update's three passes through kernels and attention, three products
    with the head and the teacher's one.
    """
    plan = estimate(run_of("v5e-4"))
    trunk = 8 * 32 * (2 * KERNELS + 4 * 2 * 32 * 8)
    assert plan.bounds["update"].flops == 3 * trunk + 3 * 2 * 8 * 16 * 32 * 8 + 2 * 8 * 16 * 32 * 16
    assert plan.bounds["update"].seconds >= plan.bounds["update"].flops / 4 / 197e12
    assert plan.bounds["sample"].is_by_memory


def test_only_splash_attention_skips_what_lies_before_a_window(run_of):
    """Of 32 columns, one of the teacher's two layers attends to 4."""
    workload = run_of("v5e-4")

    def flops(attention):
        changes = {"layer_windows": (4, NO_WINDOW), "attention": attention}
        teacher = dataclasses.replace(workload.teacher, **changes)
        bounds = estimate(dataclasses.replace(workload, teacher=teacher)).bounds
        assert bounds["sample"] == plan.bounds["sample"]
        return bounds["teacher"].flops

    plan = estimate(workload)
    assert flops("xla") == plan.bounds["teacher"].flops
    assert flops("xla") - flops("splash") == 8 * 32 * 4 * (32 - 4) * 2 * 8


def test_experts_are_all_held_and_some_used(run_of):
    """Two of four experts of a token, each of the size of the MLP that they replace."""
    workload, mlp = run_of("v5e-4"), 3 * 128
    changes = {"num_experts": 4, "experts_per_token": 2}
    student = dataclasses.replace(workload.student, **changes)
    router = 4 * 8
    total = KERNELS + 2 * (3 * mlp + router) + NORMS + EMBEDDING
    assert num_parameters(student) == total
    assert num_parameters(student, of_token=True) == total - 2 * 2 * mlp
    dense, plan = estimate(workload), estimate(dataclasses.replace(workload, student=student))
    more = plan.bounds["update"].flops - dense.bounds["update"].flops
    assert more == 3 * 2 * 2 * (mlp + router) * 8 * 32
    held = sizes(plan, "backward")["experts of a layer, gathered, and their gradient"]
    assert held == 2 * 4 * mlp * 2
    assert plan.held("backward") > dense.held("backward")


def test_what_does_not_fit_is_named(run_of):
    plan = estimate(run_of("v5e-4"))
    assert fits(plan)
    small = dataclasses.replace(plan.workload.topology.chip, hbm_bytes=plan.held("teacher"))
    tight = dataclasses.replace(
        plan.workload, topology=dataclasses.replace(plan.workload.topology, chip=small)
    )
    plan = estimate(tight)
    assert not fits(plan)
    assert "teacher holds" not in verdict(plan)
    total = 0
    for item in (item for item in plan.items if "loss" in item.phases):
        total += item.num_bytes
        if total > small.hbm_bytes:
            break
    held = sizes(plan, "loss")
    largest = max(held, key=held.get)
    first = f"the first item that does not fit is {item.name!r}, the largest is {largest!r}"
    assert first in next(line for line in verdict(plan).splitlines() if "loss holds" in line)


def test_the_states_of_other_optimizers(run_of):
    """One moment of lion, three of ademamix, four of adan, none of sgd; muon has one of its kernels
    and two of the rest.
    """

    def held(name):
        return sizes(estimate(run_of("v5e-4", optimizer=OptimizerConfig(name=name))), "backward")

    kept = held("adamw")["student's trained parameters, float32"]
    for name, count in {"adamw": 2, "lion": 1, "ademamix": 3, "adan": 4}.items():
        assert held(name)["optimizer's state"] == count * kept
    assert "optimizer's state" not in held("sgd")
    muon, coefficients = held("muon"), 3 * 4
    state = 4 * (KERNELS // 2 + 2 * (EMBEDDING // 2 + NORMS)) + coefficients
    assert muon["optimizer's state"] == state
    # The largest kernel is one of the MLP, 8 x 16 in two layers, over two devices.
    assert muon["Muon's products of a matrix, all layers"] == 4 * (2 * 128 + 3 * 2 * 64)


@pytest.mark.long
@pytest.mark.parametrize(
    ("estimator", "optimizer"),
    [
        (EstimatorConfig("vopd"), "adamw"),
        (EstimatorConfig("npd"), "adamw"),
        (EstimatorConfig("grpo", reference_kl_coef=0.1), "adamw"),
        (EstimatorConfig("opd"), "muon"),
    ],
    ids=lambda x: getattr(x, "recipe", x),
)
def test_the_arguments_are_those_of_the_compiled_update(estimator, optimizer):
    """The mini pair on eight simulated devices, parameters split over four of them."""
    config = Config(
        data=DataConfig(max_prompt_length=16),
        sampling=SamplingConfig(2, max_completion_length=16),
        estimator=estimator,
        optimizer=OptimizerConfig(name=optimizer),
        train=TrainConfig(prompts_per_step=4),
        evaluation=EvaluationConfig(source=None),
        mesh=MeshConfig(data=2, fsdp=4),
    )
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, dtype="float32"),
    )
    workload = read_workload(config, topology("v5e-8"))
    on_devices = dataclasses.replace(workload, layout=make_mesh(2, 4))
    program, _ = measure("update", lower_update(on_devices), workload)
    counted = [item for item in estimate(workload).items if "loss" in (item.received_by or ())]
    # Of the state: steps, skipped, in a row, and the optimizer's two (of each of muon's parts).
    counters = {"adamw": 5, "muon": 7}[optimizer] * 4
    assert sum(item.num_bytes for item in counted) + counters == program.argument_bytes
    assert any(
        each.kind == "reduce-scatter" or each.kind == "all-reduce" for each in program.collectives
    )
    assert program.most_logit_rows <= min(TILE, workload.micro_rows * workload.columns)


def test_adapters_alone_are_trained(run_of):
    """Rank 2 on q and down: A 2 x 8 and B 8 x 2, A 2 x 16 and B 8 x 2, in two layers; `fsdp` splits
    neither rank nor heads.
    """
    lora = LoraConfig(rank=2, targets=("q", "down"))
    workload = run_of("v5e-4", lora=lora)
    plan, whole = estimate(workload), estimate(run_of("v5e-4"))
    update = sizes(plan, "loss") | sizes(plan, "backward")
    adapters = 2 * (2 * 8 + 8 * 2 + 2 * 16 + 8 * 2)
    assert adapters * 4 / 2 <= update["student's trained parameters, float32"] <= adapters * 4
    assert update["optimizer's state"] == 2 * update["student's trained parameters, float32"]
    assert update["student's frozen parameters"] == 2 * ((KERNELS + EMBEDDING) // 2 + NORMS)
    assert not {"head's gradient, summed in float32", "head's gradient"} & set(update)
    # The frozen ones are sharded for training and replicated for sampling.
    assert update["published copy of the student"] > 2 * (KERNELS + NORMS + EMBEDDING)
    assert plan.bounds["update"].flops < whole.bounds["update"].flops


def test_a_fused_attention_holds_no_scores(run_of):
    workload = run_of("v5e-4")
    fused = dataclasses.replace(
        workload, student=dataclasses.replace(workload.student, attention="splash")
    )
    plain, fused = (
        sizes(estimate(each), "backward")["a layer's activations, backward"]
        for each in (workload, fused)
    )
    assert plain - fused == 2 * 32 * 32 * (2 * 4 + 2)  # two heads, 32 x 32 columns


PAIRS = TrainConfig(prompts_per_step=4, gradient_accumulation_steps=2)
PENALISED = {"sampling": SamplingConfig(2, max_completion_length=16), "train": PAIRS}


def penalised(run_of, recipe="grpo", coef=0.1, **sections):
    return estimate(
        run_of(
            "v5e-4",
            estimator=EstimatorConfig(recipe, reference_kl_coef=coef),
            **PENALISED,
            **sections,
        )
    )


def test_a_reference_is_a_second_frozen_student(run_of):
    """It is held whole at all times, reads every row once, and adds a column to the batch;
    advantages are counted with or without.
    """
    plan, plain = penalised(run_of), penalised(run_of, coef=None)
    size = 2 * ((KERNELS + EMBEDDING) // 2 + NORMS)
    for phase in ("sample", "teacher", "loss"):
        assert sizes(plan, phase)["reference's parameters"] == size
        assert not any("teacher's parameters" in name for name in sizes(plan, phase))
    column = 2 * 32 * 4
    assert (
        plan.held("loss") - plain.held("loss")
        == size + sizes(plan, "loss")["batch: ids, mask, log-probabilities"]
    )
    taught = estimate(run_of("v5e-4", recipe="opd", **PENALISED))
    batch = sizes(taught, "loss")["batch: ids, mask, log-probabilities"]
    assert sizes(plan, "loss")["batch: ids, mask, log-probabilities"] == batch + column
    trunk = 8 * 32 * (2 * KERNELS + 4 * 2 * 32 * 8)
    assert plan.bounds["teacher"].flops == trunk + 2 * 8 * 16 * 32 * 8
    assert plain.bounds["teacher"].flops == 0
    assert plan.bounds["update"] == plain.bounds["update"]


def test_with_adapters_the_reference_is_the_frozen_student(run_of):
    lora = LoraConfig(rank=2, targets=("q", "down"))
    plan, plain = penalised(run_of, lora=lora), penalised(run_of, coef=None, lora=lora)
    assert not any("reference" in name for name in sizes(plan, "loss"))
    assert plan.bounds["teacher"].flops > plain.bounds["teacher"].flops == 0
    frozen = sizes(plan, "teacher")["student's frozen parameters"]
    assert plan.program_bytes("teacher") >= frozen > 0
