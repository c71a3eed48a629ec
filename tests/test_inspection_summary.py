"""What a model is made of. Everything is traced, and nothing compiled."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import CASES, FEATURES

from discretax import Sequential, Timeseries, discretized, inference_state, models
from discretax.architectures import LanguageModel, UNet
from discretax.channel_mixers import GLU
from discretax.encoder import EmbeddingEncoder, LinearEncoder
from discretax.heads import ClassificationHead
from discretax.inspection import summary
from discretax.rates import Downsample
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    LRUSequenceMixer,
    S5SequenceMixer,
)

pytestmark = pytest.mark.slow


def shapes(make, *args, **options):
    return eqx.filter_eval_shape(ft.partial(make, *args, **options), key=jr.key(0))


def size(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact))


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def operations(make, *args, **options):
    return summary(shapes(make, *args, **options)).total.operations


def lines(model, *args, **options):
    return {line.path: line for line in summary(model, *args, **options).layers}


thorough = lambda case: [pytest.mark.thorough] if case.has_another_of_its_class else []
every_case = [pytest.param(case, id=str(case), marks=thorough(case)) for case in CASES]


@pytest.mark.parametrize("case", every_case)
def test_totals_of_every_mixer(case):
    mixer = shapes(case.make)
    total = summary(mixer).total
    assert total.parameters == size(mixer)
    assert total.kind == type(mixer).__name__
    assert total.operations > 0 or case.name == "IdentitySequenceMixer"
    if case.streams:
        cache = eqx.filter_eval_shape(lambda mixer: mixer.allocate_inference_cache(), mixer)
        assert total.cache == cache
        assert total.cache_bytes == nbytes(cache)
    else:
        assert total.cache is None and total.cache_bytes is None


@pytest.mark.parametrize(
    "name",
    [
        "S5",  # batch norms, whose running averages are in the state
        "Griffin",
        "RWKV7",  # two caches in a block
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("LRU", "HGRN2", "Mamba", "XLSTM")
        ),
    ],
)
def test_totals_of_models(name):
    make = ft.partial(getattr(models, name), hidden_dim=64, num_blocks=1)
    model, state = shapes(eqx.nn.make_with_state(make))
    total = summary(model).total
    assert total.parameters == size(model)
    live = eqx.filter_eval_shape(inference_state, model, state)
    assert total.cache_bytes == nbytes(live) - nbytes(state)
    # The initial values of the state are no parameters, whether they stand in the model or not.
    assert summary(shapes(make)).total == total


def test_operations_of_linear_maps():
    m, n = 3, 5
    assert operations(eqx.nn.Linear, n, m) == 2 * m * n + m
    assert operations(eqx.nn.Linear, n, m, use_bias=False) == 2 * m * n
    assert operations(LinearEncoder, n, m) == 2 * m * n
    assert operations(EmbeddingEncoder, n, m) == 0
    two = 2 * (2 * n * n + n)
    assert operations(GLU, n) == two + n + n  # the sigmoid, and the product


def test_operations_of_the_lru():
    state, guards = 6, 2  # numbers that say whether a sample is finite: of the output, of the state
    expected = {
        "B": 2 * 2 * state * FEATURES,
        "recurrence": 6 * state + 2 * state,  # a complex product and sum
        "C": 2 * 2 * state * FEATURES,
        "D": 2 * FEATURES,
    }
    found = operations(LRUSequenceMixer, FEATURES, state_dim=state)
    assert found == sum(expected.values()) + guards


def test_what_is_made_of_parameters_alone_is_not_counted():
    """The step of an S5 is made of its parameters by exponentials; discretised, they are done."""
    mixer = shapes(S5SequenceMixer, FEATURES, state_dim=6)
    found = summary(mixer).total.operations
    assert found == summary(eqx.filter_eval_shape(discretized, mixer)).total.operations
    assert found == operations(LRUSequenceMixer, FEATURES, state_dim=3)  # one of each pair


def test_loops_count_as_often_as_they_turn():
    """The same for each of many samples, but for the guards, whose cost is shared."""
    mixer = shapes(LRUSequenceMixer, FEATURES, state_dim=3)
    one = summary(mixer).total.operations
    for time in (40, 5000):  # within a chunk, and several
        x = jax.ShapeDtypeStruct((time, FEATURES), jnp.float32)
        found = summary(mixer, x)
        assert found.samples == time
        assert one - 2 < found.total.operations < one


def test_each_line_is_the_sum_of_those_within_it_and_its_own():
    def make(key):
        encoder_key, model_key, head_key = jr.split(key, 3)
        return Sequential(
            encoder=LinearEncoder(3, 4, key=encoder_key),
            model=models.LRU(hidden_dim=4, num_blocks=2, state_dim=3, key=model_key),
            head=ClassificationHead(4, 5, key=head_key),
        )

    found = lines(shapes(make))
    parts = [found[f".layers[{i}]"] for i in range(3)]
    for name in ("parameters", "cache_bytes", "operations"):
        assert getattr(found[""], name) == sum(getattr(part, name) for part in parts)
    block = found[".layers[1].blocks[1]"]
    assert (block.kind, block.depth) == ("StandardBlock", 2)
    inner = [found[f"{block.path}.{name}"] for name in ("norm", "sequence_mixer", "channel_mixer")]
    activation, residual = 8 * 4, 4  # of the approximate GELU
    assert block.operations == sum(line.operations for line in inner) + activation + residual
    assert inner[0].operations == 4 * 4  # each feature less mean, by deviation, weight and bias
    assert block.cache_bytes == inner[1].cache_bytes == 2 * 3 * 4
    # A linear map within a layer that does not call it, but uses its weight.
    assert found[f"{inner[2].path}.w1"].operations == 2 * 4 * 4 + 4


def test_table():
    def make(key):
        return eqx.nn.Sequential(
            [
                LinearEncoder(3, 4, key=key),
                models.LRU(hidden_dim=4, num_blocks=1, state_dim=2, key=key),
            ]
        )

    assert str(summary(shapes(make), depth=2)).splitlines() == [
        "layer           class          parameters  cache   bytes  operations",
        "--------------------------------------------------------------------",
        "model           Sequential            102             16         246",
        "  .layers[0]    LinearEncoder          12              0          24",
        "    .linear     Linear                 12              0          24",
        "  .layers[1]    LRU                    90             16         222",
        "    .blocks[0]  StandardBlock          90  (2, 2)     16         222",
        "--------------------------------------------------------------------",
        "Each line has what is within it.",
        "Cache: of one stream, max_seqlen=1.",
        "Operations: floating point, per sample, 1 at a time.",
    ]


def test_a_tied_weight_is_counted_once():
    make = ft.partial(
        LanguageModel, vocab_size=50, hidden_dim=4, num_blocks=1, pattern=(LRUSequenceMixer,)
    )
    tied, untied = (lines(shapes(make, tie_embeddings=tie)) for tie in (True, False))
    assert untied[""].parameters - tied[""].parameters == 50 * 4
    assert tied[".head"].operations == untied[".head"].operations >= 2 * 50 * 4


def test_caches_that_grow_with_time():
    make = ft.partial(
        LanguageModel,
        vocab_size=50,
        hidden_dim=4,
        num_blocks=1,
        pattern=(ft.partial(AttentionSequenceMixer, num_heads=2),),
    )
    model = shapes(make)
    short, long = (summary(model, max_seqlen=n).total for n in (10, 1010))
    assert long.cache_bytes - short.cache_bytes == 1000 * (2 * 4 * 4 + 1)  # keys, values, a flag
    assert long.operations - short.operations >= 1000 * 2 * 2 * 4  # scores, and sums of values
    narrow = summary(model, max_seqlen=10, dtype=jnp.bfloat16).total
    assert short.cache_bytes - narrow.cache_bytes == 10 * 2 * 4 * 2
    tokens = jax.ShapeDtypeStruct((10,), jnp.int32)
    assert summary(model, tokens).max_seqlen == 10


def test_of_a_model_that_cannot_stream():
    model = shapes(models.LRU, hidden_dim=4, num_blocks=1, state_dim=3, bidirectional=True)
    found = lines(model)
    assert found[""].cache_bytes is None
    mixer = found[".blocks[0].sequence_mixer"]
    both = [found[f"{mixer.path}.{name}"] for name in ("forward", "backward")]
    assert all(line.cache_bytes == 2 * 3 * 4 for line in both)
    assert mixer.operations >= sum(line.operations for line in both)
    assert "cannot stream" in str(summary(model))


def test_a_call_may_be_of_any_number_of_samples():
    """With an example, it is the model that is called, which takes more than its streaming form does."""
    net = shapes(UNet, 2, 3, widths=(4, 4), strides=(4,), sequence_mixer=LRUSequenceMixer)
    some, full = (lines(net, jnp.ones((time, 2))) for time in (10, 12))
    assert some[".head"].operations == full[".head"].operations > 0
    coarse, of_full = some[".bottleneck"].operations, full[".bottleneck"].operations
    np.testing.assert_allclose(10 * coarse, 12 * of_full)  # three windows each
    assert coarse > 0
    with pytest.raises(ValueError, match=r"takes one sequence.*got \(3, 12, 2\)"):
        summary(net, jnp.ones((3, 12, 2)))
    windows = Downsample(2, 4)
    padded = summary(windows, Timeseries(jnp.ones((10, 2)), length=3))
    assert padded.total.operations > 0 and padded.total.cache_bytes == 1


def test_layers_behind_a_downsample_are_called_less_often():
    def make(key):
        windows = [Downsample(4, stride, how="stride") for stride in (2, 3)]
        return Sequential([*windows, LinearEncoder(4, 6, key=key)])

    found = summary(shapes(make))
    assert found.samples == found.max_seqlen == 6  # a window of windows
    assert found.layers[-2].path == ".layers[2]"
    assert found.layers[-2].operations == 2 * 4 * 6 / 6
    net = shapes(UNet, 2, 3, widths=(4, 4), strides=(2,), sequence_mixer=LRUSequenceMixer)
    assert summary(net).total.parameters == size(net)


class Two(eqx.Module):
    """A model of one's own, which takes sequences and no state."""

    mixer: LRUSequenceMixer
    linear: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.linear)(self.mixer(x)[0])


def test_of_models_of_others():
    def make(key):
        return Two(LRUSequenceMixer(4, key, state_dim=3), eqx.nn.Linear(4, 2, key=key))

    found = lines(shapes(make))
    assert found[".linear"].operations == 2 * 2 * 4 + 2
    assert found[""].cache_bytes == 2 * 3 * 4

    make = lambda key: eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=key), eqx.nn.Lambda(jnp.tanh)])
    assert operations(make) == 2 * 3 * 4 + 4 + 4

    make = lambda key: eqx.nn.Sequential(
        [LinearEncoder(3, 4, key), eqx.nn.BatchNorm(4, "batch", mode="ema")]
    )
    model, _ = shapes(eqx.nn.make_with_state(make))
    with pytest.raises(ValueError, match=r"model\.layers\[1\].*`summary\(model, state=state\)`"):
        summary(model)


def test_an_example_with_timesteps():
    model = shapes(models.S5, hidden_dim=4, num_blocks=1, state_dim=4)
    x = Timeseries(jnp.ones((8, 4)), timesteps=jnp.ones(8))
    # The step changes from sample to sample, and is no longer made of parameters alone.
    for layer in (model, shapes(S5SequenceMixer, 4, state_dim=4)):
        assert summary(layer, x).total.operations > summary(layer, x.values).total.operations


def test_of_the_state_of_the_model():
    make = ft.partial(models.S5, hidden_dim=4, num_blocks=1, state_dim=4)  # with a batch norm
    model, state = shapes(eqx.nn.make_with_state(make))
    x = jnp.ones((7, 4))
    assert summary(model, x, state) == summary(model, x)
    live = eqx.filter_eval_shape(inference_state, model, state, batch_size=3)
    assert summary(model, x, live) == summary(model, x)
    nothing = shapes(eqx.nn.make_with_state(GLU), 4)
    assert summary(nothing[0], state=nothing[1]) == summary(nothing[0])
    with pytest.raises(ValueError, match=r"knows no layer of this `GLU`, which keeps nothing"):
        summary(nothing[0], state=state)
    other, _ = shapes(eqx.nn.make_with_state(models.LRU), hidden_dim=4, num_blocks=1)
    with pytest.raises(ValueError, match=r"knows no layer of this `LRU`\. "):
        summary(other, state=state)
    with pytest.raises(TypeError, match=r"`summary\(model, state=state\)`"):
        summary(model, state)


def ensemble():
    one = shapes(LRUSequenceMixer, 4)
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros((2, *leaf.shape), np.float32)), one)


@pytest.mark.parametrize(
    ("call", "error", "rule"),
    [
        (lambda: summary(LinearEncoder), TypeError, "got the class `LinearEncoder`"),
        (lambda: summary([shapes(GLU, 4)]), TypeError, r"`discretax\.Sequential"),
        (
            lambda: summary(eqx.nn.LayerNorm(4)),
            ValueError,
            r"got LayerNorm\. Give it an example, `summary\(model, x\)`",
        ),
        (lambda: summary(shapes(GLU, 4), jnp.ones(())), ValueError, r"at least one .* got \(\)"),
        (lambda: summary(shapes(GLU, 4), jnp.ones((0, 4))), ValueError, r"got \(0, 4\)"),
        (lambda: summary(shapes(GLU, 4), [1, 2]), TypeError, r"`x` must be .*got \[1, 2\]"),
        (lambda: summary(shapes(GLU, 4), 3), TypeError, r"`x` must be .*got 3\."),
        (lambda: summary(shapes(GLU, 4), []), TypeError, r"`x` must be .*got \[\]"),
        (lambda: summary(shapes(GLU, 4), state=3), TypeError, r"`eqx\.nn\.State`; got 3"),
        (lambda: summary(shapes(GLU, 4), dtype="foo"), TypeError, "`dtype` must .*got 'foo'"),
        (lambda: summary(shapes(GLU, 4), max_seqlen=0), ValueError, "`max_seqlen` must be"),
        (lambda: summary(shapes(GLU, 4), depth=-1), ValueError, "`depth` must be"),
        (
            lambda: summary(Sequential([ensemble()])),
            ValueError,
            "not an ensemble",
        ),
    ],
)
def test_bad_input(call, error, rule):
    with pytest.raises(error, match=rule):
        call()


def test_an_error_of_the_model_says_what_it_was_called_with():
    make = lambda key: eqx.nn.Sequential(
        [eqx.nn.Lambda(lambda x: x[:2]), eqx.nn.Linear(3, 4, key=key)]
    )
    with pytest.raises(TypeError) as caught:
        summary(shapes(make))
    assert caught.value.__notes__[-1].startswith(
        "`summary` called the model with float32(1, 3), which"
    )
