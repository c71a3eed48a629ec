"""Classifier and UNet: what they are made of, causality, resets, padding, and streams."""

import functools as ft
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    FEATURES,
    STATE,
    assert_close,
    assert_equal,
    downsampled,
    draw,
    linear,
    numbers,
    upsampled,
)

import discretax
from discretax import Timeseries
from discretax.architectures import Classifier, UNet
from discretax.channel_mixers import IdentityChannelMixer
from discretax.encoder import EmbeddingEncoder, PatchEncoder
from discretax.models import DeepBackbone, remat_blocks
from discretax.sequence_mixers import LRUSequenceMixer, S5SequenceMixer
from discretax.testing import check_streaming

pytestmark = pytest.mark.slow

TIME, STRIDES, MULTIPLE = 14, (2, 2), 4
RESETS = np.isin(np.arange(TIME), [5, 8])  # within a window of either rate, and at one's beginning
options = {
    "sequence_mixer": ft.partial(LRUSequenceMixer, state_dim=STATE),
    "channel_mixer": IdentityChannelMixer,  # what acts on each sample alone takes time to compile
    "norm": None,
    "strides": STRIDES,
    "widths": (3, 4, 5),
    "blocks_per_stage": 1,
    "drop_rate": 0.0,
}
COARSE = {"strides": (MULTIPLE,), "widths": (3, 4)}
make_unet = ft.partial(UNet, FEATURES, 2, jr.key(0), **options)
make_classifier = ft.partial(Classifier, FEATURES, 6, jr.key(0), **options)


def made(make, **others):
    return eqx.nn.make_with_state(make)(**others)


@pytest.fixture(scope="module")
def unet():
    return made(make_unet)


@pytest.fixture(scope="module")
def classifier():
    return made(make_classifier)


@eqx.filter_jit
def call(model, x, state, key=None):
    return model(x, state, key=key)


def run(model_and_state, x):
    return call(model_and_state[0], x, model_and_state[1])[0]


@eqx.filter_jit
def jacobian(model, state, x, resets=None):
    """What each output owes to each sample: (time, time)."""
    with_resets = lambda values: values if resets is None else Timeseries(values, resets=resets)
    owed = jax.jacrev(lambda values: model(with_resets(values), state)[0])(x)
    return jnp.abs(owed).sum((1, 3))


# What they are made of


@pytest.mark.parametrize("skip, upsample, depth", [("add", "linear", 2), ("concat", "repeat", 1)])
def test_a_unet_is_its_parts(skip, upsample, depth):
    rates = {"widths": (3, 4, 5)[: depth + 1], "strides": STRIDES[:depth]}
    model, state = made(make_unet, skip=skip, upsample=upsample, **rates)
    stage = lambda blocks, u: numbers(call(blocks, jnp.asarray(u, jnp.float32), state)[0])
    x = draw(TIME, FEATURES)
    u, skips = linear(model.encoder.linear, x), []
    for blocks, downsample in zip(model.down_stages, model.downsamples, strict=True):
        skips.append(stage(blocks, u))
        u = downsampled(downsample, skips[-1])
    u = stage(model.bottleneck, u)
    for i in reversed(range(depth)):
        skipped = skips[i]
        u = upsampled(model.upsamples[i], u, len(skipped))
        if skip == "add":
            u = skipped + u
        else:
            u = linear(model.joins[i], np.concatenate([skipped, u], -1))
        u = stage(model.up_stages[i], u)
    assert_close(run((model, state), x), linear(model.head.pooled_linear.linear, u), 2e-5)


def test_a_classifier_is_its_parts(classifier):
    model, state = classifier
    stage = lambda blocks, u: numbers(call(blocks, jnp.asarray(u, jnp.float32), state)[0])
    x = draw(TIME, FEATURES)
    u = stage(model.stages[0], linear(model.encoder.linear, x))
    for downsample, blocks in zip(model.downsamples, model.stages[1:], strict=True):
        u = stage(blocks, downsampled(downsample, u))
    logits = linear(model.head.pooled_linear.linear, u.mean(0))
    assert_close(run(classifier, x), logits - np.log(np.exp(logits).sum()), 2e-5)


def test_other_encoders_and_other_ways_to_run():
    tokens = jnp.arange(TIME) % FEATURES
    model, state = made(make_classifier, encoder=EmbeddingEncoder)
    assert model.encoder.embedding.weight.shape == (FEATURES, 3)
    assert run((model, state), tokens).shape == (6,)
    patches = ft.partial(PatchEncoder, patch_size=3)
    model, state = made(make_unet, encoder=patches, widths=(3,), strides=())
    assert run((model, state), draw(TIME, FEATURES)).shape == (5, 2)
    again = remat_blocks(model)
    assert isinstance(again.bottleneck, DeepBackbone)
    assert_close(
        run((again, state), draw(TIME, FEATURES)), run((model, state), draw(TIME, FEATURES))
    )


def test_dropout_draws_in_every_stage():
    model, state = made(make_unet, drop_rate=0.5)
    dropped = [call(model, draw(TIME, FEATURES), state, jr.key(i))[0] for i in (0, 0, 1)]
    assert_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])


# Who looks where


def test_no_answer_looks_ahead(unet):
    owed = jacobian(*unet, draw(TIME, FEATURES))
    assert not np.triu(owed, 1).any()
    assert np.tril(owed).all(where=np.tri(TIME, dtype=bool))


def test_not_causal_is_ahead_to_the_end_of_the_window():
    owed = np.asarray(jacobian(*made(make_unet, causal=False), draw(TIME, FEATURES)))
    windows = np.arange(TIME) // MULTIPLE
    allowed = windows[None] <= windows[:, None]
    assert not owed[~allowed].any()
    assert owed[allowed].all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequences_are_apart_wherever_a_reset_is(bidirectional):
    model = made(make_unet, bidirectional=bidirectional, activation=None)
    owed = np.asarray(jacobian(*model, draw(TIME, FEATURES), RESETS))
    sequences = np.cumsum(RESETS)
    together = sequences[None] == sequences[:, None]
    assert not owed[~together].any()
    if bidirectional:
        assert owed[0, 3] and owed[13, 9] and owed[9, 13]
    assert owed[3, 0] and owed[7, 5] and owed[13, 8]


def test_nothing_broken_gets_past_a_reset(unet, classifier):
    values = draw(TIME, FEATURES)
    broken = values.at[3].set(jnp.nan)
    of = lambda values, resets: Timeseries(values, resets=resets)
    y = run(unet, of(broken, RESETS))
    assert np.isnan(y[4]).all()
    assert_equal(y[5:], run(unet, of(values, RESETS))[5:])
    assert_equal(run(classifier, of(broken, RESETS)), run(classifier, of(values, RESETS)))


def test_any_length(unet):
    """What is causal answers the first samples as if no others came."""
    x = draw(TIME, FEATURES)
    y = run(unet, x)
    assert y.shape == (TIME, 2)
    for length in (1, 7, 12):
        padded = Timeseries(x.at[length:].set(jnp.nan), length=length)
        assert_close(run(unet, padded)[:length], y[:length])


@pytest.mark.parametrize("make", [make_unet, make_classifier])
def test_a_padded_batch_is_single_runs(make):
    model, state = made(make, bidirectional=True, **COARSE)
    lengths, x = (TIME, 9), draw(2, TIME, FEATURES)
    batch = discretax.pad([row[:n] for row, n in zip(x, lengths, strict=True)])
    y, _ = eqx.filter_jit(discretax.batched(model))(batch, state)
    for row, answers, n in zip(x, y, lengths, strict=True):
        answers = answers if make is make_classifier else answers[:n]
        assert_close(answers, run((model, state), row[:n]))


def test_resets_at_windows_are_separate_runs(classifier):
    x = draw(TIME, FEATURES)
    packed = Timeseries(x, resets=np.arange(TIME) == 8)
    assert_close(run(classifier, packed), run(classifier, x[8:]))


def test_gaps_of_two_are_an_interval_twice_as_long():
    """At every rate."""
    models = [
        made(
            make_classifier,
            sequence_mixer=ft.partial(S5SequenceMixer, state_dim=4, step_rescale=rescale),
            **COARSE,
        )
        for rescale in (1.0, 2.0)
    ]
    gaps = [Timeseries(draw(8, FEATURES), gap * jnp.ones(8)) for gap in (2.0, 1.0)]
    by_gaps, by_interval = map(run, models, gaps)
    assert_close(by_gaps, by_interval)
    assert np.abs(by_gaps - run(models[0], gaps[1])).max() > 1e-3


# Streams


def test_a_unet_streams(unet):
    check_streaming(*unet, draw(5 * MULTIPLE, FEATURES), multiple=MULTIPLE)


def test_a_classifier_streams():
    classifier = made(make_classifier, **COARSE)
    check_streaming(*classifier, draw(5 * MULTIPLE, FEATURES), multiple=MULTIPLE)


def test_a_stream_may_end_anywhere(unet):
    """Step by step with `live`, two streams side by side, of which the last chunk is padded."""
    model, state = unet
    x = draw(2, TIME, FEATURES)
    step, stream = discretax.live(model, state, batch_size=2)
    answers = []
    for start in range(0, TIME, MULTIPLE):
        chunk = discretax.pad(list(x[:, start : start + MULTIPLE]), multiple_of=MULTIPLE)
        y, stream = step(chunk, stream)
        answers.append(y)
    whole = jnp.stack([run(unet, row) for row in x])
    assert_close(jnp.concatenate(answers, axis=1)[:, :TIME], whole)


def test_gradients_of_chunks_are_those_of_the_whole():
    model, state = made(make_unet, **COARSE)
    live, empty = discretax.streaming_mode(model), discretax.inference_state(model, state)
    x = draw(2 * MULTIPLE, FEATURES)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradients(model, cuts):
        ys, stream = [], empty if cuts else state
        for chunk in jnp.split(x, cuts):
            y, stream = model(chunk, stream)
            ys.append(y)
        return jnp.sum(jnp.sin(jnp.concatenate(ys)))

    whole = jax.tree.leaves(gradients(model, ()))
    assert_close(jax.tree.leaves(gradients(live, (MULTIPLE,))), whole)


def test_types_are_kept(unet):
    y = run(unet, draw(TIME, FEATURES).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("make", [make_unet, make_classifier])
def test_what_is_saved_is_read_again(make, unet, classifier):
    file, saved = io.BytesIO(), unet if make is make_unet else classifier
    eqx.tree_serialise_leaves(file, saved)
    file.seek(0)
    other = made(ft.partial(make.func, *make.args[:2], jr.key(1), **options))
    read = eqx.tree_deserialise_leaves(file, other)
    assert_equal(eqx.filter(read, eqx.is_array), eqx.filter(saved, eqx.is_array))


# What is refused


@pytest.mark.parametrize(
    "others, error, message",
    [
        (
            {"strides": (2,)},
            ValueError,
            r"one more number than `strides`.*\(3, 4, 5\) and .*\(2,\)",
        ),
        ({"strides": (2, 0)}, ValueError, r"`strides\[1\]` must be a whole number .*; got 0"),
        ({"strides": 2}, TypeError, r"`strides` must be a sequence .*`\(4, 4\)`; got 2"),
        ({"widths": "345"}, TypeError, "`widths` must be a sequence .*; got '345'"),
        ({"blocks_per_stage": 0}, ValueError, "`blocks_per_stage` must be .*; got 0"),
        (
            {"downsample": "sum", "widths": (3,), "strides": ()},
            ValueError,
            "`downsample` must be one of 'stride', .*; got 'sum'",
        ),
        ({"encoder": None}, TypeError, "`encoder` must be a function .*; got None"),
        ({"encoder": lambda *_, key: 3}, TypeError, "`encoder` must be .*; it made 3"),
        ({"sequence_mixer": None}, TypeError, "`sequence_mixer` must be a function .*; got None"),
    ],
)
def test_what_makes_no_model(others, error, message):
    for make in make_unet, make_classifier:
        with pytest.raises(error, match=message):
            make(**others)


def test_skips_that_are_refused():
    with pytest.raises(ValueError, match="`skip` must be one of 'add', 'concat'; got 'sum'"):
        make_unet(skip="sum")
    with pytest.raises(ValueError, match="`upsample` must be one of 'repeat', 'linear'; got 'sum'"):
        make_unet(upsample="sum", widths=(3,), strides=())


@pytest.mark.parametrize("make, name", [(make_unet, "UNet"), (make_classifier, "Classifier")])
def test_chunks_that_do_not_fit(make, name):
    model, state = made(make)
    live, stream = discretax.streaming_mode(model), discretax.inference_state(model, state)
    with pytest.raises(
        ValueError,
        match=rf"a multiple of 4 samples for `{name}` with strides of \(2, 2\); got 6. Gather 8 ",
    ):
        live(draw(6, FEATURES), stream)
    with pytest.raises(ValueError, match=r"takes one sequence.*\(4, 8, .*`jax.vmap`"):
        live(draw(4, 8, FEATURES), stream)
    with pytest.raises(ValueError, match=f"`{name}` needs the model's state"):
        model(draw(6, FEATURES), None)
    with pytest.raises(ValueError, match="at least one sample"):
        model(draw(0, FEATURES), state)


@pytest.mark.parametrize("make", [make_unet, make_classifier])
def test_both_directions_do_not_stream(make):
    model, state = made(make, bidirectional=True)
    with pytest.raises(ValueError, match="`Bidirectional` cannot stream: its output depends on"):
        discretax.inference_state(model, state)
