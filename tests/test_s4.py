"""S4 and S4D: the numbers of the original implementations, their initialisation, their errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from jax.test_util import check_grads
from test_golden import assert_close, golden_gradients

from discretax.init import diagonalised_hippo, hippo
from discretax.models import S4
from discretax.ops._depthwise_ssm import depthwise_ssm
from discretax.ops._depthwise_ssm.matrices import boundary_states
from discretax.ops._depthwise_ssm.transition import DiagonalPower, Transition
from discretax.sequence_mixers import S4DSequenceMixer, S4SequenceMixer

run = eqx.filter_jit(lambda mixer, x, cache=None: mixer(x, cache))
kernel = eqx.filter_jit(lambda mixer, length: mixer.compute_kernel(length))
discretize = eqx.filter_jit(lambda mixer: tuple(mixer.discretize()))
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


S4D_FILES = ("s4_s4d_zoh_diag-lin_L56", "s4_s4d_bilinear_diag-inv_L56", "s4_s4d_zoh_legs_nssm2_L56")
S4_FILES = ("s4_s4dplr_legs_L56", "s4_s4dplr_legs_lmax64_L56")


@pytest.mark.parametrize(
    ("dtype", "route"), [("float32", "chunks"), *(("float64", route) for route in ROUTES)]
)
@pytest.mark.parametrize("name", S4D_FILES)
def test_s4d(name, dtype, route):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        mixer, fields = load(name, golden, route)
        batched = lambda mixer, x: jax.vmap(lambda x: mixer(x)[0])(x)
        d_mixer = golden_gradients(batched, mixer, golden, dtype)
        expected = golden_leaves(golden, "g.p", fields)
        for field, gradient in zip(fields, expected, strict=True):
            assert_close(getattr(d_mixer, field), gradient, dtype)


@pytest.mark.parametrize(
    ("dtype", "route"), [("float32", "chunks"), *(("float64", route) for route in ROUTES)]
)
@pytest.mark.parametrize("name", S4_FILES)
def test_s4(name, dtype, route):
    """The original trains C~ = (I - A_bar^L)^T C, a function of C and of the other parameters; its
    gradients are those at a constant C~."""
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        mixer, _ = load(name, golden, route)
        fields = ("A_real", "A_imag", "B", "P", "D", "inv_dt")
        length = 64 if "lmax64" in name else 56

        def layer(arguments, x):
            parameters, C_tilde = arguments
            system = eqx.tree_at(lambda m: [getattr(m, f) for f in fields], mixer, parameters)
            A_bar = system.discretize().A_bar  # acts on the states, then their conjugates
            truncate = jnp.eye(8, dtype=A_bar.dtype)[None] - jnp.linalg.matrix_power(A_bar, length)
            C_tilde = jax.lax.complex(C_tilde[..., 0], C_tilde[..., 1])
            pairs = jnp.concatenate([C_tilde, C_tilde.conj()], axis=-1)[..., None]
            C = jnp.linalg.solve(truncate.swapaxes(-1, -2)[None], pairs)[..., :4, 0]
            system = eqx.tree_at(lambda m: m.C, system, jnp.stack([C.real, C.imag], axis=-1))
            return jax.vmap(lambda x: system(x)[0])(x)

        arguments = (golden_leaves(golden, "p", fields), golden["C_tilde"])
        d_parameters, d_C_tilde = golden_gradients(layer, arguments, golden, dtype)
        assert_close(d_C_tilde, golden["g.p.(C_tilde).kernel.C"], dtype)
        expected = golden_leaves(golden, "g.p", fields)
        for actual, gradient in zip(d_parameters, expected, strict=True):
            assert_close(actual, gradient, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", S4D_FILES + S4_FILES)
def test_kernel_and_discrete_matrices(name):
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        mixer, _ = load(name, golden)
        assert_close(jnp.moveaxis(kernel(mixer, 56), 0, -1), golden["K"], "float64")
        A_bar, B_bar, C = discretize(mixer)
        assert_close(A_bar.real, golden["dA.re"], "float64")
        assert_close(A_bar.imag, golden["dA.im"], "float64")
        assert_close(B_bar.imag, golden["dB.im"], "float64")
        scale = 1 if name in S4_FILES else 2
        assert_close(C.real, scale * golden["dC.re"], "float64")
        assert_close(C.imag, scale * golden["dC.im"], "float64")


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", S4D_FILES + S4_FILES)
def test_initial_and_final_state(name, route):
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        mixer, _ = load(name, golden, route)
        y, state = jax.jit(jax.vmap(mixer))(golden["x"], planes(golden, "state0"))
        assert_close(y, golden["y_with_state0"], "float64")
        assert_close(state, planes(golden, "next_state"), "float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", S4D_FILES + S4_FILES)
def test_steps(name):
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        mixer, _ = load(name, golden)

        def steps(x):
            cache = mixer.allocate_inference_cache()
            return jax.lax.scan(lambda c, u: mixer.step(u, c)[::-1], cache, x)

        state, y = jax.jit(jax.vmap(steps))(golden["x"])
        assert_close(y, golden["y_step"], "float64")
        final = planes(golden, "final_state_step")
        assert_close(state, final[..., :4], "float64")


# S4D as written in two other places: D apart, B one, the signs of the imaginary part


def minimal(mixer, arrays):
    """The standalone S4D's (or, without D, the other discretax's) parameters, differentiably."""
    real = arrays["kernel.log_A_real" if "kernel.log_A_real" in arrays else "kernel.log_a_real"]
    C = arrays.get("kernel.C")
    if C is None:
        C = jnp.stack([arrays["kernel.C.re"], arrays["kernel.C.im"]], axis=-1)
    D = arrays.get("D", jnp.zeros(6, C.dtype))
    return eqx.tree_at(
        lambda m: [m.A_real, m.A_imag, m.C, m.D, m.inv_dt],
        mixer,
        [real, -arrays["kernel.A_imag"], C[None], D[None], arrays["kernel.log_dt"][:, None]],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s4_s4dminimal_L56", "dx_s4d_L56"])
def test_other_s4d(name):
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        mixer = S4DSequenceMixer(6, jr.key(0), state_dim=8)

        def layer(arrays, x):
            y = jax.vmap(lambda x: minimal(mixer, arrays)(x)[0])(x)
            if name.startswith("dx"):
                return y
            weight, bias = arrays["output_linear.0.weight"], arrays["output_linear.0.bias"]
            a, b = jnp.split(
                jax.nn.gelu(y, approximate=False) @ weight[:, :, 0].T + bias[None, None], 2, axis=-1
            )
            return a * jax.nn.sigmoid(b)

        d_arrays = golden_gradients(layer, golden.fields("p"), golden, "float64")
        for key, expected in golden.fields("g.p").items():
            assert_close(d_arrays[key], expected, "float64")


@pytest.mark.slow
def test_the_block_of_s4():
    """GLU(Linear(gelu(S4(x)))), without norm or residual."""
    with jax.enable_x64(True):
        golden = Golden("s4_s4block_dplr_L56", "float64")
        model = S4(jr.key(0), hidden_dim=6, num_blocks=1, state_dim=8, norm=None, drop_rate=0)
        arrays = golden.fields("p", "layer.kernel.")
        arrays["B"], arrays["D"] = arrays["B"][0], golden["p.layer.D"]
        fields = (*FIELDS, "P")
        weights = jnp.split(golden["p.output_linear.0.weight"], 2)
        biases = jnp.split(golden["p.output_linear.0.bias"], 2)
        block = eqx.tree_at(
            lambda b: [
                *(getattr(b.sequence_mixer, field) for field in fields),
                *(b.channel_mixer.w1.weight, b.channel_mixer.w2.weight),
                *(b.channel_mixer.w1.bias, b.channel_mixer.w2.bias),
            ],
            model.blocks[0],
            [*(arrays[field] for field in fields), *weights, *biases],
        )
        state = eqx.nn.State(block)
        y = jax.jit(jax.vmap(lambda x: block(x, state)[0] - x))(golden["x"])
        assert_close(y, golden["y"], "float64")


# Initialisation


@pytest.mark.parametrize("measure", ["legs", "legt", "fourier"])
@pytest.mark.parametrize("state_dim", [4, 16])
def test_hippo_is_normal_plus_low_rank(measure, state_dim):
    A, _, P = hippo(measure, state_dim)
    Lambda, V = diagonalised_hippo(measure, state_dim)
    half = slice(state_dim // 2)
    normal = 2 * ((V[:, half] * Lambda[half]) @ V[:, half].conj().T).real
    np.testing.assert_allclose(normal - P.T @ P, A, atol=1e-10)
    np.testing.assert_allclose(Lambda.real, -0.5 if measure == "legs" else 0, atol=1e-10)
    assert np.linalg.eigvals(A).real.max() < 1e-10


def test_hippo_legs_remembers_the_input():
    """What HiPPO is for: its state, in the Legendre basis, is the past.

    The translated measure keeps the coefficients of the last two units of time; they rebuild a
    smooth signal.
    """
    A, B, _ = hippo("legt", 12)
    steps, window = 4000, 2.0
    dt = 6.0 / steps
    times = np.arange(1, steps + 1) * dt
    signal = np.sin(1.3 * times) + 0.4 * np.cos(2.1 * times)
    solve = np.linalg.inv(np.eye(12) - dt / 2 * A)
    A_bar, B_bar = solve @ (np.eye(12) + dt / 2 * A), solve @ B * dt
    h = np.zeros(12)
    for sample in signal:
        h = A_bar @ h + B_bar * sample
    recent = times > times[-1] - window
    past = 1 - 2 * (times[-1] - times[recent]) / window  # 1 now, -1 at the end of the window
    root = np.sqrt(2 * np.arange(12) + 1)
    rebuilt = np.polynomial.legendre.legval(past, h * root)
    assert np.abs(rebuilt - signal[recent]).max() < 0.02


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("lin", -0.5 + 1j * np.pi * np.arange(4)),
        ("inv", -0.5 + 1j * 8 / np.pi * (8 / (2 * np.arange(4) + 1) - 1)),
        ("quad", -0.5 + 1j / np.pi * (1 + 2 * np.arange(4)) ** 2),
        ("real", -(np.arange(4) + 1.0)),
        (
            "legs",
            np.linalg.eigvals(hippo("legs", 8)[0] + np.outer(*hippo("legs", 8)[2].repeat(2, 0))),
        ),
    ],
)
@pytest.mark.parametrize("real_transform", ["exp", "softplus", "relu", "none"])
def test_initial_eigenvalues(init, expected, real_transform):
    with jax.enable_x64(True):
        mixer = S4DSequenceMixer(
            2, jr.key(0), state_dim=8, init=init, real_transform=real_transform, dt_max=0.1
        )
        dt = np.exp(np.asarray(mixer.inv_dt))
        A = np.log(np.asarray(discretize(mixer)[0])) / dt
        expected = expected[np.imag(expected) >= 0]
        for row in A.conj():
            np.testing.assert_allclose(np.sort(row.real), np.sort(expected.real), atol=1e-6)
            np.testing.assert_allclose(np.sort(row.imag), np.sort(expected.imag), atol=2e-4)


@pytest.mark.parametrize("make", [S4DSequenceMixer, S4SequenceMixer])
@pytest.mark.parametrize("dt_transform", ["exp", "softplus"])
def test_deterministic_start(make, dt_transform):
    """Steps spread evenly in logarithm; nothing but D depends on the key."""
    with jax.enable_x64(True):
        one, other = (
            make(4, jr.key(k), state_dim=6, dt_transform=dt_transform, deterministic=True)
            for k in (0, 1)
        )
        raw = np.asarray(one.inv_dt[:, 0])
        dt = np.exp(raw) if dt_transform == "exp" else np.log1p(np.exp(raw))
        np.testing.assert_allclose(dt, np.geomspace(0.001, 0.1, 4), rtol=1e-12)
        for field in ("inv_dt", "A_real", "A_imag", "B", "C"):
            assert (getattr(one, field) == getattr(other, field)).all()


def test_deterministic_readout_is_the_first_coefficient():
    """C reads the zeroth HiPPO-LegS coefficient, whatever basis the states are held in."""
    with jax.enable_x64(True):
        mixer = S4SequenceMixer(1, jr.key(0), state_dim=6, deterministic=True)
        A, B, _ = hippo("legs", 6)
        dt = float(jnp.exp(mixer.inv_dt[0, 0]))
        solve = np.linalg.inv(np.eye(6) - dt / 2 * A)
        h, expected = solve @ B * dt, []
        for _ in range(5):
            expected.append(h[0])
            h = solve @ (np.eye(6) + dt / 2 * A) @ h
        np.testing.assert_allclose(kernel(mixer, 5)[:, 0, 0], expected, rtol=1e-10)


# Options


def test_real_states_are_moving_averages():
    with jax.enable_x64(True):
        mixer = S4DSequenceMixer(2, jr.key(0), state_dim=3, init="real", is_real=True)
        x = jr.normal(jr.key(1), (9, 2))
        decay = np.exp(-np.exp(np.asarray(mixer.inv_dt)) * np.arange(1, 4))
        gain = (1 - decay) / np.arange(1, 4) * np.asarray(mixer.B)
        h, ys = np.zeros((2, 3)), []
        for sample in np.asarray(x):
            h = decay * h + gain * sample[:, None]
            ys.append(2 * (np.asarray(mixer.C[0]) * h).sum(1) + np.asarray(mixer.D[0]) * sample)
        np.testing.assert_allclose(run(mixer, x)[0], ys, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("make", [S4DSequenceMixer, S4SequenceMixer])
@pytest.mark.parametrize("route", ["chunks", "fft", "scan"])
def test_channels_are_readouts_of_one_state(make, route):
    with jax.enable_x64(True):
        mixer = make(3, jr.key(0), state_dim=4, channels=2, n_ssm=1, route=route)
        x = jr.normal(jr.key(1), (7, 3))
        y, cache = run(mixer, x)
        assert y.shape == (7, 6)
        for channel in range(2):
            one = eqx.tree_at(
                lambda m: (m.C, m.D), mixer, (mixer.C[channel, None], mixer.D[channel, None])
            )
            y_one, cache_one = run(one, x)
            np.testing.assert_allclose(y[:, 3 * channel : 3 * channel + 3], y_one, atol=1e-12)
            np.testing.assert_allclose(cache, cache_one, atol=1e-12)
        step = eqx.filter_jit(lambda mixer, u: mixer.step(u, mixer.allocate_inference_cache()))
        sample, _ = step(mixer, x[0])
        np.testing.assert_allclose(sample, y[0], atol=1e-12)


def test_higher_rank_and_untied_steps():
    """LegT needs rank 2, and a step per state is Delta A with Delta on the left."""
    with jax.enable_x64(True):
        mixer = S4SequenceMixer(1, jr.key(0), state_dim=4, init="legt", rank=3, dt_tie=False)
        P = np.asarray(mixer.P[..., 0]) + 1j * np.asarray(mixer.P[..., 1])
        P = np.concatenate([P, P], -1)[:, 0]
        P[:, 2:] = P[:, :2].conj()
        Lambda = -np.exp(mixer.A_real[0]) - 1j * np.asarray(mixer.A_imag[0])
        A = np.diag(np.concatenate([Lambda, Lambda.conj()])) - P.T @ P.conj()
        A = np.tile(np.exp(np.asarray(mixer.inv_dt[0])), 2)[:, None] * A
        A_bar, _, _ = discretize(mixer)
        expected = np.linalg.inv(np.eye(4) - A / 2) @ (np.eye(4) + A / 2)
        np.testing.assert_allclose(A_bar[0], expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_states_between_chunks(backend, monkeypatch):
    """As complex numbers, by whichever loop the backend prefers; and their gradient by differences."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.enable_x64(True):
        power, h0, v = (
            jr.normal(key, shape) / 2
            for key, shape in zip(
                jr.split(jr.key(0), 3), [(2, 2, 3), (2, 2, 3), (2, 5, 6)], strict=True
            )
        )
        run = lambda power, h0, v: boundary_states(DiagonalPower(power), v, h0)
        before, after = run(power, h0, v)
        number = lambda planes: np.asarray(planes)[..., :3] + 1j * np.asarray(planes)[..., 3:]
        h = number(h0.reshape(2, 6))
        for m in range(5):
            np.testing.assert_allclose(number(before[m]), h, atol=1e-14)
            h = number(power.reshape(2, 6)) * h + number(v[:, m])
        np.testing.assert_allclose(number(after), h, atol=1e-14)
        loss = lambda *arrays: sum(jnp.sum(jnp.sin(states)) for states in run(*arrays))
        check_grads(loss, (power, h0, v), order=1, modes=["rev"], eps=1e-5)


@pytest.mark.slow
def test_powers_of_a_low_rank_transition():
    """As matrices: what they make of vectors from both sides, and states between chunks."""
    with jax.enable_x64(True):
        shapes = (2, 2, 3), (2, 2, 3, 2), (2, 2, 2, 3), (2, 2, 3), (2, 2, 2, 3), (2, 4, 6)
        keys = jr.split(jr.key(0), len(shapes))
        draws = [jr.normal(key, shape) / 3 for key, shape in zip(keys, shapes, strict=True)]
        *transition, right, left, inputs = draws

        @jax.jit
        def run(transition, right, left, inputs):
            transition = Transition(*transition)
            rights, lefts, power = transition.krylov(right, left, 5)
            before, after = boundary_states(power, inputs, right)
            return rights, lefts, power.matrix, before, after, power.lefts(left, 3)

        rights, lefts, power, before, after, lefts_of_power = run(transition, right, left, inputs)
        units = np.eye(6).reshape(6, 2, 3)
        one = jax.vmap(lambda h: Transition(*transition)(jnp.stack([h, h])), out_axes=-1)(units)
        one = np.asarray(one).reshape(2, 6, 6)
        power_of = np.linalg.matrix_power
        flat = lambda planes: np.asarray(planes).reshape(*planes.shape[:-2], 6)
        for j in range(5):
            np.testing.assert_allclose(
                rights[j], np.einsum("fst,ft->fs", power_of(one, j), flat(right)), atol=1e-14
            )
            np.testing.assert_allclose(
                lefts[j], np.einsum("cfs,fst->cft", flat(left), power_of(one, j + 1)), atol=1e-14
            )
        np.testing.assert_allclose(power, power_of(one, 5), atol=1e-14)
        h = flat(right)
        for m in range(4):
            np.testing.assert_allclose(before[m], h, atol=1e-14)
            h = np.einsum("fst,ft->fs", power_of(one, 5), h) + inputs[:, m]
        np.testing.assert_allclose(after, h, atol=1e-14)
        for j in range(3):
            expected = np.einsum("cfs,fst->cft", flat(left), power_of(one, 5 * j))
            np.testing.assert_allclose(lefts_of_power[j], expected, atol=1e-14)
        loss = lambda *draws: sum(jnp.sum(jnp.sin(leaf)) for leaf in run(draws[:3], *draws[3:]))
        check_grads(loss, tuple(draws), order=2, modes=["fwd", "rev"], eps=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("features", [2, 4], ids=["whole", "blocks of features"])
@pytest.mark.parametrize("make", [S4DSequenceMixer, S4SequenceMixer])
def test_long_sequences(make, features, monkeypatch):
    """Several segments of several chunks, the last of each unfilled, with any number valid."""
    for name, size in {"LONG": 40, "BLOCK": 2, "SEGMENT": 128}.items():
        monkeypatch.setattr(depthwise_ssm, name, size)
    with jax.enable_x64(True):
        mixers = [
            make(features, jr.key(0), state_dim=4, channels=2, route=route)
            for route in ("chunks", "scan")
        ]
        x = jr.normal(jr.key(1), (2 * 128 + 77, features))

        @eqx.filter_jit
        def outputs_and_gradients(mixer, x, length):
            def loss(arguments):
                mixer, x = arguments
                y, cache = mixer(x, length=length)
                y = jnp.where(jnp.arange(len(x))[:, None] < length, y, 0)
                return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(cache)), (y, cache)

            return eqx.filter_grad(loss, has_aux=True)((mixer, x))

        for length in (1, 64, 128, 129, 200, 333):
            leaves = [
                jax.tree.leaves(
                    eqx.filter(outputs_and_gradients(m, x, jnp.asarray(length)), eqx.is_array)
                )
                for m in mixers
            ]
            for chunks, scan in zip(*leaves, strict=True):
                np.testing.assert_allclose(chunks, scan, atol=1e-10)


@pytest.mark.slow
def test_single_precision_kernel_of_s4():
    """To 16384 samples, HiPPO at its usual steps: within 1e-5 of double precision."""
    with jax.enable_x64(True):
        mixer = S4SequenceMixer(8, jr.key(0), state_dim=64)
        single = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, mixer
        )
        same = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, single
        )
        double = kernel(same, 16384)
        error = np.abs(np.asarray(kernel(single, 16384), float) - double).max((0, 1))
        assert (error < 1e-5 * np.abs(double).max((0, 1))).all()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 5}, "both states of each conjugate pair and must be even; got 5"),
        ({"n_ssm": 3}, "`n_ssm` must divide in_features = 4; got 3"),
        ({"init": "hippo"}, "`init` must be one of .*; got 'hippo'"),
        ({"real_transform": "abs"}, "`real_transform` must be one of 'none', .*; got 'abs'"),
        ({"dt_transform": "none"}, "`dt_transform` must be one of 'exp', 'softplus'; got 'none'"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max; got dt_min=0.2 and dt_max=0.1"),
        ({"step_rescale": 0.0}, "`step_rescale` must be positive; got 0.0"),
        ({"channels": 0}, "`channels` must be a whole number of at least 1; got 0"),
        ({"l_max": 0}, "`l_max` must be a whole number of at least 1; got 0"),
        ({"imag_transform": "sigmoid"}, 'the transform "sigmoid" reaches values below 1 only'),
        ({"route": "conv"}, "`route` must be one of 'scan', 'chunks', 'fft', None; got 'conv'"),
    ],
)
@pytest.mark.parametrize("make", [S4DSequenceMixer, S4SequenceMixer])
def test_errors(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(4, jr.key(0), **options)


def test_errors_of_one():
    with pytest.raises(ValueError, match=r"`discretization` must be one of .*; got 'async'"):
        S4DSequenceMixer(4, jr.key(0), discretization="async")
    with pytest.raises(ValueError, match=r'`rank` must be at least 2 for init="legt".*got 1'):
        S4SequenceMixer(4, jr.key(0), init="legt")
    for seed in range(3):  # whatever the numbers drawn
        with pytest.raises(ValueError, match=r"below 1 only; this initialisation has .* up to inf"):
            S4DSequenceMixer(1, jr.key(seed), state_dim=2, init="rand", imag_transform="sigmoid")


@pytest.mark.slow
@pytest.mark.parametrize("make", [S4DSequenceMixer, S4SequenceMixer])
def test_longer_than_l_max(make):
    mixer = make(4, jr.key(0), state_dim=4, l_max=8)
    with pytest.raises(ValueError, match=r"at most l_max=8 samples; got 9\. Feed .* in chunks"):
        mixer(jnp.ones((9, 4)))
    y, cache = run(mixer, jnp.ones((8, 4)))
    again, _ = run(mixer, jnp.ones((5, 4)), cache)
    whole, _ = run(make(4, jr.key(0), state_dim=4), jnp.ones((13, 4)))
    np.testing.assert_allclose(jnp.concatenate([y, again]), whole, atol=1e-5)
