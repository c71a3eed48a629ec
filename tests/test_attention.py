"""Attention against its equation written out, its cache, its memory and its errors."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, draw, linear, numbers
from jax.test_util import check_grads

from discretax import inference_state, streaming_mode
from discretax.blocks import ResidualBlock
from discretax.channel_mixers import IdentityChannelMixer
from discretax.ops import _attention
from discretax.ops._attention import masked_attention
from discretax.sequence_mixers import AttentionSequenceMixer

FEATURES, TIME = 8, 11
run = eqx.filter_jit(lambda mixer, x, cache=None, **options: mixer(x, cache, **options))
step = eqx.filter_jit(lambda mixer, x, cache: mixer.step(x, cache))


def rotate(head, position, mixer):
    """Pairs (i, i + r/2) as complex numbers, times e^{i angle}."""
    half = mixer.rotary_dim // 2
    angles = position * mixer.rotary_base ** (-np.arange(half) / half)
    turned = (head[:half] + 1j * head[half : 2 * half]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, head[2 * half :]])


def attention(mixer, x):
    """One query and one head after the other."""
    heads, kv_heads = mixer.num_heads, mixer.num_kv_heads
    q, k, v = (linear(layer, x) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k, v = (
        q.reshape(len(x), heads, -1),
        k.reshape(len(x), kv_heads, -1),
        v.reshape(len(x), kv_heads, -1),
    )
    y = np.zeros_like(q)
    for t in range(len(x)):
        first = 0 if mixer.window is None else max(0, t - mixer.window + 1)
        for n in range(heads):
            nu = n // (heads // kv_heads)
            query = rotate(q[t, n], t, mixer)
            scores = [query @ rotate(k[s, nu], s, mixer) for s in range(first, t + 1)]
            weights = np.exp(np.array(scores) / np.sqrt(q.shape[-1]))
            y[t, n] = weights @ v[first : t + 1, nu] / weights.sum()
    return linear(mixer.out_proj, y.reshape(len(x), -1))


def test_blocks_of_queries_are_all_at_once(monkeypatch):
    """In three blocks, the last of which is not full, behind a cache, with a reset and a NaN."""
    time = 2 * _attention.SHORTEST + 5
    mixer = AttentionSequenceMixer(FEATURES, num_heads=4, num_kv_heads=2, key=jr.key(0))
    x, resets = draw(time, FEATURES), jnp.arange(time) == 3
    cache = mixer(draw(2, FEATURES), mixer.allocate_inference_cache(max_seqlen=time + 2))[1]

    def loss(mixer, x):
        y, after = mixer(x.at[20].set(jnp.nan), cache)
        resumed, _ = mixer(x, cache, resets=resets)
        return jnp.sin(y[:20]).sum() + jnp.sin(resumed).sum(), (
            jnp.nan_to_num(y, nan=9),
            resumed,
            after,
        )

    gradients = lambda: eqx.filter_value_and_grad(loss, has_aux=True)(mixer, x)
    whole = gradients()
    monkeypatch.setattr(_attention, "SCORES", (1, 1))
    jax.clear_caches()
    assert_close(gradients(), whole)
    np.testing.assert_array_equal((np.asarray(whole[0][1][0]) == 9).all(1), np.arange(time) >= 20)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_heads": 4, "num_kv_heads": 1, "window": 4},
        {"num_heads": 2, "head_dim": 6, "rotary_fraction": 2 / 3, "use_bias": True},
        {"num_kv_heads": 2, "rotary_fraction": 0.0, "out_bias": True, "window": 1},
        {"rotary_base": 10.0, "window": 100},
    ],
    ids=str,
)
def test_against_the_equation(options):
    with jax.enable_x64(True):
        mixer = AttentionSequenceMixer(FEATURES, jr.key(0), **options)
        x = draw(TIME, FEATURES)
        assert_close(run(mixer, x)[0], attention(mixer, numbers(x)), 1e-12)


def test_long_sequences_of_a_window():
    """Longer than what is attended to at once."""
    with jax.enable_x64(True):
        mixer = AttentionSequenceMixer(FEATURES, jr.key(0), num_heads=2, window=5)
        x = draw(150, FEATURES)
        y, cache = run(mixer, x)
        assert_close(y, attention(mixer, numbers(x)), 1e-12)
        assert int(cache.clock) == 150


def test_the_cache_is_a_ring():
    """The sample at position p lies at p modulo the window, rotated by p."""
    with jax.enable_x64(True):
        mixer = AttentionSequenceMixer(FEATURES, jr.key(0), num_heads=2, window=4)
        x = draw(TIME, FEATURES)
        cache = run(mixer, x)[1]
        k = linear(mixer.k_proj, x).reshape(TIME, 2, -1)
        v = linear(mixer.v_proj, x).reshape(TIME, 2, -1)
        for position in range(TIME - 4, TIME):
            slot = position % 4
            turned = np.stack([rotate(k[position, n], position, mixer) for n in range(2)])
            assert_close(cache.keys[slot], turned, 1e-12)
            assert_close(cache.values[slot], v[position], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("clock", [1000, 2**24 + 1, 2**31 - 5, -(2**31), -7])
@pytest.mark.parametrize("window", [4, None])
def test_scores_depend_on_distance_alone(window, clock):
    """However many samples came before: where floats have gaps, and where integers run over."""
    mixer = AttentionSequenceMixer(FEATURES, jr.key(0), window=window)
    x = draw(TIME, FEATURES)
    early = mixer.allocate_inference_cache(max_seqlen=TIME)
    late = early._replace(clock=jnp.array(clock))
    expected, _ = run(mixer, x, early)
    y, cache = run(mixer, x, late)
    assert_close(y, expected, 1e-6)
    assert int(cache.clock) == (clock + TIME + 2**31) % 2**32 - 2**31
    first, cache = run(mixer, x[:6], late)
    stepped = []
    for sample in x[6:]:
        y, cache = step(mixer, sample, cache)
        stepped.append(y)
    assert_close(jnp.concatenate([first, jnp.stack(stepped)]), expected, 1e-6)


def test_no_count_ends():
    """However long a stream with a window is, its position stays near the number of slots."""
    mixer = AttentionSequenceMixer(FEATURES, jr.key(0), window=3)
    cache = mixer.allocate_inference_cache()
    for chunk in (draw(64, FEATURES), draw(130, FEATURES), *draw(5, 1, FEATURES)):
        cache = run(mixer, chunk, cache)[1]
        assert cache.position < 2 * 3
    assert int(cache.clock) == 64 + 130 + 5


@pytest.mark.slow
@pytest.mark.parametrize("window", [4, None])
def test_a_stream_goes_on_in_double_precision(window):
    """A cache keeps its types, whatever is switched on after it was made."""
    mixer = AttentionSequenceMixer(FEATURES, jr.key(0), window=window)
    x = draw(TIME, FEATURES)
    expected, _ = run(mixer, x)
    _, cache = run(mixer, x[:5], mixer.allocate_inference_cache(max_seqlen=TIME))
    with jax.enable_x64(True):
        chunk, after = run(mixer, numbers(x[5:8]), cache)
        sample, after = step(mixer, numbers(x[8]), after)
    assert_close(jnp.concatenate([chunk, sample[None]]), expected[5:9])
    assert [leaf.dtype for leaf in after] == [leaf.dtype for leaf in cache]


@pytest.mark.slow
def test_a_stream_longer_than_its_cache():
    """An error where the position is known, NaN past the end where it is not."""
    mixer = AttentionSequenceMixer(FEATURES, jr.key(0))
    x = draw(TIME, FEATURES)
    cache = mixer.allocate_inference_cache(max_seqlen=8)
    message = r"its cache holds 8, and this call makes them at least 11.*`max_seqlen`.*`window`"
    with pytest.raises(ValueError, match=message):
        mixer(x, cache)
    with pytest.raises(ValueError, match=message):
        run(mixer, x, cache)
    y, cache = run(mixer, x[:8], cache)
    with pytest.raises(ValueError, match="holds 8, and this call makes them at least 9"):
        mixer.step(x[8], cache)
    late, _ = run(mixer, x[8:], cache)
    assert jnp.isfinite(y).all() and jnp.isnan(late).all()
    y, _ = run(mixer, x[:4], run(mixer, x[:6], mixer.allocate_inference_cache(max_seqlen=8))[1])
    assert jnp.isfinite(y[:2]).all() and jnp.isnan(y[2:]).all()
    # With a reset the cache begins anew.
    resets = jnp.arange(TIME) == 5
    y, _ = mixer(x, mixer.allocate_inference_cache(max_seqlen=8), resets=resets)
    assert jnp.isfinite(y).all()


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
def test_a_row_of_padding_alone(window):
    """It sees nothing. Nor does its softmax spoil the gradients of the rows beside it."""
    mixer = AttentionSequenceMixer(FEATURES, jr.key(0), num_heads=2, window=window)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(mixer, x, lengths):
        y = jax.vmap(lambda x, length: mixer(x, length=length)[0])(x, lengths)
        valid = jnp.arange(TIME)[None] < lengths[:, None]
        return jnp.sum(jnp.where(valid[..., None], y, 0) ** 2)

    x = draw(2, TIME, FEATURES)
    assert_close(loss(mixer, x, jnp.array([0, 5])), loss(mixer, x[1:], jnp.array([5])))
    assert jnp.isfinite(mixer(x[0], length=0)[0]).all()


def test_a_block_streams_for_max_seqlen_samples():
    block = ResidualBlock(
        FEATURES,
        jr.key(0),
        sequence_mixer=AttentionSequenceMixer,
        channel_mixer=IdentityChannelMixer,
    )
    x, state = draw(TIME, FEATURES), eqx.nn.State(block)
    live = streaming_mode(eqx.nn.inference_mode(block))
    call = eqx.filter_jit(lambda x, state: live(x, state))
    whole, _ = block(x, state)
    first, state = call(x[:4], inference_state(live, state, max_seqlen=TIME))
    second, state = call(x[4:], state)
    assert_close(jnp.concatenate([first, second]), whole)


@pytest.mark.slow
def test_gradients_of_narrow_parameters_are_added_up_in_float32():
    """In their own type a sum over chunks would stop growing at 256 times what each adds."""
    mixer = AttentionSequenceMixer(FEATURES, jr.key(0), window=2)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), mixer)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    x = jnp.ones((64 * 512, FEATURES))
    gradient = jax.jit(jax.grad(lambda mixer: mixer(x)[0].sum()))
    actual, expected = (gradient(either).out_proj.weight for either in (narrow, wide))
    assert actual.dtype == jnp.bfloat16
    assert_close(numbers(actual), expected, 2**-8)


def test_memory_of_a_window_grows_linearly():
    mixer = AttentionSequenceMixer(FEATURES, jr.key(0), window=64)
    loss = jax.grad(lambda x: jnp.sum(mixer(x)[0] ** 2))

    def temporary(time):
        x = jax.ShapeDtypeStruct((time, FEATURES), jnp.float32)
        return jax.jit(loss).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 5 * temporary(1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "`num_heads` must divide in_features = 8; got 3. Or give `head_dim`"),
        ({"num_kv_heads": 3}, "`num_kv_heads` must divide num_heads = 4; got 3"),
        ({"window": 0}, "`window` must be a whole number of at least 1; got 0"),
        ({"head_dim": 0}, "`head_dim` must be .* at least 1; got 0"),
        ({"rotary_fraction": 0.5}, r"even number of features to turn; got 0.5 of head_dim=2"),
        ({"rotary_fraction": 1.5}, r"must lie in \[0, 1\].*got 1.5"),
        ({"rotary_base": 0.0}, "`rotary_base` must be positive; got 0.0"),
    ],
)
def test_unfit_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionSequenceMixer(FEATURES, jr.key(0), **options)


def test_cache_of_another_mixer():
    mixer = AttentionSequenceMixer(FEATURES, jr.key(0), window=4)
    for other in (
        AttentionSequenceMixer(FEATURES, jr.key(0), window=5),
        AttentionSequenceMixer(FEATURES, jr.key(0), window=4, num_kv_heads=2),
        AttentionSequenceMixer(FEATURES, jr.key(0), window=4, head_dim=4),
    ):
        with pytest.raises(ValueError, match="`AttentionSequenceMixer` takes a cache of shapes"):
            mixer(jnp.ones((3, FEATURES)), other.allocate_inference_cache())
    with pytest.raises(ValueError, match="takes a cache of shapes"):
        mixer(jnp.ones((3, FEATURES)), jnp.zeros(3))


def test_what_no_query_sees_is_not_read(monkeypatch):
    """A NaN there would come through, in a product with zero, and in its gradient."""
    monkeypatch.setattr(_attention, "MANY", 10)
    q, k, v, weights = draw(3, 4, 2), draw(10, 2, 2), draw(10, 2, 2), draw(3, 4, 2, seed=2)

    def pulled(attention, k, v, seen):
        loss = lambda *qkv: jnp.vdot(attention(*qkv, seen, 0.7), weights)
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    plain = jax.jit(ft.partial(pulled, _attention._attention))
    one = jax.jit(ft.partial(pulled, masked_attention))
    rows = jax.jit(jax.vmap(ft.partial(pulled, masked_attention)))
    causal = np.tril(np.ones((3, 10), bool))
    for last, read in ((2, 3), (3, 3), (4, 5), (5, 5), (6, 8), (8, 8), (9, 10), (10, 10)):
        seen = np.roll(causal, last - 3, 1) if last >= 3 else causal & (np.arange(10) < last)
        unread = np.where(np.arange(10) < read, 0, np.nan)[:, None, None]
        expected = plain(k, v, seen)
        assert_close(one(k + unread, v + unread, seen), expected)
        together = rows(
            *(np.stack([a, a]) for a in (k + unread, v + unread)),
            np.stack([causal & (np.arange(10) < 1), seen]),
        )
        assert_close(jax.tree.map(lambda leaf: leaf[1], together), expected)


def test_derivatives_of_what_is_read(monkeypatch):
    monkeypatch.setattr(_attention, "MANY", 4)
    seen = np.tril(np.ones((2, 5), bool), 1)
    with jax.enable_x64(True):
        attend = jax.jit(lambda *qkv: masked_attention(*qkv, seen, 0.7))
        arrays = draw(2, 2, 2), draw(5, 1, 2), draw(5, 1, 2)
        check_grads(attend, arrays, order=2, modes=["fwd", "rev"], eps=1e-5)
