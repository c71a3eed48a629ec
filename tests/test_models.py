import functools as ft
import inspect
import io
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
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
    leaky,
    lru,
    numbers,
    parameters,
)
from jax import lax

from discretax.blocks import StandardBlock
from discretax.channel_mixers import GLU, MLPChannelMixer
from discretax.encoder import EmbeddingEncoder, LinearEncoder
from discretax.heads import ClassificationHead, RegressionHead
from discretax.models import LRU, Backbone
from discretax.sequence_mixers import LRUSequenceMixer

pytestmark = pytest.mark.slow

WIDTH, CLASSES, BATCH = 4, 3, 3
NORMS = ("batch", "layer", "rms", None)


def make_model(seed=0, norm="batch", drop_rate=0.1):
    encoder_key, model_key, head_key = jr.split(jr.key(seed), 3)
    return eqx.nn.Sequential(
        [
            LinearEncoder(FEATURES, encoder_key, out_features=WIDTH),
            LRU(
                model_key,
                hidden_dim=WIDTH,
                num_blocks=2,
                state_dim=STATE,
                drop_rate=drop_rate,
                norm=norm,
            ),
            ClassificationHead(WIDTH, CLASSES, head_key),
        ]
    )


@ft.cache
def make(seed=0, norm="batch", drop_rate=0.1):
    return eqx.nn.make_with_state(make_model)(seed, norm, drop_rate)


def train(model, state, x, keys):
    run = lambda x, state, key: model(x, state, key=key)
    return jax.vmap(run, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(
        x, state, keys
    )


@eqx.filter_jit
def evaluate(model, state, x):
    return jax.vmap(lambda x: eqx.nn.inference_mode(model)(x, state)[0])(x)


@eqx.filter_jit
def loss_and_gradient(model, state, x, keys):
    def loss(model):
        y, new_state = train(model, state, x, keys)
        return -jnp.mean(y[:, 0]), new_state

    (value, new_state), grad = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return value, new_state, grad


def keys_of(seed):
    return jr.split(jr.key(seed), BATCH)


# Signature


def test_documented_signature_of_lru():
    expected = {
        "hidden_dim": inspect.Parameter.empty,
        "num_blocks": 4,
        "state_dim": 64,
        "r_min": 0.0,
        "r_max": 1.0,
        "max_phase": 2 * math.pi,
        "drop_rate": 0.1,
        "prenorm": True,
        "use_bias": True,
        "norm": "batch",
        "channel_mixer": None,
        "activation": jax.nn.gelu,
        "bidirectional": False,
    }
    key, *options = inspect.signature(LRU).parameters.values()
    assert (key.name, key.kind) == ("key", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert key.default is inspect.Parameter.empty
    assert {option.kind for option in options} == {inspect.Parameter.KEYWORD_ONLY}
    assert {option.name: option.default for option in options} == expected


def test_options_reach_their_places():
    model = LRU(
        jr.key(0),
        hidden_dim=5,
        num_blocks=3,
        state_dim=200,
        r_min=0.8,
        r_max=0.9,
        max_phase=0.5,
        drop_rate=0.3,
        prenorm=False,
        use_bias=False,
        norm="rms",
    )
    assert len(model.blocks) == 3
    for i in range(3):
        block = model.blocks[i]
        assert isinstance(block, StandardBlock)
        assert isinstance(block.norm, eqx.nn.RMSNorm)
        assert isinstance(block.channel_mixer, GLU)
        assert block.channel_mixer.w1.bias is None
        assert block.channel_mixer.w2.bias is None
        assert (block.in_features, block.prenorm, block.dropout.p) == (5, False, 0.3)
        A_bar, _, _ = block.sequence_mixer.discretize()
        assert A_bar.shape == (200,)
        radius, phase = np.abs(A_bar), np.angle(A_bar)
        assert 0.8 - 1e-6 <= radius.min() < 0.82
        assert 0.88 < radius.max() <= 0.9 + 1e-6
        assert 0 <= phase.min() < 0.05
        assert 0.45 < phase.max() <= 0.5 + 1e-6


def test_key_by_position_or_by_name():
    options = {"hidden_dim": WIDTH, "num_blocks": 1, "state_dim": STATE}
    by_position, by_name = LRU(jr.key(3), **options), LRU(key=jr.key(3), **options)
    assert_equal(parameters(by_position), parameters(by_name))
    options = {"hidden_dim": WIDTH, "num_blocks": 1, "sequence_mixer": Leaky}
    by_position, by_name = Backbone(jr.key(3), **options), Backbone(key=jr.key(3), **options)
    assert_equal(parameters(by_position), parameters(by_name))


@pytest.mark.parametrize("cls", [LRU, ft.partial(Backbone, sequence_mixer=Leaky)])
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_block": 2}, TypeError, "unexpected keyword argument 'num_block'"),
        ({"num_blocks": 0}, ValueError, "`num_blocks` must be a whole number .* got 0"),
        ({"hidden_dim": 0}, ValueError, "`hidden_dim` must be a whole number .* got 0"),
        ({"hidden_dim": 4.0}, ValueError, "`hidden_dim` must be a whole number .* got 4.0"),
        ({"drop_rate": 1}, ValueError, r"`drop_rate` must lie in \[0, 1\); got 1"),
        ({"norm": "instance"}, ValueError, "`norm` must be 'batch', .* got 'instance'"),
    ],
)
def test_options_that_are_refused(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(jr.key(0), **{"hidden_dim": WIDTH} | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"state_dim": 0}, "`state_dim` must be a whole number .* got 0"),
        ({"r_min": 0.9, "r_max": 0.5}, "r_min <= r_max.*got r_min=0.9 and r_max=0.5"),
        ({"r_max": 1.1}, "r_max <= 1.*got r_min=0.0 and r_max=1.1"),
        ({"max_phase": 0.0}, "`max_phase` must be positive, in radians; got 0.0"),
    ],
)
def test_options_that_lru_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LRU(jr.key(0), hidden_dim=WIDTH, **options)


# Training


def test_documented_snippet_trains_under_plain_jit():
    keys = jr.split(jr.key(0), 3)
    encoder = LinearEncoder(in_features=784, out_features=64, key=keys[0])
    model = LRU(hidden_dim=64, num_blocks=4, key=keys[1])
    head = ClassificationHead(in_features=64, out_features=10, key=keys[2])
    full_model = eqx.nn.Sequential([encoder, model, head])
    state = eqx.nn.State(full_model)

    batch = 10
    labels = jnp.arange(batch)
    x = draw(batch, 6, 784)
    params, static = eqx.partition(full_model, eqx.is_inexact_array)
    optimiser = optax.adam(1e-3)

    @jax.jit
    def step(params, state, opt_state, key):
        def loss(params):
            model = eqx.combine(params, static)
            y, new_state = train(model, state, x, jr.split(key, batch))
            return -jnp.mean(y[labels, labels]), new_state

        (value, state), grad = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser.update(grad, opt_state, params)
        return eqx.apply_updates(params, updates), state, opt_state, value

    opt_state, losses = optimiser.init(params), []
    for seed in range(8):
        params, state, opt_state, value = step(params, state, opt_state, jr.key(seed))
        losses.append(float(value))
    assert abs(losses[0] - math.log(10)) < 1  # a guess among ten
    assert losses[-1] < 0.5 * losses[0]

    trained = eqx.nn.inference_mode(eqx.combine(params, static))
    y, _ = jax.jit(jax.vmap(trained, in_axes=(0, None), out_axes=(0, None)))(x, state)
    np.testing.assert_allclose(np.exp(y).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_activations_and_float32_parameters(norm):
    model, state = make(norm=norm, drop_rate=0.0)
    model = changed(model)
    x, keys = 1 + draw(BATCH, TIME, FEATURES), keys_of(0)
    value, new_state, grad = loss_and_gradient(model, state, x.astype(jnp.bfloat16), keys)
    value_float32, state_float32, _ = loss_and_gradient(model, state, x, keys)
    assert_close(value, value_float32, rtol=2e-2)
    assert_close(new_state, state_float32, rtol=2e-2)

    optimiser, params = optax.adam(1e-3), eqx.filter(model, eqx.is_inexact_array)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimiser.update(grad, optimiser.init(params), params)
    stepped = parameters(eqx.apply_updates(model, updates))
    assert {leaf.dtype for leaf in stepped.values()} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(leaf).all() for leaf in stepped.values())
    assert not np.array_equal(stepped[".layers[0].linear.weight"], model[0].linear.weight)


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_outputs(norm):
    model, state = make(norm=norm, drop_rate=0.0)
    model = eqx.tree_at(
        lambda m: m.layers, model, model.layers[:2]
    )  # log-probabilities are float32
    x = draw(BATCH, TIME, FEATURES)
    y = evaluate(model, state, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), evaluate(model, state, x), rtol=2e-2)


def test_checkpoint_changes_nothing():
    model, state = make()
    x, keys = draw(BATCH, TIME, FEATURES), keys_of(0)

    @eqx.filter_jit
    def checkpointed(model):
        def loss(params, static):
            run = jax.checkpoint(lambda params, *args: train(eqx.combine(params, static), *args))
            y, new_state = run(params, state, x, keys)
            return -jnp.mean(y[:, 0]), new_state

        params, static = eqx.partition(model, eqx.is_inexact_array)
        (value, new_state), grad = jax.value_and_grad(loss, has_aux=True)(params, static)
        return value, new_state, grad

    assert_close(checkpointed(model), loss_and_gradient(model, state, x, keys))


def test_batches_in_a_scan_are_batches_in_a_loop():
    model, state = make()
    batches = draw(4, BATCH, TIME, FEATURES)
    keys = jax.vmap(keys_of)(jnp.arange(4))

    @eqx.filter_jit
    def scan(state):
        step = lambda state, inputs: train(model, state, *inputs)[::-1]
        return lax.scan(step, state, (batches, keys))

    one = eqx.filter_jit(train)
    scanned_state, scanned = scan(state)
    looped_state, looped = state, []
    for x, key in zip(batches, keys, strict=True):
        y, looped_state = one(model, looped_state, x, key)
        looped.append(y)
    assert_close(scanned, jnp.stack(looped))
    assert_close(scanned_state, looped_state)


def test_key_of_the_call_decides_the_dropout():
    model, state = make(drop_rate=0.5)
    x = draw(BATCH, TIME, FEATURES)
    first, _, _ = loss_and_gradient(model, state, x, keys_of(0))
    again, _, _ = loss_and_gradient(model, state, x, keys_of(0))
    other, _, _ = loss_and_gradient(model, state, x, keys_of(1))
    assert first == again
    assert abs(first - other) > 1e-3


def test_every_block_drops_by_its_own_key():
    """Ones in, two blocks around identities: x + m1 gelu(1) + m2 gelu(x + m1 gelu(1))."""
    drop_rate = 0.5
    model, state = eqx.nn.make_with_state(Backbone)(
        jr.key(0),
        hidden_dim=WIDTH,
        sequence_mixer=Leaky,
        channel_mixer=ft.partial(MLPChannelMixer, non_linearity="relu"),
        num_blocks=2,
        drop_rate=drop_rate,
        norm=None,
    )
    model = eqx.tree_at(
        lambda m: [block.channel_mixer.linear.weight for block in m.blocks],
        model,
        [jnp.eye(WIDTH)] * 2,
    )
    x = jnp.ones((1, WIDTH))
    run = eqx.filter_jit(jax.vmap(lambda key: model(x, state, key=key)[0][0]))
    y = numbers(run(jr.split(jr.key(1), 500))).ravel()
    scale = 1 / (1 - drop_rate) ** 2
    one = 1 + scale * gelu(1.0)
    kept = (1 - drop_rate) ** 2
    shares = {1.0: (1 - kept) ** 2, one: 2 * kept * (1 - kept), one + scale * gelu(one): kept**2}
    for level, share in shares.items():
        found = np.isclose(y, level, rtol=1e-4).mean()
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / y.size)
    assert np.isclose(y[:, None], list(shares), rtol=1e-4).any(1).all()


# Backbone


def test_backbone_from_any_mixers():
    model, state = eqx.nn.make_with_state(Backbone)(
        jr.key(0),
        hidden_dim=WIDTH,
        sequence_mixer=Leaky,
        channel_mixer=ft.partial(MLPChannelMixer, non_linearity="tanh"),
        num_blocks=3,
        norm=None,
    )
    x = draw(BATCH, TIME, WIDTH)
    expected = []
    for u in numbers(x):
        for block in model.blocks:
            mixed = gelu(leaky(block.sequence_mixer, u))
            u = u + np.tanh(mixed @ numbers(block.channel_mixer.linear.weight).T)
        expected.append(u)
    assert_close(evaluate(model, state, x), np.stack(expected))


def test_lru_is_a_stack_of_its_blocks():
    model, state = eqx.nn.make_with_state(LRU)(
        jr.key(0), hidden_dim=WIDTH, num_blocks=3, state_dim=STATE, norm=None
    )
    x = draw(BATCH, TIME, WIDTH)
    expected = []
    for u in numbers(x):
        for block in model.blocks:
            u = u + glu(block.channel_mixer, gelu(lru(block.sequence_mixer, u)))
        expected.append(u)
    assert_close(evaluate(model, state, x), np.stack(expected))


def test_backbone_is_what_the_models_are():
    options = {"hidden_dim": WIDTH, "num_blocks": 2, "norm": "layer"}
    named = LRU(jr.key(0), state_dim=STATE, **options)
    built = Backbone(
        jr.key(0), sequence_mixer=ft.partial(LRUSequenceMixer, state_dim=STATE), **options
    )
    assert_equal(parameters(built), parameters(named))


# Serialisation and determinism


@pytest.mark.parametrize("deleted", [True, False])
def test_saved_and_loaded(deleted):
    def fresh(seed):
        if deleted:
            return eqx.nn.make_with_state(make_model)(seed)
        model = make_model(seed)
        return model, eqx.nn.State(model)

    x = 1 + draw(BATCH, TIME, FEATURES)
    model, state = fresh(0)
    model = changed(model)
    _, state, _ = loss_and_gradient(model, state, x, keys_of(0))
    expected = evaluate(model, state, x)

    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (model, state))
    file.seek(0)
    other = fresh(1)
    assert np.abs(evaluate(*other, x) - expected).max() > 1e-2
    assert_equal(evaluate(*eqx.tree_deserialise_leaves(file, other), x), expected)


def test_one_key_one_model():
    model, state = eqx.nn.make_with_state(make_model)(0)
    again, state_again = eqx.nn.make_with_state(make_model)(0)
    assert jax.tree.structure((model, state)) == jax.tree.structure((again, state_again))
    assert_equal(parameters(model), parameters(again))
    x = draw(BATCH, TIME, FEATURES)
    assert_equal(evaluate(model, state, x), evaluate(again, state_again, x))


def is_drawn(leaf):
    return leaf.ndim > 0 and np.unique(leaf).size > 1


def test_two_keys_two_models():
    model, other = parameters(make_model(0)), parameters(make_model(1))
    drawn = [path for path, leaf in model.items() if is_drawn(leaf)]
    assert len(drawn) == 1 + 2 * (8 + 4) + 2  # encoder; mixer and GLU in each block; head
    for path in drawn:
        assert not np.isin(model[path], other[path]).any(), path


def test_no_two_parameters_from_one_key():
    """Two arrays drawn with one key increase and decrease together, whatever their distributions."""
    encoder_key, tokens_key, model_key, head_key, other_head_key = jr.split(jr.key(0), 5)
    size = 8
    tree = (
        LinearEncoder(size, encoder_key, out_features=size, use_bias=True),
        EmbeddingEncoder(tokens_key, num_classes=size, out_features=size),
        LRU(model_key, hidden_dim=size, num_blocks=2, state_dim=size),
        ClassificationHead(size, size, head_key),
        RegressionHead(size, size, other_head_key),
    )
    # log_gamma is a function of nu.
    drawn = {
        path: np.asarray(leaf).ravel()
        for path, leaf in parameters(tree).items()
        if is_drawn(leaf) and not path.endswith(".gamma_log")
    }
    assert len(drawn) == 2 + 1 + 2 * (7 + 4) + 2 * 2
    for (path, leaf), (other_path, other) in itertools.combinations(drawn.items(), 2):
        length = min(leaf.size, other.size)
        order, other_order = np.argsort(leaf[:length]), np.argsort(other[:length])
        assert not np.array_equal(order, other_order), (path, other_path)
        assert not np.array_equal(order, other_order[::-1]), (path, other_path)


def test_fresh_model_and_state_can_be_donated():
    model, state = eqx.nn.make_with_state(make_model)()
    arrays = [leaf for leaf in jax.tree.leaves((model, state)) if eqx.is_array(leaf)]
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)
