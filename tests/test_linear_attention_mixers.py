"""Mixers of gated linear attention against original layers, and against loops over equations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from helpers import assert_close

from discretax import ops
from discretax.ops import gated_linear_attention
from discretax.sequence_mixers import (
    GLASequenceMixer,
    HGRN2SequenceMixer,
    MLSTMSequenceMixer,
    RetentionSequenceMixer,
)
from discretax.sequence_mixers.ltv._matrix_memory import Output, Projections, rms_of_all_heads

TIME = 9


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def normalised(y, eps, axis=-1):
    return y / np.sqrt((y**2).mean(axis, keepdims=True) + eps)


def at(layer, x):
    """`layer`, weights as they stand, of `x` (time, features)."""
    y = x @ np.asarray(layer.weight).T
    return y if layer.bias is None else y + np.asarray(layer.bias)


def in_heads(mixer, x):
    projections = mixer.projections
    layers = (projections.q_proj, projections.k_proj, projections.v_proj)
    return (at(layer, x).reshape(TIME, projections.key_heads, -1) for layer in layers)


def read(alpha, q, k, v):
    """S = alpha S + k v^T and S^T q, one sample after the other; and the last S."""
    S, ys = np.zeros((q.shape[1], q.shape[2], v.shape[2])), []
    for alpha_t, q_t, k_t, v_t in zip(alpha, q, k, v, strict=True):
        S = alpha_t[..., None] * S + k_t[..., None] * v_t[:, None]
        ys.append(np.einsum("hkv,hk->hv", S, q_t))
    return np.stack(ys), S


def gated_output(mixer, y, activation, x):
    y = y * np.asarray(mixer.output.norm_weight)
    return at(
        mixer.output.out_proj, y.reshape(TIME, -1) * activation(at(mixer.output.gate_proj, x))
    )


def gla(mixer, x):
    q, k, v = in_heads(mixer, x)
    f = at(mixer.decay_proj.up, at(mixer.decay_proj.down, x)).reshape(k.shape)
    y, S = read(sigmoid(f) ** (1 / 16), q / np.sqrt(q.shape[-1]), k, v)
    return gated_output(mixer, normalised(y, 1e-5), silu, x), S


def hgrn2(mixer, x):
    q, f, i = in_heads(mixer, x)
    f = mixer.lower_bound + (1 - mixer.lower_bound) * sigmoid(f)
    y, S = read(f, silu(q), 1 - f, i)
    y = normalised(y, 1e-5, (-2, -1)) * np.asarray(mixer.output.norm_weight)
    return at(mixer.output.out_proj, y.reshape(TIME, -1)), S


def retention(mixer, x):
    q, k, v = in_heads(mixer, x)
    heads, half = q.shape[1], q.shape[2] // 2
    angles = np.arange(TIME)[:, None, None] * 10_000.0 ** (-np.arange(half) / half)

    def turned(a):
        a = (a[..., :half] + 1j * a[..., half:]) * np.exp(1j * angles)
        return np.concatenate([a.real, a.imag], -1)

    gamma = 1 - 2.0 ** (-5 - np.arange(heads))
    alpha = np.broadcast_to(gamma[:, None], q.shape)
    y, S = read(alpha, turned(q) / np.sqrt(2 * half), turned(k), v)
    return gated_output(mixer, normalised(y, 1e-5), silu, x), S


def mlstm(mixer, x):
    q, k, v = in_heads(mixer, x)
    i, f = (15 * np.tanh(at(layer, x) / 15) for layer in (mixer.input_proj, mixer.forget_proj))
    v = np.concatenate([v, np.ones_like(v[..., :1])], -1)
    q = q / np.sqrt(q.shape[-1])
    y, S = read(np.broadcast_to(sigmoid(f)[..., None], q.shape), q, np.exp(i)[..., None] * k, v)
    m, sizes = 0, []
    for i_t, f_t in zip(i, f, strict=True):
        m = np.maximum(np.log(sigmoid(f_t)) + m, i_t)
        sizes.append(1e-6 * np.exp(m))
    y = y[..., :-1] / (np.maximum(abs(y[..., -1:]), 1) + np.stack(sizes)[..., None])
    y = normalised(y - y.mean(-1, keepdims=True), 1e-6)
    return gated_output(mixer, y, sigmoid, x), S


@pytest.mark.parametrize(
    ("make", "options", "reference"),
    [
        (GLASequenceMixer, {"decay_rank": 3}, gla),
        (HGRN2SequenceMixer, {"lower_bound": 0.3, "head_dim": 5}, hgrn2),
        (HGRN2SequenceMixer, {}, hgrn2),
        (RetentionSequenceMixer, {}, retention),
        (MLSTMSequenceMixer, {}, mlstm),
    ],
)
def test_is_the_loop_over_its_equations(make, options, reference):
    with jax.enable_x64(True):
        mixer = make(8, jr.key(0), num_heads=2, **options)
        rng = np.random.default_rng(0)
        noisy = lambda a: a + 0.5 * rng.normal(size=a.shape) if eqx.is_array(a) else a
        mixer = jax.tree.map(noisy, mixer)
        x = rng.normal(size=(TIME, 8))
        y, cache = jax.jit(lambda mixer, x: mixer(x))(mixer, jnp.asarray(x))
        expected, S = reference(mixer, x)
        if make is MLSTMSequenceMixer:
            state = np.exp(cache.maximum)[:, None, None] * cache.memory
        else:
            state = cache.state
        assert_close(state, S, 1e-12)
        assert_close(y, expected, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_lightning_attention_is_made_of_the_same_parts(dtype, tolerance):
    """The layer of MiniMax: constant decays, no positions, a norm over the heads together."""
    with jax.enable_x64(dtype == "float64"):
        golden = Golden("hf_minimax_lightning_L64", dtype)
        projections = Projections(12, jr.key(0), 3, 4, 4)
        output = Output(
            projections,
            jr.key(2),
            gate_proj=projections.for_each_head(4, jr.key(1)),
            activation="sigmoid",
            norm=rms_of_all_heads,
            norm_eps=1e-6,
        )

        def loss(p, x):
            per_head = p["qkv_proj.weight"].reshape(3, 3, 4, 12)  # (head, which, feature, input)
            made = eqx.tree_at(
                lambda parts: [
                    *(getattr(parts[0], f"{name}_proj").weight for name in "qkv"),
                    parts[1].gate_proj.weight,
                    parts[1].norm_weight,
                    parts[1].out_proj.weight,
                ],
                (projections, output),
                [
                    *(per_head[:, i].reshape(12, 12) for i in range(3)),
                    p["output_gate.weight"],
                    p["norm.weight"].reshape(3, 4),
                    p["out_proj.weight"],
                ],
            )
            q, k, v, _ = made[0](x, None, None, None)
            y, state = gated_linear_attention(q, k, v, None, -golden["slope"])
            y = made[1](y, x)
            return jnp.sum(y * golden["w"][0]), (y, state)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (y, state)), (d_p, d_x) = run(golden.fields("p"), golden["x"][0])
        assert_close(y, golden["y"][0], tolerance)
        assert_close(state, golden["final_state"][0], tolerance)
        assert_close(d_x, golden["g.x"][0], tolerance)
        for name, stored in golden.fields("g.p").items():
            assert_close(d_p[name], stored, tolerance)


@pytest.mark.parametrize("clock", [10**6, 2**31 - 5])
def test_only_distances_count_for_retention(clock):
    """However many samples have been seen, also where the integers run over."""
    mixer = RetentionSequenceMixer(4, jr.key(0), num_heads=1)
    x = jr.normal(jr.key(1), (TIME, 4))
    run = jax.jit(lambda x, cache: mixer(x, cache))
    fresh = mixer.allocate_inference_cache()
    early, _ = run(x, fresh)
    late, cache = run(x, fresh._replace(clock=jnp.asarray(clock, jnp.int32)))
    assert_close(late, early, 1e-5)
    assert cache.clock == np.array(clock).astype(np.int32) + np.int32(TIME)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            GLASequenceMixer,
            {"num_heads": 3},
            "`num_heads` .* in_features = 4; got 3. .*`value_dim`",
        ),
        (GLASequenceMixer, {"temperature": 0.0}, "`temperature` must be positive; got 0.0"),
        (GLASequenceMixer, {"decay_rank": 0}, "`decay_rank` must be .* at least 1; got 0"),
        (HGRN2SequenceMixer, {"lower_bound": 1.0}, "`lower_bound` .* below 1; got 1.0"),
        (
            HGRN2SequenceMixer,
            {"num_heads": 3},
            "`num_heads` .* in_features = 4; got 3. .*`head_dim`",
        ),
        (RetentionSequenceMixer, {"head_dim": 3}, "`head_dim` must be even.*; got 3"),
        (
            RetentionSequenceMixer,
            {"num_heads": 2, "rotary_base": -1.0},
            "`rotary_base` must be positive; got -1",
        ),
        (MLSTMSequenceMixer, {"gate_soft_cap": 0.0}, "`gate_soft_cap` must be positive; got 0.0"),
        (MLSTMSequenceMixer, {"value_dim": 0}, "`value_dim` must be .* at least 1; got 0"),
    ],
)
def test_unfit_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(4, jr.key(0), **options)


def test_whole_numbers_are_where_gates_start():
    make = lambda bias: MLSTMSequenceMixer(4, jr.key(0), num_heads=2, input_bias=bias)
    assert eqx.tree_equal(make(-10), make(-10.0))


def test_closed_gates_have_finite_gradients():
    ones = jnp.ones((3, 1, 2))
    read = lambda i, f: jnp.sum(ops.mlstm(ones, ones, ones, i, f)[0])
    closed = jnp.full((3, 1), -200.0)
    gradients = jax.jit(jax.grad(read, argnums=(0, 1)))(closed, closed)
    assert_close(gradients, (jnp.zeros((3, 1)), jnp.zeros((3, 1))), 0)
