"""The algebra of sweeps: pure lists in, points with stable ids out."""

import dataclasses

import pytest

from opdjax.config import Config, EstimatorConfig, OptimizerConfig
from opdjax.config.grid import Overrides, arms, chain, points, product, seeds, vary, zipped
from opdjax.config.validation import ConfigError

RATES = vary("optimizer.learning_rate", (1e-4, 3e-4))
RECIPES = vary(
    "estimator", {"opd": EstimatorConfig(recipe="opd"), "vopd": EstimatorConfig(recipe="vopd")}
)


def ids(sweep, base=Config()):  # noqa: B008
    return [point.id for point in points(base, sweep)]


def test_product_makes_every_combination_the_last_fastest():
    made = points(Config(), product(RECIPES, RATES, seeds(2)))
    assert [point.id for point in made[:3]] == [
        "estimator=opd,learning_rate=0.0001,seed=0",
        "estimator=opd,learning_rate=0.0001,seed=1",
        "estimator=opd,learning_rate=0.0003,seed=0",
    ]
    assert len(made) == 8
    assert made[-1].config == Config(
        estimator=EstimatorConfig(recipe="vopd"),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        seed=1,
    )
    assert made[-1].overrides == {"estimator": "vopd", "learning_rate": "0.0003", "seed": "1"}


def test_zipped_pairs_entries():
    assert ids(zipped(RECIPES, RATES)) == [
        "estimator=opd,learning_rate=0.0001",
        "estimator=vopd,learning_rate=0.0003",
    ]
    with pytest.raises(
        ConfigError, match=r"zipped sweeps have \[2, 3\] entries; expected the same number in each"
    ):
        zipped(RATES, seeds(3))


def test_chain_keeps_what_stands_in_several_sweeps_once():
    common = product(RECIPES, vary("optimizer.learning_rate", (3e-4,)), seeds(2))
    assert len(chain(product(RECIPES, RATES, seeds(2)), common)) == 8
    assert chain(seeds(2), seeds(3)) == seeds(3)


def test_an_id_does_not_depend_on_the_sweep_around_it():
    alone = ids(product(RECIPES[:1], RATES[:1], seeds(1)))[0]
    assert alone in ids(chain(vary("train.num_steps", (3, 4)), product(RECIPES, RATES, seeds(5))))


def test_a_section_comes_before_its_fields_whatever_the_order():
    gammas = vary("estimator.discount", (0.5,))
    for sweep in (product(RECIPES, gammas), product(gammas, RECIPES)):
        assert [point.config.estimator for point in points(Config(), sweep)] == [
            EstimatorConfig(recipe="opd", discount=0.5),
            EstimatorConfig(recipe="vopd", discount=0.5),
        ]


def test_fields_that_need_each_other_are_checked_together():
    """Neither order of the two is valid alone: sft refuses student rollouts, opd the teacher's."""
    made = points(
        Config(),
        product(
            vary("estimator", {"sft": EstimatorConfig(recipe="sft")}),
            vary("sampling.completions_from", ("teacher",)),
        ),
    )
    assert made[0].config.sampling.completions_from == "teacher"


def test_names_are_the_shortest_ending_that_no_other_field_has():
    assert ids(vary("student.path", ("a",))) == ["student.path=a"]
    assert ids(vary("sampling.temperature", (1.0,))) == ["sampling.temperature=1"]
    assert ids(vary("train.num_steps", (2,))) == ["num_steps=2"]
    assert ids([Overrides()]) == ["base"]


def test_values_that_do_not_fit_a_file_name_stay_apart():
    found = ids(vary("student.path", ("a/b", "a:b", "a b")))
    assert len(set(found)) == 3
    assert all("/" not in name and ":" not in name for name in found)
    long = ids(vary("student.path", ("x" * 300 + "1", "x" * 300 + "2")))
    assert len(set(long)) == 2
    assert max(map(len, long)) < 200


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: vary("optimizer.learning_rat", (1,)),
            "'optimizer.learning_rat', which is no field; did you mean 'optimizer.learning_rate'?",
        ),
        (lambda: product(seeds(2), seeds(2)), r"sets \['seed'\] twice"),
        (
            lambda: points(Config(), vary("seed", (-1,))),
            "the point seed=-1 of the sweep: seed is -1; expected from 0",
        ),
        (
            lambda: points(Config(), vary("estimator.recipe", ("opdd",))),
            "the point recipe=opdd of the sweep: estimator.recipe is 'opdd'",
        ),
        (lambda: points(Config(), vary("estimator", (3,))), "the point estimator=3 of the sweep"),
        (
            lambda: points(Config(), vary("optimizer.learning_rate", (0.1234567, 0.1234568))),
            "two different points of the sweep have the id 'learning_rate=0.123457'",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_equal_configs_asked_for_in_other_words_are_one_point():
    """A second run of one config and seed would count as two."""
    again = product(RATES, vary("train.prompts_per_step", (16, 64)), seeds(2))
    made = points(Config(), chain(product(RATES, seeds(2)), again))
    assert len(made) == len({point.config for point in made}) == 8


@pytest.mark.parametrize("order", [1, -1])
def test_fields_of_one_section_are_checked_together(order):
    factors = [
        vary("estimator.baseline", ("student_topk",)),
        vary("estimator.support_top_k", (5,)),
    ]
    (point,) = points(Config(), product(*factors[::order]))
    assert point.config.estimator == EstimatorConfig(baseline="student_topk", support_top_k=5)


def test_a_point_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        points(Config(), seeds(1))[0].id = "other"


def test_an_arm_sets_several_fields_under_one_name():
    both = arms(
        {
            "plain": {"estimator": EstimatorConfig("opd")},
            "long": {"estimator": EstimatorConfig("opd"), "train.num_steps": 7},
        }
    )
    made = points(Config(), product(arms({"mini": {}}, "pair"), both, seeds(2)))
    assert [point.id for point in made] == [
        f"pair=mini,arm={arm},seed={seed}" for arm in ("plain", "long") for seed in (0, 1)
    ]
    assert made[2].overrides == {"pair": "mini", "arm": "long", "seed": "0"}
    assert [point.config.train.num_steps for point in made[1:3]] == [Config().train.num_steps, 7]


def test_arms_are_refused_under_the_name_of_a_field_or_with_a_field_that_is_none():
    with pytest.raises(ConfigError, match="'seed' is a field"):
        arms({"a": {}}, "seed")
    with pytest.raises(ConfigError, match="'learning_rate' is a field"):  # as ids call it
        arms({"a": {}}, "learning_rate")
    with pytest.raises(ConfigError, match="learning_rat"):
        arms({"a": {"optimizer.learning_rat": 1.0}})


def test_arms_and_fields_of_them_that_are_varied_too_do_not_mix():
    with pytest.raises(ConfigError, match="twice"):
        product(arms({"a": {"train.num_steps": 3}}), vary("train.num_steps", (4,)))
