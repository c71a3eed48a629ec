"""Mixers of the delta rule against the layers of the original implementations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from helpers import assert_close

from discretax.sequence_mixers import (
    CombaSequenceMixer,
    DeltaNetSequenceMixer,
    GatedDeltaNetSequenceMixer,
    GatedDeltaProductSequenceMixer,
    KimiDeltaAttentionSequenceMixer,
)


def namesake_norm(x):
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def weights(mixer):
    """All of a mixer's arrays, in the order in which `ORIGINALS` name them."""
    projections, output = mixer.projections, mixer.output
    yield from (projections.q_proj.weight, projections.k_proj.weight, projections.v_proj.weight)
    if projections.conv_weight is not None:
        yield projections.conv_weight
    yield mixer.beta_proj.weight
    if isinstance(mixer, GatedDeltaNetSequenceMixer | GatedDeltaProductSequenceMixer):
        yield from (mixer.decay_proj.weight, mixer.A_log, mixer.dt_bias, output.gate_proj.weight)
    if isinstance(mixer, KimiDeltaAttentionSequenceMixer):
        yield from (mixer.decay_proj.down.weight, mixer.decay_proj.up.weight)
        yield from (mixer.A_log, mixer.dt_bias)
        yield from (output.gate_proj.down.weight, output.gate_proj.up.weight)
    if output.norm_weight is not None:
        yield output.norm_weight
    yield output.out_proj.weight


def qwen3_5(p):
    return (
        *jnp.split(p["in_proj_qkv.weight"], (10, 20)),
        p["conv1d.weight"][:, 0],
        *(p[f"in_proj_{n}.weight"] for n in "ba"),
        p["A_log"],
        p["dt_bias"],
        *(p[f"{n}.weight"] for n in ("in_proj_z", "norm", "out_proj")),
    )


def olmo_hybrid(p):
    return (
        *(p[f"{n}_proj.weight"] for n in "qkv"),
        p["conv1d.weight"][:, 0],
        *(p[f"{n}_proj.weight"] for n in "ba"),
        p["A_log"],
        p["dt_bias"],
        *(p[f"{n}.weight"] for n in ("g_proj", "o_norm", "o_proj")),
    )


def qwen3_next(p):
    """For each head of keys: its query, key, two values and two gates."""
    per_head = p["in_proj_qkvz.weight"].reshape(2, -1, 16)
    q, k, v, z = (part.reshape(-1, 16) for part in jnp.split(per_head, (4, 8, 16), axis=1))
    b, a = (
        part.reshape(-1, 16) for part in jnp.split(p["in_proj_ba.weight"].reshape(2, 4, 16), 2, 1)
    )
    rest = (p[n] for n in ("norm.weight", "out_proj.weight"))
    return q, k, v, p["conv1d.weight"][:, 0], b, a, p["A_log"], p["dt_bias"], z, *rest


def kimi_linear(p):
    gate = {
        n: p[f"forget_gate.{n}"] for n in ("f_a_proj.weight", "f_b_proj.weight", "A_log", "dt_bias")
    }
    return (
        *(p[f"{n}_proj.weight"] for n in "qkv"),
        p["conv1d.weight"][:, 0],
        p["b_proj.weight"],
        gate["f_a_proj.weight"],
        gate["f_b_proj.weight"],
        gate["A_log"].reshape(-1),
        gate["dt_bias"].reshape(2, 8),
        *(p[f"{n}.weight"] for n in ("g_a_proj", "g_b_proj", "o_norm", "o_proj")),
    )


ORIGINALS = {
    "dx_deltanet_L56": (
        DeltaNetSequenceMixer,
        {
            "num_heads": 2,
            "head_dim": 4,
            "conv_width": None,
            "shared_beta": True,
            "output_norm": False,
            "scale": 1.0,
            "activation": None,
            "key_norm": namesake_norm,
        },
        lambda p: [p[f"{n}_proj.weight"] for n in ("q", "k", "v", "beta", "out")],
    ),
    "hf_qwen3_5_gdn_L48": (
        GatedDeltaNetSequenceMixer,
        {"num_heads": 2, "num_value_heads": 4, "head_dim": 5, "value_dim": 6, "norm_eps": 1e-6},
        qwen3_5,
    ),
    "hf_olmo_hybrid_gdn_L48": (
        GatedDeltaNetSequenceMixer,
        {"num_heads": 3, "head_dim": 5, "value_dim": 7, "negative_eigenvalues": True},
        olmo_hybrid,
    ),
    "hf_qwen3_next_gdn_L48": (
        GatedDeltaNetSequenceMixer,
        {"num_heads": 2, "num_value_heads": 4, "head_dim": 4, "value_dim": 4, "norm_eps": 1e-6},
        qwen3_next,
    ),
    "hf_kimi_linear_kda_L48": (
        KimiDeltaAttentionSequenceMixer,
        {"num_heads": 2, "head_dim": 8, "gate_bias": False},
        kimi_linear,
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-5)])
@pytest.mark.parametrize("name", ORIGINALS)
def test_is_the_original(name, dtype, tolerance):
    make, options, arrange = ORIGINALS[name]
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        params, x = golden.fields("p"), golden["x"]
        blank = make(x.shape[-1], jr.key(0), **options)

        def loss(params, x):
            mixer = eqx.tree_at(lambda mixer: list(weights(mixer)), blank, list(arrange(params)))
            y = jax.vmap(lambda x: mixer(x)[0])(x)
            return jnp.sum(y * golden["w"]), y

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, y), (d_params, d_x) = run(params, x)
        expected = golden.fields("g.p")
        for actual, stored in ((y, golden["y"]), (d_x, golden["g.x"])):
            assert_close(actual, stored, tolerance)
        assert expected
        for n, stored in expected.items():
            assert_close(d_params[n], stored, tolerance)


def test_one_step_of_the_product_is_the_gated_delta_net():
    options = {"num_heads": 2, "head_dim": 3, "negative_eigenvalues": True}
    one = GatedDeltaNetSequenceMixer(5, jr.key(0), **options)
    product = GatedDeltaProductSequenceMixer(5, jr.key(1), num_steps=1, **options)
    product = eqx.tree_at(lambda mixer: list(weights(mixer)), product, list(weights(one)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5)), jnp.float32)
    assert_close(product(x)[0], one(x)[0], 1e-6)


def test_comba_erases_before_the_decay():
    """Against its equation, one sample after the other, in NumPy."""
    with jax.enable_x64(True):
        mixer = CombaSequenceMixer(
            4, jr.key(0), num_heads=1, head_dim=3, conv_width=None, dt_min=0.1
        )
        x = np.random.default_rng(0).normal(size=(7, 4))
        y, cache = mixer(jnp.asarray(x))
        p, at = mixer.projections, lambda layer: x @ np.asarray(layer.weight).T
        sigmoid, silu = lambda a: 1 / (1 + np.exp(-a)), lambda a: a / (1 + np.exp(-a))
        unit = lambda a: a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6)
        q, k, v = (silu(at(layer)) for layer in (p.q_proj, p.k_proj, p.v_proj))
        inner = sigmoid(np.asarray(mixer.inner_decay)[0])
        r = unit(q - np.asarray(mixer.correction)[0] * inner * k)
        k = unit(k)
        beta = sigmoid(at(mixer.beta_proj))
        A_log, dt_bias = np.asarray(mixer.A_log), np.asarray(mixer.dt_bias)
        log_decay = -np.exp(A_log) * np.log1p(np.exp(at(mixer.decay_proj) + dt_bias))
        S, ys = np.zeros((3, 6)), []
        for t in range(7):
            written = beta[t] * (v[t] - inner * S.T @ k[t])
            S = np.exp(log_decay[t]) * S + np.outer(k[t], written)
            ys.append(S.T @ r[t] / np.sqrt(3))
        ys = np.stack(ys)
        ys = ys / np.sqrt((ys**2).mean(-1, keepdims=True) + 1e-5)
        ys = ys * sigmoid(at(mixer.output.gate_proj))
        assert_close(y, ys @ np.asarray(mixer.output.out_proj.weight).T, 1e-12)
        assert_close(cache.state[0], S, 1e-12)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            GatedDeltaNetSequenceMixer,
            {"num_heads": 2, "num_value_heads": 3},
            "multiple of .*; got 3 and 2",
        ),
        (GatedDeltaNetSequenceMixer, {"num_heads": 3}, r"must divide in_features = 4; got 3"),
        (
            GatedDeltaNetSequenceMixer,
            {"A_init_range": (0.0, 1.0)},
            r"0 < low <= high; got \(0.0, 1.0\)",
        ),
        (
            KimiDeltaAttentionSequenceMixer,
            {"lower_bound": 0.0},
            "`lower_bound` .* negative.*; got 0.0",
        ),
        (
            GatedDeltaProductSequenceMixer,
            {"num_steps": 0},
            "`num_steps` must be .* at least 1; got 0",
        ),
        (DeltaNetSequenceMixer, {"head_dim": 0}, "`head_dim` must be .* at least 1; got 0"),
        (DeltaNetSequenceMixer, {"norm_eps": 0.0}, "`norm_eps` must be positive; got 0.0"),
    ],
)
def test_unfit_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(4, jr.key(0), **options)
