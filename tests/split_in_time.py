"""Time split over eight devices equals one device. Run by `test_sequence_parallel.py`."""

import functools as ft
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import Leaky, assert_close, assert_equal, changed, draw, parameters
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from discretax import Timeseries, ops, sharding
from discretax.architectures import LanguageModel
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU, S5, Mamba
from discretax.ops._running.split_time import split_time
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    BidirectionalS5,
    GatedDeltaProductSequenceMixer,
    GatedSequenceMixer,
    GLASequenceMixer,
    GriffinSequenceMixer,
    HGRN2SequenceMixer,
    KimiDeltaAttentionSequenceMixer,
    LinOSSSequenceMixer,
    LRUSequenceMixer,
    Mamba2SequenceMixer,
    Mamba3SequenceMixer,
    MambaSequenceMixer,
    MLSTMSequenceMixer,
    RetentionSequenceMixer,
    S4DSequenceMixer,
    S4SequenceMixer,
    S5SequenceMixer,
    S7SequenceMixer,
    SequenceParallel,
    sequence_parallel,
)

PARTS, TIME, FEATURES, STATE = 8, 32, 4, 3
# Within the first part, at the border of two parts, at the end of one.
RESETS = jnp.zeros(TIME, bool).at[jnp.array([2, 12, 19])].set(True)
LENGTH = 26  # the last part is padding, the one before half so
BYTES = {"f32": 4, "pred": 1, "s32": 4}
COLLECTIVE = re.compile(
    r" = (\S.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)\("
)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=1, seq=PARTS)


def mixers():
    common = {"dt_min": 0.1, "dt_max": 1.0}
    yield "LRU", lambda key: LRUSequenceMixer(FEATURES, key, state_dim=STATE)
    yield (
        "LinOSS",
        lambda key: LinOSSSequenceMixer(FEATURES, key, state_dim=STATE, r_min=0.3, theta_max=2),
    )
    yield "S5", lambda key: S5SequenceMixer(FEATURES, key, state_dim=6, **common)
    yield "S4D", lambda key: S4DSequenceMixer(FEATURES, key, state_dim=4, **common)
    yield "Mamba", lambda key: MambaSequenceMixer(FEATURES, key, state_dim=STATE, **common)
    yield (
        "Mamba2",
        lambda key: Mamba2SequenceMixer(FEATURES, key, state_dim=STATE, head_dim=2, **common),
    )
    yield (
        "Mamba3",
        lambda key: Mamba3SequenceMixer(FEATURES, key, state_dim=4, head_dim=4, rank=2, **common),
    )
    yield "Griffin", lambda key: GriffinSequenceMixer(FEATURES, key, num_heads=2)
    heads = {"num_heads": 2, "head_dim": 3}
    decaying = {**heads, **common, "conv_width": 2, "A_init_range": (0.3, 2.0)}
    yield (
        "GatedDeltaProduct",
        lambda key: GatedDeltaProductSequenceMixer(FEATURES, key, value_dim=2, **decaying),
    )
    yield (
        "KimiDeltaAttention",
        lambda key: KimiDeltaAttentionSequenceMixer(FEATURES, key, num_value_heads=4, **decaying),
    )
    yield (
        "GLA",
        lambda key: GLASequenceMixer(FEATURES, key, conv_width=2, temperature=2.0, **heads),
    )
    yield "HGRN2", lambda key: HGRN2SequenceMixer(FEATURES, key, lower_bound=0.3, **heads)
    yield "Retention", lambda key: RetentionSequenceMixer(FEATURES, key, num_heads=2)
    yield (
        "MLSTM",
        lambda key: MLSTMSequenceMixer(FEATURES, key, value_dim=4, input_bias=0.0, norm_eps=0.01),
    )
    yield "S7", lambda key: S7SequenceMixer(FEATURES, key, state_dim=STATE)


MIXERS = dict(mixers())


def pulled(mixer, x, cache, cotangents, **options):
    """Output, cache, and the gradients with respect to all that floats."""
    leaves, rest = eqx.partition((mixer, x, cache), eqx.is_inexact_array)

    def run(leaves):
        mixer, x, cache = eqx.combine(leaves, rest)
        y, cache = mixer(x, cache, **options)
        return eqx.filter((y[: options.get("length")], cache), eqx.is_inexact_array)

    def both(leaves, cotangents):
        out, pull = jax.vjp(run, leaves)
        return out, pull(cotangents(out))

    return jax.jit(both, static_argnums=1)(leaves, cotangents)


def cotangents(out):
    return jax.tree.map(lambda value: jnp.cos(jnp.arange(value.size)).reshape(value.shape), out)


def check_mixer(mixer, mesh, **options):
    cache = mixer.allocate_inference_cache()
    cache = jax.tree.map(lambda v: changed(v) if eqx.is_inexact_array(v) else ~v, cache)
    x = draw(TIME, FEATURES)
    whole = pulled(mixer, x, cache, cotangents, **options)
    split = pulled(SequenceParallel(mixer, mesh), x, cache, cotangents, **options)
    assert_close(split, whole)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_with_resets_and_padding(name, mesh):
    check_mixer(MIXERS[name](jr.key(0)), mesh, length=LENGTH, resets=RESETS)


@pytest.mark.parametrize("name", ["LRU", "S4D", "Mamba2"])
def test_mixers_of_time_that_stays_the_same(name, mesh):
    check_mixer(MIXERS[name](jr.key(0)), mesh)


@pytest.mark.parametrize("name", ["S5", "LinOSS"])
def test_timesteps(name, mesh):
    mixer = MIXERS[name](jr.key(0))
    check_mixer(mixer, mesh, integration_timesteps=jnp.abs(draw(TIME, seed=5)), length=LENGTH)


def test_no_valid_samples_leave_the_cache(mesh):
    mixer = MIXERS["Griffin"](jr.key(0))
    cache = changed(mixer.allocate_inference_cache())
    split = eqx.filter_jit(SequenceParallel(mixer, mesh))
    assert_close(split(draw(TIME, FEATURES), cache, length=0)[1], cache)


@pytest.mark.parametrize("name", ["LRU", "S4D", "Mamba2", "KimiDeltaAttention"])
@pytest.mark.parametrize("resets", [None, RESETS], ids=["", "resets"])
def test_a_broken_sample_reaches_the_parts_behind_it(name, resets, mesh):
    mixer = MIXERS[name](jr.key(0))
    x = draw(TIME, FEATURES).at[5, 0].set(jnp.nan)
    on_finite = lambda out: jax.tree.map(
        lambda y, w: jnp.where(jnp.isfinite(y), w, 0), out, cotangents(out)
    )
    arguments = x, mixer.allocate_inference_cache(), on_finite
    (whole, gradients), (split, split_gradients) = (
        pulled(m, *arguments, resets=resets) for m in (mixer, SequenceParallel(mixer, mesh))
    )
    broken = jnp.isnan(whole[0]).any(1)
    assert_equal(
        broken, (jnp.arange(TIME) >= 5) & (jnp.arange(TIME) < (TIME if resets is None else 12))
    )
    assert_equal(*(jax.tree.map(jnp.isnan, out) for out in (split, whole)))
    assert_close(*(jax.tree.map(jnp.nan_to_num, out) for out in (split, whole)))
    assert_close(split_gradients, gradients)


@pytest.mark.parametrize("planes", [False, True])
def test_linear_recurrence(planes, mesh):
    """Real and complex, against a loop."""
    a, b, h0 = draw(TIME, 2, STATE), draw(TIME, 2, STATE, seed=2), draw(2, STATE, seed=3)
    if planes:
        a, b, h0 = (jax.lax.complex(v[..., 0, :], v[..., 1, :]) for v in (a, b, h0))

    def part(index, a, b, resets, h0):
        with split_time("seq", index[0], PARTS):
            return ops.linear_recurrence(a, b, h0, resets=resets)

    over_time = P("seq")
    split = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(over_time, over_time, over_time, over_time, P()),
        out_specs=over_time,
        axis_names={"seq"},
        check_vma=False,
    )
    h, expected = np.asarray(h0), []
    for t in range(TIME):
        h = (0 if RESETS[t] else np.asarray(a[t]) * h) + np.asarray(b[t])
        expected.append(h)
    assert_close(jax.jit(split)(jnp.arange(PARTS), a, b, RESETS, h0), np.stack(expected))


def sent(compiled) -> int:
    """Bytes of the results of all collectives, which is what each device receives."""
    total = 0
    for shapes, _ in COLLECTIVE.findall(compiled.as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            total += BYTES[dtype] * int(np.prod([int(d) for d in dims.split(",") if d]))
    return total


def compiled(mixer, mesh, time, derivative):
    mixer = SequenceParallel(mixer, mesh)
    arrays, rest = eqx.partition(mixer, eqx.is_inexact_array)
    run = lambda arrays, x: eqx.combine(arrays, rest)(x)[0]
    if derivative:
        run = jax.grad(lambda arrays, x, run=run: jnp.sum(run(arrays, x) ** 2), (0, 1))
    place = NamedSharding(mesh, P("seq"))
    x = jax.ShapeDtypeStruct((time, FEATURES), jnp.float32, sharding=place)
    out = (None, place) if derivative else place
    return jax.jit(run, out_shardings=out).lower(arrays, x).compile()


def test_communication_is_that_of_the_formula(mesh):
    """n (|p| + |q|) numbers for the states, and the rows that the convolution sees, with n flags for
    resets, and of mixers with maps around their operation n for broken samples."""
    lru, mamba = MIXERS["LRU"](jr.key(0)), MIXERS["Mamba"](jr.key(0))
    flags = PARTS
    assert sent(compiled(lru, mesh, TIME, False)) == PARTS * 4 * 2 * 2 * STATE + flags
    inner = 2 * FEATURES
    states = PARTS * 4 * 2 * inner * STATE + 2 * flags
    assert sent(compiled(mamba, mesh, TIME, False)) == states + 4 * 3 * inner


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "KimiDeltaAttention"])
def test_communication_does_not_grow_with_time(name, mesh):
    """Nor that of the gradients."""
    mixer = MIXERS[name](jr.key(0))
    once, twice = (sent(compiled(mixer, mesh, time, True)) for time in (TIME, 2 * TIME))
    assert once == twice > 0


def classifier(model):
    keys = jr.split(jr.key(0), 3)
    layers = [LinearEncoder(2, keys[0], out_features=FEATURES), model(keys[1])]
    layers.append(ClassificationHead(FEATURES, 3, keys[2]))
    return eqx.nn.make_with_state(eqx.nn.Sequential)(layers)


MODELS = {
    "LRU": lambda key: LRU(key, hidden_dim=FEATURES, num_blocks=1, state_dim=STATE),
    "S5": lambda key: S5(key, hidden_dim=FEATURES, num_blocks=1, state_dim=4),
    "Mamba": lambda key: Mamba(key, hidden_dim=FEATURES, num_blocks=1, state_dim=STATE),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_steps_equal_those_of_one_device(name):
    """Batch and time split, with dropout, batch norm, unequal lengths, resets and pooling."""
    mesh = sharding.make_mesh(data=2, seq=4)
    model, state = classifier(MODELS[name])
    lengths, resets = jnp.array([TIME, LENGTH, 11, 1]), jnp.stack([RESETS, RESETS, ~RESETS, RESETS])
    batch = Timeseries(draw(4, TIME, 2), length=lengths, resets=resets)
    targets, keys = jnp.array([0, 1, 2, 1]), jr.split(jr.key(1), 4)
    optimiser = optax.sgd(0.1, momentum=0.9)

    def train(mesh):
        def loss(model, state, batch):
            model = model if mesh is None else sequence_parallel(model, mesh)
            batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            log_p, state = batched(batch, state, key=keys)
            return -jnp.take_along_axis(log_p, targets[:, None], 1).mean(), state

        @eqx.filter_jit
        def step(model, state, opt_state, batch):
            grad = eqx.filter_value_and_grad(loss, has_aux=True)
            (value, state), grads = grad(model, state, batch)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimiser.update(grads, opt_state)
            return eqx.apply_updates(model, updates), state, opt_state, value, grads

        opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
        carry, seen = (model, state, opt_state), []
        samples = batch
        if mesh is not None:
            over = lambda v: NamedSharding(mesh, P("data", "seq") if v.ndim > 1 else P("data"))
            samples = jax.tree.map(lambda v: jax.device_put(v, over(v)), batch)
        for _ in range(2):
            *carry, value, grads = step(*carry, samples)
            seen.append((value, parameters(grads)))
        return seen, parameters(carry[0]), jax.tree.leaves(carry[1])

    assert_close(train(mesh), train(None), rtol=2e-5)


def test_communication_of_a_model_does_not_grow_with_time():
    """With batch norm, pooling, the parameters' gradients and a split batch."""
    mesh = sharding.make_mesh(data=2, seq=4)
    model, state = classifier(MODELS["LRU"])
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    keys = jr.split(jr.key(1), 4)

    def loss(arrays, x):
        split = sequence_parallel(eqx.combine(arrays, rest), mesh)
        batched = jax.vmap(split, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return batched(x, state, key=keys)[0][:, 0].mean()

    def bytes_sent(time):
        place = NamedSharding(mesh, P("data", "seq"))
        x = jax.ShapeDtypeStruct((4, time, 2), jnp.float32, sharding=place)
        return sent(jax.jit(jax.grad(loss)).lower(arrays, x).compile())

    assert bytes_sent(TIME) == bytes_sent(2 * TIME) > 0


TOKENS = 29  # unlike all other sizes


def cross_entropy(mesh, time, chunk_size):
    """Losses with the gradients of weight and samples, which lie with the samples."""
    place = NamedSharding(mesh, P(None, "seq"))
    weight, x = draw(TOKENS, FEATURES), jax.device_put(draw(2, time, FEATURES, seed=2), place)
    targets = jax.device_put(jr.randint(jr.key(3), (2, time), 0, TOKENS), place)

    def losses(weight, x):
        run = lambda x, targets: ops.chunked_cross_entropy(
            lambda x: x @ weight.T, x, targets, chunk_size=chunk_size
        )
        return jax.vmap(run)(x, targets)

    def both(weight, x):
        y, pull = jax.vjp(losses, weight, x)
        return y, pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    out = (place, (NamedSharding(mesh, P()), place))
    compiled = jax.jit(both, out_shardings=out).lower(weight, x).compile()
    return compiled, compiled(weight, x)


@pytest.mark.parametrize("time", [TIME, 2 * TIME, 5 * PARTS])
def test_each_device_has_the_logits_of_its_own_samples(mesh, time):
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    _, expected = cross_entropy(alone, time, 16)
    compiled, found = cross_entropy(mesh, time, 16)
    assert_close(found, expected)
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
    sizes = [[int(size) for size in shape.split(",")] for shape in shapes]
    assert max(np.prod(shape) for shape in sizes if TOKENS in shape) == 2 * 16 // PARTS * TOKENS
    if time % 16 == 0:
        # The sum of the weight's gradient, and nothing else.
        assert sent(compiled) == 4 * TOKENS * FEATURES
    else:
        # Some samples go to their neighbours.
        assert "all-gather(" not in compiled.as_text()


def test_communication_of_a_language_model_does_not_grow_with_time():
    mesh = sharding.make_mesh(data=2, seq=4)
    lru = ft.partial(LRUSequenceMixer, state_dim=STATE)
    model, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0), vocab_size=TOKENS, hidden_dim=FEATURES, num_blocks=1, pattern=(lru,)
    )
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss(arrays, tokens, mesh=None):
        model = eqx.combine(arrays, rest)
        model = model if mesh is None else sequence_parallel(model, mesh)
        run = ft.partial(model.loss, chunk_size=8)
        losses, _ = jax.vmap(run, in_axes=(0, None), out_axes=(0, None))(tokens, state)
        return losses.total.sum() / losses.count.sum()

    def bytes_sent(time):
        tokens = jr.randint(jr.key(1), (4, time), 0, TOKENS)
        gradients = jax.jit(jax.value_and_grad(ft.partial(loss, mesh=mesh)))
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("data", "seq")))
        compiled = gradients.lower(arrays, tokens).compile()
        assert_close(compiled(arrays, tokens), jax.jit(jax.value_and_grad(loss))(arrays, tokens))
        return sent(compiled)

    assert bytes_sent(TIME) == bytes_sent(2 * TIME) > 0


def test_what_cannot_be_split_is_refused(mesh):
    key, x = jr.key(0), draw(TIME, FEATURES)
    with pytest.raises(ValueError, match="no state to hand from one part"):
        sequence_parallel(BidirectionalS5(FEATURES, key, state_dim=4), mesh)
    for mixer in (
        Leaky(FEATURES, key),
        AttentionSequenceMixer(FEATURES, key, num_heads=1, window=3),
        AttentionSequenceMixer(FEATURES, key, num_heads=1),
    ):
        with pytest.raises(ValueError, match="0 are handed from device to device"):
            SequenceParallel(mixer, mesh)(x)
    with pytest.raises(ValueError, match="low-rank"):
        SequenceParallel(S4SequenceMixer(FEATURES, key, state_dim=4), mesh)(x)
    lru = LRUSequenceMixer(FEATURES, key, state_dim=STATE)
    with pytest.raises(ValueError, match="multiple of the 8 devices"):
        SequenceParallel(lru, mesh)(x[:-1])
    short = S4DSequenceMixer(FEATURES, key, state_dim=4, l_max=TIME - 1)
    with pytest.raises(ValueError, match="at most l_max=31 samples; got 32"):
        SequenceParallel(short, mesh)(x)
    with pytest.raises(ValueError, match="sees 3 samples before its own"):
        SequenceParallel(GriffinSequenceMixer(FEATURES, key), mesh)(x[: 2 * PARTS])
    with pytest.raises(ValueError, match="an axis 'time', and all of type Auto"):
        sequence_parallel(lru, mesh, axis_name="time")
    explicit = jax.make_mesh((PARTS,), ("seq",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="all of type Auto"):
        sequence_parallel(lru, explicit)
    with pytest.raises(ValueError, match="nothing to split"):
        sequence_parallel(eqx.nn.Linear(2, 2, key=key), mesh)


def test_a_mixer_around_a_mixer(mesh):
    gated = GatedSequenceMixer(FEATURES, jr.key(0), sequence_mixer=MIXERS["LRU"](jr.key(1)), gate=1)
    check_mixer(gated, mesh, length=LENGTH)
