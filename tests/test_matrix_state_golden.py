"""Operations on a matrix state against the numbers of the original implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_file import Golden
from helpers import assert_close

from discretax.ops import delta_rule, gated_linear_attention, mlstm

NAMES = (
    "fla_comba",
    "fla_comba_naiverec",
    "fla_deltanet",
    "fla_deltanet_neg",
    "fla_dplr",
    "fla_gated_deltanet",
    "fla_gated_deltanet_neg",
    "fla_gated_deltaproduct_nh2",
    "fla_gated_deltaproduct_nh3",
    "fla_gdn2",
    "fla_gla",
    "fla_hgrn2",
    "fla_kda",
    "fla_kda_lb",
    "fla_lightning",
    "fla_retention",
    "fla_simple_gla",
    "rwkv7_recurrence",
    "hf_mlstm_cell",
)
HEADS_FIRST = ("fla_deltanet", "fla_dplr", "hf_mlstm_cell")  # (heads, time, ...) in these files
NOT_INPUTS = ("y", "w", "y_f32", "final_state", "g_log", "C_final", "n_final", "m_final")


def as_called_here(name, a):
    """The operation and its arguments, from one sequence's inputs by the original's names."""
    if name.startswith("hf_mlstm_cell"):
        C, n, m = (a.get(name) for name in ("C0", "n0", "m0"))
        state = None if C is None else (jnp.concatenate([C, n[..., None]], -1), m[:, 0])
        scale = a["q"].shape[-1] ** -0.5
        return mlstm(a["q"], a["k"], a["v"], a["i"], a["f"], state, scale=scale)
    S0 = a.get("initial_state")
    if name.startswith("rwkv7"):  # its state is (value, key)
        nothing = jnp.zeros_like(a["k"])
        in_two = lambda first, second: jnp.stack([first, second], 1)
        y, S = delta_rule(
            a["r"],
            in_two(a["b"], a["k"]),
            in_two(nothing, a["v"]),
            None,
            -jnp.exp(a["w_raw"]),
            None if S0 is None else S0.mT,
            erase=in_two(-a["a"], nothing),
            erase_first=True,
        )
        return y, S.mT
    options = {"initial_state": S0, "scale": a.get("q", a.get("q_raw")).shape[-1] ** -0.5}
    if "hgrn2" in name:
        bound = a["lower_bound"][None]
        f = bound + (1 - bound) * jax.nn.sigmoid(a["f_raw"])
        q = jax.nn.silu(a["q_raw"])
        return gated_linear_attention(q, 1 - f, a["i"], None, jnp.log(f), **options)
    q, k, v = a["q"], a["k"], a["v"]
    heads = np.arange(q.shape[1])
    if "fla_dplr" in name:
        in_two = lambda first, second: jnp.stack([first, second], 1)
        nothing = jnp.zeros_like(k)
        return delta_rule(
            q,
            in_two(a["beta"], k),
            in_two(jnp.zeros_like(v), v),
            None,
            a["gk"],
            erase=in_two(-a["alpha"], nothing),
            erase_first=True,
            **options,
        )
    if "deltaproduct" in name:
        steps = lambda array: array.reshape(q.shape[0], -1, *array.shape[1:])
        return delta_rule(q, steps(k), steps(v), steps(a["beta"]), a["g"], **options)
    if "gdn2" in name:
        return delta_rule(q, k, a["w_gate"] * v, None, a["g"], erase=a["b"] * k, **options)
    if "comba" in name:
        first = "naiverec" not in name
        return delta_rule(q, k, v, a["beta"], a["g"], erase=a["p"], erase_first=first, **options)
    if "kda_lb" in name:
        bias = a["dt_bias"].reshape(a["g_raw"].shape[1:])
        decay = -5 * jax.nn.sigmoid(jnp.exp(a["A_log"])[None, :, None] * (a["g_raw"] + bias[None]))
        return delta_rule(q, k, v, a["beta"], decay, **options)
    if "gla" in name:
        return gated_linear_attention(q, k, v, None, a.get("gk", a.get("g")), **options)
    if "retention" in name or "lightning" in name:
        slope = (
            -(8 / len(heads)) * 0.75 * heads
            if "lightning" in name
            else np.log1p(-(2.0 ** (-5 - heads)))
        )
        return gated_linear_attention(q, k, v, None, jnp.asarray(slope, q.dtype), **options)
    return delta_rule(q, k, v, a["beta"], a.get("g"), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float64", 1e-10),
        pytest.param("float32", 1e-5, marks=pytest.mark.thorough),  # the mixers' own are tried so
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_is_the_original(name, dtype, tolerance):
    """From nothing, and from a state of its own."""
    in_time = lambda array: jnp.moveaxis(array, 0, 1) if heads_first(array) else array
    heads_first = lambda array: name.startswith(HEADS_FIRST) and array.shape[1:2] == (64,)
    batched = {"A_log": None, "dt_bias": None, "lower_bound": None}

    def one(arrays):
        y, state = as_called_here(name, {n: in_time(x) for n, x in arrays.items()})
        return (jnp.moveaxis(y, 1, 0) if name.startswith(HEADS_FIRST) else y), state

    def loss(inputs, w):
        y, state = jax.vmap(one, ({n: batched.get(n, 0) for n in inputs},))(inputs)
        return jnp.sum(y * w), (y, state)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    with jax.enable_x64(dtype == "float64"):
        for start in ("", "_s0"):
            golden = Golden(f"{name}{start}_L64", dtype)
            inputs = {n: golden[n] for n in golden.arrays if n not in NOT_INPUTS and n[:2] != "g."}
            nothing = {}
            if not start and name != "hf_mlstm_cell":  # so that both are compiled once
                nothing = {"initial_state": np.zeros_like(golden["final_state"])}
            (_, (y, state)), gradients = run(nothing | inputs, golden["w"])
            if name == "hf_mlstm_cell":
                memory, m = state
                state = (memory[..., :-1], memory[..., -1], m[..., None])
                expected = tuple(golden[n] for n in ("C_final", "n_final", "m_final"))
            else:
                expected = golden["final_state"]
            assert_close(y, golden["y"], tolerance)
            assert_close(state, expected, tolerance)
            for n in inputs:
                assert_close(gradients[n], golden[f"g.{n}"], tolerance)
