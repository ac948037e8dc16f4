import pytest
from hypothesis import given
from hypothesis import strategies as st
from prunescope.probes.recipe import METHODS, Count, Layers, Ratio, Recipe, RecipeError

drops = st.sampled_from(["attn-drop", "mlp-drop", "block-drop"])
zeroing = st.sampled_from(["magnitude", "wanda", "sparsegpt", "random"])
rounding = st.sampled_from(["rtn", "gptq", "awq"])
steps = st.one_of(
    st.builds("{}@{}".format, drops, st.integers(1, 99)),
    st.builds(lambda m, ls: f"{m}@layers={','.join(map(str, ls))}", drops, st.lists(st.integers(0, 99), min_size=1, max_size=5)),
    st.builds("{}@{}-{}{}".format, drops, st.integers(1, 99), st.sampled_from(["kl", "var-r"]), st.sampled_from(["", "-iterative"])),
    st.builds("block-drop@{}-angular".format, st.integers(1, 99)),
    st.builds("joint-drop@{}".format, st.integers(1, 99)),
    st.builds("{}@{}".format, zeroing, st.floats(0.001, 0.999)),
    st.builds("{}@{}:{}".format, zeroing, st.integers(1, 4), st.integers(5, 16)),
    st.builds("{}@int{}".format, rounding, st.integers(2, 8)),
    st.builds("{}@int{}-g{}".format, rounding, st.integers(2, 8), st.integers(8, 256)),
    st.builds("{}@int4-keep={}.{},mlp.0".format, rounding, st.sampled_from(["attn", "mlp"]), st.integers(0, 99)),
    st.sampled_from(["torchao@int8", "torchao@int4-g32", "bitsandbytes@nf4", "bitsandbytes@int8-keep=attn.3"]),
)  # fmt: skip


@given(st.lists(steps, min_size=1, max_size=3).map("+".join))
def test_a_recipe_prints_and_parses_back(text):
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_has_an_example_that_parses(method):
    recipe = Recipe.parse(METHODS[method].example)
    assert recipe.steps[0].method == method
    assert str(recipe) == METHODS[method].example


def test_amounts_are_values():
    assert Recipe.parse("attn-drop@8").steps[0].amount == Count(8)
    assert Recipe.parse("attn-drop@layers=7,3,3").steps[0].amount == Layers((3, 7))
    assert Recipe.parse("magnitude@0.50").steps[0].amount == Ratio(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atn-drop@8", "unknown method 'atn-drop'; did you mean 'attn-drop@5'"),
        ("magnitud@0.5", "did you mean 'magnitude@0.5'"),
        ("attn-drop", "needs an amount"),
        ("attn-drop@0", "number of sublayers from 1"),
        ("attn-drop@-3", "number of sublayers from 1"),
        ("block-drop@2-angular-iterative", "number of sublayers from 1"),
        ("attn-drop@2-angular", "ranked by cosine, kl, var-r"),
        ("wanda@4:2", "2 of every 4 stay"),
        ("magnitude@1.0", "between 0 and 1"),
        ("magnitude@half", "between 0 and 1"),
        ("rtn@int8-keep=mlp29", "keep=attn.3,mlp.29"),
        ("mlp-drop@2-keep=mlp.3", "name the layers instead"),
        ("rtn@int1", "int2 to int8"),
        ("rtn@int4-g2", "int2 to int8"),
        ("", "unknown method ''"),
        ("attn-drop@2+", "unknown method ''"),
    ],
)
def test_typos_are_named_with_what_is_allowed(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


@pytest.mark.parametrize(
    ("recipe", "seeded"),
    [
        ("random@0.5", "random@0.5,seed=3"),
        ("random@2:4,seed=1", "random@2:4,seed=1"),
        ("neurons-reverse@0.1,target=kinds", "neurons-reverse@0.1,target=kinds,seed=3"),
        ("attn-drop@2+random@0.1", "attn-drop@2+random@0.1,seed=3"),
        ("wanda@0.5", "wanda@0.5"),
    ],
)
def test_a_seed_goes_where_chance_plays(recipe, seeded):
    found = Recipe.parse(recipe).seeded(3)
    assert str(found) == seeded
    assert Recipe.parse(seeded) == found


@pytest.mark.parametrize("recipe", ["random@0.5,seed=", "random@2,seed=1", "wanda@0.5,seed=1"])
def test_seeds_that_cannot_be(recipe):
    with pytest.raises(RecipeError, match="amount"):
        Recipe.parse(recipe)
