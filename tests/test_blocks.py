import functools as ft
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    FEATURES,
    STATE,
    TIME,
    Leaky,
    assert_close,
    assert_equal,
    changed,
    draw,
    gelu,
    glu,
    lru,
    nan_padded,
    normalise,
    numbers,
)
from jaxtyping import Array

import discretax
from discretax import Timeseries
from discretax.blocks import BatchNorm, StandardBlock
from discretax.channel_mixers import GLU, IdentityChannelMixer
from discretax.models import Backbone
from discretax.sequence_mixers import AbstractSequenceMixer, Bidirectional, LRUSequenceMixer

pytestmark = pytest.mark.slow

NORMS = ("batch", "layer", "rms", None)
BATCH, MOMENTUM = 3, 0.95
LENGTHS = np.array([TIME, 4, 7])

SmallLRU = ft.partial(LRUSequenceMixer, state_dim=STATE)


def make(sequence_mixer=SmallLRU, channel_mixer=GLU, **options):
    options = {"drop_rate": 0.0, "norm": "layer"} | options
    return eqx.nn.make_with_state(StandardBlock)(
        FEATURES,
        jr.key(0),
        sequence_mixer=sequence_mixer,
        channel_mixer=channel_mixer,
        **options,
    )


def train(layer, state, x, **options):
    return jax.vmap(
        ft.partial(layer, **options), axis_name="batch", in_axes=(0, None), out_axes=(0, None)
    )(x, state)


train_jit = eqx.filter_jit(train)
run = eqx.filter_jit(lambda layer, state, x: layer(x, state)[0])


def statistics(x, lengths=None):
    """Mean and variance of every feature over batch and time."""
    x = numbers(x)
    lengths = [x.shape[1]] * len(x) if lengths is None else lengths
    valid = np.concatenate([xi[:n] for xi, n in zip(x, lengths, strict=True)])
    return valid.mean(0), valid.var(0)


def running(layer, state):
    mean, var, weight = (numbers(leaf) for leaf in state.get(layer.statistics))
    return mean / weight, var / weight


def formula(block, norm, x, lengths, given=None):
    """The block on a batch of arrays, and the statistics that its norm met."""
    met = None

    def norm_of(sequences):
        nonlocal met
        met = statistics_of_list(sequences) if given is None else given
        return [normalise(norm, block.norm, u, met) for u in sequences]

    skip = [numbers(xi[:n]) for xi, n in zip(x, lengths, strict=True)]
    u = norm_of(skip) if block.prenorm else skip
    u = [glu(block.channel_mixer, gelu(lru(block.sequence_mixer, ui))) for ui in u]
    y = [s + ui for s, ui in zip(skip, u, strict=True)]
    return (y if block.prenorm else norm_of(y)), met


def statistics_of_list(sequences):
    together = np.concatenate(sequences)
    return together.mean(0), together.var(0)


every_norm = pytest.mark.parametrize("norm", NORMS)
every_order = pytest.mark.parametrize("prenorm", [True, False])
precisions = pytest.mark.parametrize("x64, rtol", [(False, 1e-5), (True, 1e-12)])


@every_norm
@every_order
@precisions
def test_training_formula(norm, prenorm, x64, rtol):
    block, state = make(norm=norm, prenorm=prenorm)
    with jax.enable_x64(x64):
        block = changed(block, dtype=float if x64 else None)
        state = jax.tree.map(lambda leaf: leaf.astype(float), state)
        x = 1 + 2 * draw(BATCH, TIME, FEATURES)
        padded = jax.vmap(nan_padded)(x, jnp.asarray(LENGTHS))
        y, new_state = train_jit(block, state, padded)
        expected, met = formula(block, norm, x, LENGTHS)
        for i, n in enumerate(LENGTHS):
            assert_close(y.values[i, :n], expected[i], rtol=rtol)
        if norm == "batch":
            assert_close(running(block.norm, new_state), met, rtol=rtol)
        else:
            assert_equal(new_state, state)


@every_norm
@every_order
@precisions
def test_inference_formula(norm, prenorm, x64, rtol):
    block, state = make(norm=norm, prenorm=prenorm)
    mean, var = np.array([0.5, -1, 0, 2]), np.array([0.5, 2, 1, 4])
    with jax.enable_x64(x64):
        block = changed(block, dtype=float if x64 else None)
        x = draw(TIME, FEATURES)
        if norm == "batch":
            stored = tuple(jnp.asarray(0.3 * leaf, float) for leaf in (mean, var, np.ones(())))
            state = eqx.tree_at(lambda s: s.get(block.norm.statistics), state, stored)
        y = run(eqx.nn.inference_mode(block), state, x)
        expected, _ = formula(block, norm, [x], [TIME], given=(mean, var))
        assert_close(y, expected[0], rtol=rtol)


@pytest.mark.slow
@every_norm
def test_float32_parameters_take_float64_activations(norm):
    block, state = make(norm=norm)
    with jax.enable_x64(True):
        x = draw(BATCH, TIME, FEATURES)
        y, new_state = train_jit(block, state, x)
        expected, _ = formula(block, norm, x, [TIME] * BATCH)
        assert y.dtype == jnp.float64
        assert_close(y, np.stack(expected), rtol=1e-6)
        assert run(eqx.nn.inference_mode(block), state, x[0]).dtype == jnp.float64
    same_type = lambda old, new: old.dtype == new.dtype
    assert all(jax.tree.leaves(jax.tree.map(same_type, state, new_state)))


@pytest.mark.slow
@every_norm
@every_order
def test_bfloat16(norm, prenorm):
    block, state = make(norm=norm, prenorm=prenorm)
    x = 1 + 2 * draw(BATCH, TIME, FEATURES)
    y, new_state = train_jit(block, state, x.astype(jnp.bfloat16))
    y_float32, new_state_float32 = train_jit(block, state, x)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), y_float32, rtol=2e-2)
    assert_close(new_state, new_state_float32, rtol=2e-2)


# Batch norm


def make_norm(**options):
    return eqx.nn.make_with_state(BatchNorm)(FEATURES, **options)


def test_batch_norm_whitens_a_batch():
    layer, state = make_norm()
    y, _ = train(layer, state, 3 + 2 * draw(BATCH, TIME, FEATURES))
    mean, var = statistics(y)
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(var, 1, rtol=1e-5)


def test_running_averages_are_exactly_weighted():
    layer, state = make_norm()
    met = []
    for step in range(3):
        x = step + (1 + step) * draw(BATCH, TIME, FEATURES, seed=step)
        _, state = train(layer, state, x)
        met.append(statistics(x))
        weights = MOMENTUM ** np.arange(step, -1, -1)
        expected = [
            np.average(leaves, axis=0, weights=weights) for leaves in zip(*met, strict=True)
        ]
        assert_close(running(layer, state), expected)


def test_momentum_is_the_weight_of_the_past():
    layer, state = make_norm(momentum=0.0)
    for seed in (1, 2):
        x = seed + draw(BATCH, TIME, FEATURES, seed=seed)
        _, state = train(layer, state, x)
    assert_close(running(layer, state), statistics(x))


def test_inference_uses_the_running_averages_and_leaves_them():
    layer, state = make_norm(eps=1e-3)
    layer = changed(layer)
    x = 3 + 2 * draw(BATCH, TIME, FEATURES)
    _, state = train(layer, state, x)
    other = draw(TIME, FEATURES, seed=2)
    mean, var = statistics(x)
    expected = (numbers(other) - mean) / np.sqrt(var + 1e-3)
    y, new_state = eqx.nn.inference_mode(layer)(other, state)
    assert_close(y, expected * numbers(layer.weight) + numbers(layer.bias))
    assert_equal(new_state, state)


def test_inference_before_any_training_step_is_the_affine_map_alone():
    layer, state = make_norm()
    layer = changed(layer)
    x = draw(TIME, FEATURES)
    y, _ = eqx.nn.inference_mode(layer)(x, state)
    expected = numbers(x) / np.sqrt(1 + 1e-5) * numbers(layer.weight) + numbers(layer.bias)
    assert_close(y, expected)


def test_offset_much_larger_than_the_spread():
    layer, state = make_norm()
    x = 1000 + 0.1 * draw(BATCH, TIME, FEATURES)
    _, state = train(layer, state, x)
    mean, var = running(layer, state)
    assert_close(mean, statistics(x)[0], rtol=1e-6)
    assert_close(var, statistics(x)[1], rtol=1e-3)  # E[x^2] - E[x]^2 would be wrong by 600%


def test_batch_norm_gradient_sees_the_whole_batch():
    """The mean of a batch-normalised batch is the bias, whatever the samples."""
    layer, state = make_norm()
    x = draw(BATCH, TIME, FEATURES)
    grad = jax.grad(lambda x: train(layer, state, x)[0].sum())(x)
    np.testing.assert_allclose(grad, 0, atol=1e-5)
    assert np.abs(jax.grad(lambda x: train(layer, state, x)[0][0].sum())(x)).max() > 0.1


def test_a_batch_of_padding_alone_is_no_batch():
    layer, state = make_norm()
    lengths = jnp.zeros(BATCH, int)
    x = draw(BATCH, TIME, FEATURES)
    _, state = train(layer, state, x)
    y, new_state = jax.vmap(
        lambda x, state, length: layer(x, state, length=length),
        axis_name="batch",
        in_axes=(0, None, 0),
        out_axes=(0, None),
    )(x, state, lengths)
    assert np.isfinite(y).all()
    assert_equal(new_state, state)


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True])
def test_missing_axis_name(batched):
    block, state = make(norm="batch")
    x = draw(BATCH, TIME, FEATURES)
    with pytest.raises(
        ValueError, match=r'axis_name="batch".*`eqx\.nn.inference_mode.*norm="layer"'
    ):
        if batched:
            jax.vmap(block, in_axes=(0, None), out_axes=(0, None))(x, state)
        else:
            block(x[0], state)


# Dropout

DROP_RATE = 0.25


@ft.cache
def make_dropping():
    """x + drop(drop(gelu(x))): a block around identities."""
    block, state = make(channel_mixer=IdentityChannelMixer, norm=None, drop_rate=DROP_RATE)
    mixer = block.sequence_mixer
    identity = eqx.tree_at(
        lambda m: (m.C_re, m.C_im, m.D),
        mixer,
        (jnp.zeros_like(mixer.C_re), jnp.zeros_like(mixer.C_im), jnp.ones_like(mixer.D)),
    )
    return eqx.tree_at(lambda b: b.sequence_mixer, block, identity), state


@eqx.filter_jit
def masks(block, state, keys):
    """(keys, time, features): what each feature is multiplied by, from ones in and gelu(1) out."""
    x = jnp.ones((TIME, FEATURES))
    y = jax.vmap(lambda key: block(x, state, key=key)[0])(keys)
    return (y - x[None]) / jax.nn.gelu(x)[None]


@pytest.mark.parametrize("inference", [False, True])
def test_batch_norm_by_itself_knows_padding(inference):
    norm, state = eqx.nn.make_with_state(BatchNorm)(FEATURES)
    norm = eqx.nn.inference_mode(norm, inference)
    x = draw(1, TIME, FEATURES)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(arguments, state, length):
        norm, x = arguments
        normalise = lambda x: norm(x, state, length=length)[0][:5]
        return jnp.sum(jnp.sin(jax.vmap(normalise, axis_name="batch")(x)))

    padded = jnp.where(jnp.arange(TIME)[:, None] < 5, x, jnp.nan)
    value, (d_norm, d_x) = loss((norm, padded), state, 5)
    assert_close((value, (d_norm, d_x[:, :5])), loss((norm, x[:, :5]), state, None))
    assert_equal(d_x[:, 5:], jnp.zeros((1, TIME - 5, FEATURES)))


def test_one_mask_for_all_of_time():
    mask = masks(*make_dropping(), jr.split(jr.key(1), 2000))
    np.testing.assert_array_equal(mask, np.broadcast_to(mask[:, :1], mask.shape))


def test_dropout_keeps_the_expectation():
    mask = numbers(masks(*make_dropping(), jr.split(jr.key(1), 2000)))[:, 0]
    kept = (1 - DROP_RATE) ** 2  # twice, independently
    assert_close(np.unique(mask.round(4)), np.array([0, 1 / kept]), rtol=1e-3)
    standard_error = np.sqrt((1 / kept - 1) / mask.size)
    assert abs(mask.mean() - 1) < 4 * standard_error
    between_features = np.corrcoef(mask.T)[np.triu_indices(FEATURES, 1)]
    assert np.abs(between_features).max() < 4 / np.sqrt(len(mask))


def test_dropout_depends_on_the_key_alone():
    key, other = jr.key(1), jr.key(2)
    mask = masks(*make_dropping(), jnp.stack([key] * 8 + [other] * 8))
    assert_equal(mask[:8], np.broadcast_to(mask[0], (8, TIME, FEATURES)))
    again = masks(*make_dropping(), jnp.stack([key, other] * 8))
    assert_equal(again[:2], mask[jnp.array([0, 8])])
    assert not np.array_equal(again[0], again[1])


def test_no_dropout_in_inference_mode_and_none_at_rate_zero():
    block, state = make_dropping()
    x = draw(TIME, FEATURES)
    expected = numbers(x) + gelu(numbers(x))
    assert_close(run(eqx.nn.inference_mode(block), state, x), expected)
    without = eqx.tree_at(lambda b: b.dropout, block, eqx.nn.Dropout(0))
    assert_close(run(without, state, x), expected)


def test_dropout_without_a_key():
    block, state = make_dropping()
    with pytest.raises(
        ValueError, match=r"drop_rate=0.25\).* key=key.*inference_mode.*drop_rate=0"
    ):
        block(draw(TIME, FEATURES), state)


# Mixers


def test_mixers_may_be_given_ready_made():
    sequence_mixer, channel_mixer = SmallLRU(FEATURES, jr.key(5)), GLU(FEATURES, jr.key(6))
    block, _ = make(sequence_mixer, channel_mixer)
    assert_equal(block.sequence_mixer, sequence_mixer)
    assert_equal(block.channel_mixer, channel_mixer)


def test_bidirectional_sees_the_future():
    make_mixer = lambda n, *, key: Bidirectional(*(SmallLRU(n, k) for k in jr.split(key)))
    block, state = make(make_mixer, norm=None)
    x, length = draw(TIME, FEATURES), 7
    mixer, valid = block.sequence_mixer, numbers(x[:length])
    both = lru(mixer.forward, valid) + lru(mixer.backward, valid[::-1])[::-1]
    expected = valid + glu(block.channel_mixer, gelu(both))
    assert_close(run(block, state, nan_padded(x, length)).values[:length], expected)


def test_bidirectional_trains_but_does_not_stream():
    make_mixer = lambda n, *, key: Bidirectional(*(SmallLRU(n, k) for k in jr.split(key)))
    block, state = make(make_mixer, norm="batch")
    x = draw(BATCH, TIME, FEATURES)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(block):
        y, _ = train(block, state, x)
        return jnp.mean((y - jnp.roll(x, -2, axis=1)) ** 2)  # the future, two samples ahead

    losses = []
    for _ in range(15):
        value, grad = loss(block)
        losses.append(float(value))
        block = eqx.apply_updates(block, jax.tree.map(lambda g: -0.1 * g, grad))
    assert losses[-1] < 0.8 * losses[0]

    with pytest.raises(ValueError, match=r"`Bidirectional` cannot stream.*causal"):
        discretax.inference_state(block, state)
    live = discretax.streaming_mode(eqx.nn.inference_mode(block))
    with pytest.raises(ValueError, match="no inference cache for `StandardBlock`"):
        live(x[0], state)


def test_a_block_takes_a_mixer_that_the_library_does_not_know():
    block, state = make(Leaky)
    x = draw(TIME, FEATURES)
    y = run(block, state, x)
    halves = Timeseries(jnp.concatenate([x, x])[:TIME], resets=jnp.arange(TIME) == 0)
    assert_close(run(block, state, halves).values, y)


def test_a_backbone_passes_the_activation_on():
    model = Backbone(
        jr.key(0), hidden_dim=4, num_blocks=2, sequence_mixer=SmallLRU, activation=jnp.tanh
    )
    assert [block.activation for block in model.blocks] == [jnp.tanh] * 2


class Twofold(AbstractSequenceMixer[tuple[Array, Array]]):
    """Two mixers side by side: an output twice as wide as the input."""

    first: LRUSequenceMixer
    second: LRUSequenceMixer
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, in_features, key):
        self.first, self.second = (SmallLRU(in_features, k) for k in jr.split(key))
        self.in_features = in_features

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        mixers = (self.first, self.second)
        return tuple(m.allocate_inference_cache(batch_size, max_seqlen, dtype) for m in mixers)

    def __call__(self, x, cache=None, *, integration_timesteps=None, key=None, **options):
        assert integration_timesteps is None
        cache = self.allocate_inference_cache() if cache is None else cache
        first, first_cache = self.first(x, cache[0], **options)
        second, second_cache = self.second(x, cache[1], **options)
        return jnp.concatenate([first, second], axis=-1), (first_cache, second_cache)

    def step(self, x, cache, *, integration_timestep=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    "channel_mixer", [GLU, GLU(8, jr.key(1), out_features=4)], ids=["made", "given"]
)
def test_a_wide_mixer_is_led_back_by_the_channel_mixer(channel_mixer):
    block, state = make(Twofold, channel_mixer)
    block = changed(block)
    x = draw(TIME, FEATURES)
    u = normalise("layer", block.norm, x)
    both = (block.sequence_mixer.first, block.sequence_mixer.second)
    mixed = np.concatenate([lru(mixer, u) for mixer in both], axis=-1)
    assert_close(run(block, state, x), numbers(x) + glu(block.channel_mixer, gelu(mixed)))


def test_a_wide_mixer_streams_and_drops():
    block, state = make(Twofold, drop_rate=0.5)
    x = draw(TIME, FEATURES)
    evaluate = eqx.nn.inference_mode(block)
    live = discretax.streaming_mode(evaluate)
    stream = discretax.inference_state(block, state)
    first, stream = live(x[:5], stream)
    second, _ = live(x[5:], stream)
    assert_close(jnp.concatenate([first, second]), run(evaluate, state, x))
    drop = eqx.filter_jit(lambda key: block(x, state, key=key)[0])
    assert np.abs(drop(jr.key(1)) - drop(jr.key(2))).max() > 0.1


ERF = np.vectorize(math.erf)


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation, formula",
    [
        (None, lambda x: x),
        (jnp.tanh, np.tanh),
        (
            ft.partial(jax.nn.gelu, approximate=False),
            lambda x: x / 2 * (1 + ERF(x / np.sqrt(2))),
        ),
    ],
    ids=["none", "tanh", "exact gelu"],
)
def test_activation(activation, formula):
    with jax.enable_x64(True):
        block, state = make(activation=activation)
        block = changed(block, dtype=float)
        x = draw(TIME, FEATURES)
        mixed = lru(block.sequence_mixer, normalise("layer", block.norm, x))
        expected = numbers(x) + glu(block.channel_mixer, formula(mixed))
        assert_close(run(block, state, x), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"norm": "group"},
            ValueError,
            "`norm` must be 'batch', 'layer', 'rms', None or a function .*; got 'group'",
        ),
        ({"drop_rate": 1.0}, ValueError, r"`drop_rate` must lie in \[0, 1\); got 1.0"),
        ({"drop_rate": -0.1}, ValueError, r"`drop_rate` must lie in \[0, 1\); got -0.1"),
        ({"drop_rate": float("nan")}, ValueError, r"`drop_rate` must lie in \[0, 1\); got nan"),
        ({"dropout": 0.1}, TypeError, "dropout"),
        (
            {"sequence_mixer": lambda n, *, key: SmallLRU(n + 1, key)},
            ValueError,
            "`sequence_mixer` must have .*in_features=4; got LRUSequenceMixer of width 5",
        ),
        (
            {"channel_mixer": lambda n, *, key: GLU(3, key)},
            ValueError,
            "`channel_mixer` must have .*in_features=4; got GLU of width 3",
        ),
        (
            {"sequence_mixer": Twofold, "channel_mixer": GLU(FEATURES, jr.key(0))},
            ValueError,
            "`channel_mixer` must have .*in_features=8; got GLU of width 4",
        ),
        (
            {"sequence_mixer": Twofold, "channel_mixer": GLU(8, jr.key(0))},
            ValueError,
            "`channel_mixer` must lead to .*in_features=4.*got GLU with out_features=8",
        ),
        (
            {"sequence_mixer": Twofold, "channel_mixer": IdentityChannelMixer},
            ValueError,
            "cannot change the width; got in_features=8 and out_features=4",
        ),
        ({"activation": "gelu"}, TypeError, "`activation` must be None or a .*; got 'gelu'"),
        ({"activation": GLU}, TypeError, "`activation` must be None or a .*; got .*GLU"),
        (
            {"activation": eqx.nn.PReLU()},
            TypeError,
            "without parameters; got an instance of `PReLU`",
        ),
    ],
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize("out_features", [1, 8])
def test_a_channel_mixer_to_another_width_does_not_fit_into_a_residual(out_features):
    with pytest.raises(ValueError, match=f"`channel_mixer`.*GLU.*{out_features}"):
        block, state = make(channel_mixer=ft.partial(GLU, out_features=out_features))
        block(draw(TIME, FEATURES), state)


@pytest.mark.parametrize("in_features", [0, 4.0])
def test_width_is_a_whole_number_from_one(in_features):
    with pytest.raises(ValueError, match=f"`in_features` must be .* got {in_features}"):
        StandardBlock(in_features, jr.key(0), sequence_mixer=SmallLRU, channel_mixer=GLU)


@pytest.mark.slow
@pytest.mark.parametrize(
    "x, message",
    [
        (jnp.zeros(FEATURES), r"one sequence.*got \(4,\)\. .*`x\[None\]`"),
        (jnp.zeros((BATCH, TIME, FEATURES)), r"one sequence.*got \(3, 11, 4\). Use `jax.vmap`"),
        (jnp.zeros((TIME, 3)), r"size 4; got float32\(11, 3\)"),
        (jnp.zeros((TIME, FEATURES), jnp.int32), "floating.*got int32"),
    ],
)
def test_samples_that_are_refused(x, message):
    block, state = make()
    with pytest.raises(ValueError, match=f"`StandardBlock` takes .*{message}"):
        block(x, state)
