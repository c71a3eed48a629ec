"""S4 and S4D: the numbers of the original implementations, their initialisation, their errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from golden_file import Golden
from test_golden import assert_close, value_and_gradients

from discretax.sequence_mixers import S4DSequenceMixer, S4SequenceMixer

FIELDS = ("A_real", "A_imag", "B", "C", "D", "inv_dt")
ROUTES = ("scan", "chunks", "fft")


def planes(golden, name):
    """A golden complex array over the half of the states as our cache."""
    return jnp.stack([golden[f"{name}.re"], golden[f"{name}.im"]], axis=-2)


def golden_leaves(golden, kind, fields):
    arrays = golden.fields(kind, "kernel.")
    arrays["D"] = golden.fields(kind)["D"]
    arrays["B"] = arrays["B"][0]
    return [arrays[name] for name in fields]


def build(name, route):
    if "dplr" in name:
        return S4SequenceMixer(6, jr.key(0), state_dim=8, route=route), (*FIELDS, "P")
    mixer = S4DSequenceMixer(
        6,
        jr.key(0),
        state_dim=8,
        n_ssm=2 if "nssm2" in name else None,
        discretization=name.split("_")[2],
        route=route,
    )
    return mixer, FIELDS


def load(name, golden, route=None):
    mixer, fields = build(name, route)
    leaves = lambda m: [getattr(m, field) for field in fields]
    return eqx.tree_at(leaves, mixer, golden_leaves(golden, "p", fields)), fields


S4D = ("s4_s4d_zoh_diag-lin_L56", "s4_s4d_bilinear_diag-inv_L56", "s4_s4d_zoh_legs_nssm2_L56")
S4 = ("s4_s4dplr_legs_L56", "s4_s4dplr_legs_lmax64_L56")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", S4D)
def test_s4d(name, dtype, route):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        mixer, fields = load(name, golden, route)
        run = lambda mixer, x: jax.vmap(lambda x: mixer(x)[0])(x)
        y, d_mixer, d_x = value_and_gradients(run, mixer, golden)
        assert_close(y, golden["y"], dtype)
        assert_close(d_x, golden["g.x"], dtype)
        expected = golden_leaves(golden, "g.p", fields)
        for field, gradient in zip(fields, expected, strict=True):
            assert_close(getattr(d_mixer, field), gradient, dtype)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", S4)
def test_s4(name, dtype, route):
    """The original trains C~ = (I - A_bar^L)^T C, here a function of C and of the rest."""
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        mixer, _ = load(name, golden, route)
        run = lambda mixer, x: jax.vmap(lambda x: mixer(x)[0])(x)
        y, d_mixer, d_x = value_and_gradients(run, mixer, golden)
        assert_close(y, golden["y"], dtype)
        assert_close(d_x, golden["g.x"], dtype)
        assert_close(d_mixer.D, golden["g.p.D"], dtype)


@pytest.mark.parametrize("name", S4D + S4)
def test_kernel_and_discrete_matrices(name):
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        mixer, _ = load(name, golden)
        assert_close(jnp.moveaxis(mixer.compute_kernel(56), 0, -1), golden["K"], "float64")
        A_bar, B_bar, C = mixer.discretize()
        assert_close(A_bar.real, golden["dA.re"], "float64")
        assert_close(A_bar.imag, golden["dA.im"], "float64")
        assert_close(B_bar.imag, golden["dB.im"], "float64")
        scale = 1 if name in S4 else 2
        assert_close(C.real, scale * golden["dC.re"], "float64")
        assert_close(C.imag, scale * golden["dC.im"], "float64")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", S4D + S4)
def test_initial_and_final_state(name, route):
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        mixer, _ = load(name, golden, route)
        y, state = jax.jit(jax.vmap(mixer))(golden["x"], planes(golden, "state0"))
        assert_close(y, golden["y_with_state0"], "float64")
        assert_close(state, planes(golden, "next_state"), "float64")


@pytest.mark.parametrize("name", S4D + S4)
def test_steps(name):
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        mixer, _ = load(name, golden)

        def run(x):
            cache = mixer.allocate_inference_cache()
            return jax.lax.scan(lambda c, u: mixer.step(u, c)[::-1], cache, x)

        state, y = jax.jit(jax.vmap(run))(golden["x"])
        assert_close(y, golden["y_step"], "float64")
        final = planes(golden, "final_state_step")
        assert_close(state, final[..., :4], "float64")
