"""S5: the numbers of four original implementations, its initialisation and its errors."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from test_golden import S5_FIELDS, assert_close, golden_gradients, value_and_gradients

from discretax.init import diagonalised_legs, hippo_legs, log_uniform_step
from discretax.models import S5
from discretax.ops import diagonal_ssm
from discretax.sequence_mixers import Bidirectional, BidirectionalS5, S5SequenceMixer

OTHERS = re.compile("hippo|layer|lti|stride")  # of another form; each has a test of its own
NAMES = sorted(path.stem for path in FOLDER.glob("*s5*.npz") if not OTHERS.search(path.stem))
# Those that also run in single precision: one of each form.
SINGLE = ("s5_zoh_conj_bidir_L56", "eventssm_s5_async_full_L56", "s5_bilinear_full_L56")


def build(name):
    discretization = name.partition("s5_")[2].removeprefix("ltv_").partition("_")[0]
    if name.startswith("lrnnx"):
        discretization = name.split("_")[2]
        discretization = {"zoh": "async"}.get(discretization, discretization)
    return (BidirectionalS5 if "bidir" in name else S5SequenceMixer)(
        6,
        jr.key(0),
        state_dim=8,
        conj_sym="conj" in name,
        clip_eigs="clip" in name or name.startswith(("dx", "eventssm")),
        step_rescale=2.0 if "rescale2" in name else 1.0,
        discretization=discretization,
    )


def leaves(mixer):
    backward = []
    if isinstance(mixer, BidirectionalS5):
        mixer, backward = mixer.forward, [mixer.C_backward]
    return [getattr(mixer, field) for field in S5_FIELDS] + backward


def golden_leaves(golden, kind):
    arrays = golden.fields(kind)
    if "A" in arrays:  # lrnnx
        Lambda, log_step = arrays["A"], arrays["log_dt"][:, None]
        return [Lambda[:, 0], Lambda[:, 1], *(arrays[k] for k in "BCD"), log_step]
    C = ("C1", "D", "log_step", "C2") if "C1" in arrays else ("C", "D", "log_step")
    return [arrays[k] for k in ("Lambda_re", "Lambda_im", "B", *C)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float64") for name in NAMES] + [(name, "float32") for name in SINGLE],
)
def test_golden(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        mixer = eqx.tree_at(leaves, build(name), golden_leaves(golden, "p"))
        timesteps = golden.arrays.get("dt")

        def run(arguments, x):
            mixer, timesteps = arguments
            return jax.vmap(lambda x, tau: mixer(x, integration_timesteps=tau)[0])(x, timesteps)

        d_mixer, d_timesteps = golden_gradients(run, (mixer, timesteps), golden, dtype)
        for actual, expected in zip(leaves(d_mixer), golden_leaves(golden, "g.p"), strict=True):
            assert_close(actual, expected, dtype)
        if timesteps is not None:
            assert_close(d_timesteps, golden["g.dt"], dtype)


def test_there_are_golden_numbers():
    assert len(NAMES) == 29


def from_lrnnx(parameters, discretization):
    """lrnnx's time-invariant form: its eigenvalues held stable by softplus, and a real B."""
    A, B, C, log_dt = (parameters[name] for name in ("A", "B", "C", "log_dt"))
    return eqx.tree_at(
        leaves,
        S5SequenceMixer(
            6,
            jr.key(0),
            state_dim=8,
            conj_sym=False,
            clip_eigs=False,
            discretization=discretization,
        ),
        [
            -jax.nn.softplus(A[:, 0]),
            A[:, 1],
            jnp.stack([B, jnp.zeros_like(B)], axis=-1),
            C,
            jnp.zeros(6),
            log_dt[:, None],
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("discretization", "dtype"), [("zoh", "float64"), ("dirac", "float64"), ("zoh", "float32")]
)
def test_lrnnx_time_invariant(discretization, dtype):
    """Its D is a full matrix, added here; its gradients come through the mapping."""
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(f"lrnnx_s5lti_{discretization}_L56", dtype)
        parameters = golden.fields("p")

        def whole(parameters, x):
            mixer = from_lrnnx(parameters, discretization)
            return jax.vmap(lambda x: mixer(x)[0])(x) + x @ parameters["D"]

        y, d_parameters, d_x = value_and_gradients(whole, parameters, golden)
        assert_close(y, golden["y"], dtype)
        assert_close(d_x, golden["g.x"], dtype)
        for name, expected in golden.fields("g.p").items():
            assert_close(d_parameters[name], expected, dtype)

        @jax.jit
        def steps(x):
            mixer = from_lrnnx(parameters, discretization)
            cache = mixer.allocate_inference_cache(batch_size=x.shape[0])
            step = lambda cache, x: jax.vmap(mixer.step)(x, cache)[::-1]
            final, y = jax.lax.scan(step, cache, x.swapaxes(0, 1))
            return y.swapaxes(0, 1) + x @ parameters["D"], final

        y, final = steps(golden["x"])
        assert_close(y, golden["y_step"], dtype)
        assert_close(final[:, 0], golden["final_state.re"], dtype)
        assert_close(final[:, 1], golden["final_state.im"], dtype)


@pytest.mark.slow
def test_event_ssm_with_a_stride():
    """Each window of three events answers with the state after its first, read out to another
    width, and D acts on the mean of its inputs, weighted by the gaps."""
    with jax.enable_x64(True):
        golden = Golden("eventssm_s5_async_stride3_L56", "float64")
        arrays = golden.fields("p")
        mixer = eqx.tree_at(
            lambda m: [getattr(m, name) for name in ("Lambda_re", "Lambda_im", "B", "log_step")],
            S5SequenceMixer(6, jr.key(0), state_dim=8, discretization="async"),
            [arrays[name] for name in ("Lambda_re", "Lambda_im", "B", "log_step")],
        )

        def single(mixer, C, D, x, tau):
            system = mixer.discretize(tau)
            C_planes = 2 * jnp.stack([C[..., 0], -C[..., 1]], axis=1)
            cache = mixer.allocate_inference_cache()
            y, _ = diagonal_ssm(system.A_planes, system.B_planes, C_planes, x, cache)
            weights = (tau[:54] + 1e-6).reshape(18, 3, 1)
            windows = x[:54].reshape(18, 3, 6)
            pooled = (windows * weights).sum(1) / weights.sum(1)
            return y[:54:3] + pooled @ D.T

        def run(arguments, x):
            mixer, C, D, timesteps = arguments
            return jax.vmap(lambda x, tau: single(mixer, C, D, x, tau))(x, timesteps)

        arguments = (mixer, arrays["C"], arrays["D"], golden["dt"])
        d_mixer, d_C, d_D, d_timesteps = golden_gradients(run, arguments, golden, "float64")
        assert_close(d_timesteps, golden["g.dt"], "float64")
        assert_close(d_C, golden["g.p.C"], "float64")
        assert_close(d_D, golden["g.p.D"], "float64")
        for name in ("Lambda_re", "Lambda_im", "B", "log_step"):
            assert_close(getattr(d_mixer, name), golden[f"g.p.{name}"], "float64")


@pytest.mark.parametrize("state_dim", [4, 8, 16, 32])
def test_hippo(state_dim):
    with jax.enable_x64(True):
        golden = Golden("s5_hippo_init", "float64")
        A, B = hippo_legs(state_dim)
        np.testing.assert_allclose(A, golden[f"A_{state_dim}"], rtol=1e-13)
        np.testing.assert_allclose(B, golden[f"B_{state_dim}"], rtol=1e-13)
        Lambda, V = diagonalised_legs(state_dim)
        np.testing.assert_allclose(Lambda.real, golden[f"Lambda_{state_dim}.re"], rtol=1e-12)
        np.testing.assert_allclose(Lambda.imag, golden[f"Lambda_{state_dim}.im"], atol=1e-11)
        # Eigenvectors are unique up to a phase each; the modulus of V^* B is not touched by it.
        in_basis = np.hypot(golden[f"Bdiag_{state_dim}.re"], golden[f"Bdiag_{state_dim}.im"])
        np.testing.assert_allclose(np.abs(V.conj().T @ B), in_basis, atol=1e-11)
        P = np.sqrt(np.arange(state_dim) + 0.5)
        np.testing.assert_allclose(V @ np.diag(Lambda) @ V.conj().T - np.outer(P, P), A, atol=1e-11)


def test_initial_system_is_blocks_of_hippo_with_real_projections():
    """In the basis of HiPPO-LegS, B and C are the real matrices that were drawn."""
    with jax.enable_x64(True):
        mixer = S5SequenceMixer(3, jr.key(0), state_dim=12, ssm_blocks=2, conj_sym=False)
        Lambda, V = diagonalised_legs(6)
        np.testing.assert_allclose(mixer.Lambda_im, np.tile(Lambda.imag, 2), atol=1e-12)
        blocks = np.kron(np.eye(2), V)
        B = blocks @ np.asarray(jax.lax.complex(mixer.B[..., 0], mixer.B[..., 1]))
        np.testing.assert_allclose(B.imag, 0, atol=1e-12)
        assert np.abs(B.real).std() > 0.05


def bidirectional(in_features, key, **options):
    return Bidirectional(*(S5SequenceMixer(in_features, k, **options) for k in jr.split(key)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [BidirectionalS5, bidirectional])
@pytest.mark.parametrize("length", [None, 9])
def test_a_gap_belongs_to_the_sequence_behind_it(make, length):
    """Backwards, a sequence begins at the sample before a reset, and with a gap of one."""
    mixer = make(3, jr.key(0), state_dim=4)
    x = jr.normal(jr.key(1), (11, 3))
    gaps = jr.uniform(jr.key(2), (11,)).at[5].set(50.0)
    y, _ = mixer(x, integration_timesteps=gaps, resets=jnp.arange(11) == 5, length=length)
    for part in (slice(5), slice(5, length)):
        alone, _ = mixer(x[part], integration_timesteps=gaps[part])
        assert_close(y[part], alone, "float32")


@pytest.mark.slow
def test_conjugate_symmetry_halves_the_states_and_keeps_the_output():
    """With conjugates written out, the full system gives what the half with m = 2 gives."""
    with jax.enable_x64(True):
        half = S5SequenceMixer(3, jr.key(0), state_dim=8)
        full = S5SequenceMixer(3, jr.key(0), state_dim=8, conj_sym=False)
        mirror = jnp.array([[[1.0, -1.0]]])
        doubled = [
            jnp.concatenate([half.Lambda_re] * 2),
            jnp.concatenate([half.Lambda_im, -half.Lambda_im]),
            jnp.concatenate([half.B, half.B * mirror]),
            jnp.concatenate([half.C, half.C * mirror], axis=1),
            half.D,
            jnp.concatenate([half.log_step] * 2),
        ]
        full = eqx.tree_at(leaves, full, doubled)
        x = jr.normal(jr.key(1), (20, 3))
        np.testing.assert_allclose(full(x)[0], half(x)[0], rtol=1e-10)


@pytest.mark.slow
def test_step_rescale_is_another_sampling_rate():
    """A slow signal at half the rate, with steps twice as long: the same answer at the same time."""
    fine = S5SequenceMixer(1, jr.key(0), state_dim=8, dt_min=0.001, dt_max=0.01)
    coarse = eqx.tree_at(lambda m: m.step_rescale, fine, 2.0)
    t = jnp.arange(400.0)[:, None]
    signal = lambda t: jnp.sin(2 * jnp.pi * t / 400)
    y_fine, y_coarse = fine(signal(t))[0], coarse(signal(t[::2]))[0]
    scale = np.abs(y_fine).max()
    assert np.abs(y_coarse - y_fine[::2]).max() < 0.02 * scale
    assert np.abs(fine(signal(t[::2]))[0] - y_fine[::2]).max() > 0.2 * scale


def test_steps_start_log_uniform():
    log_step = log_uniform_step(jr.key(0), (20_000, 1), 0.001, 0.1)
    quantiles = np.linspace(0, 1, 11)
    expected = np.log(0.001) + quantiles * np.log(100)
    np.testing.assert_allclose(np.quantile(log_step, quantiles), expected, atol=0.1)


@pytest.mark.slow
def test_no_discretization_takes_the_eigenvalues_as_they_are():
    mixer = S5SequenceMixer(2, jr.key(0), state_dim=2, discretization="no_discretization")
    mixer = eqx.tree_at(
        lambda m: (m.Lambda_re, m.Lambda_im), mixer, (jnp.array([-0.5]), jnp.array([0.25]))
    )
    A_bar, B_bar, _ = mixer.discretize()
    np.testing.assert_allclose(A_bar, [-0.5 + 0.25j])
    B = np.asarray(mixer.B)
    np.testing.assert_allclose(B_bar, B[..., 0] + 1j * B[..., 1])
    with pytest.raises(
        ValueError, match=r"takes no integration timesteps.*eigenvalues are discrete"
    ):
        mixer(jnp.ones((3, 2)), integration_timesteps=jnp.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "`state_dim` must be .*; got 0"),
        ({"state_dim": 7}, r"must be even; got 7 / 1 = 7. Or set conj_sym=False"),
        ({"state_dim": 6, "ssm_blocks": 2}, r"must be even; got 6 / 2 = 3"),
        ({"state_dim": 8, "ssm_blocks": 3}, "`ssm_blocks` must divide state_dim = 8; got 3"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max; got dt_min=0.2 and dt_max=0.1"),
        ({"dt_min": 0.0}, "0 < dt_min.*got dt_min=0.0"),
        ({"step_rescale": 0.0}, "`step_rescale` must be positive; got 0.0"),
        ({"discretization": "euler"}, "one of 'zoh', 'bilinear', 'dirac', 'async'.*got 'euler'"),
        ({"C_init": "normal"}, "one of 'trunc_standard_normal', 'lecun_normal'.*got 'normal'"),
    ],
)
@pytest.mark.parametrize("make", [S5SequenceMixer, BidirectionalS5])
def test_unfit_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(4, jr.key(0), **options)


def test_unknown_keyword_is_refused():
    for make in (S5SequenceMixer, BidirectionalS5):
        with pytest.raises(TypeError, match="state_dims"):
            make(4, jr.key(0), state_dims=4)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_model_passes_its_options_on(bidirectional):
    model = S5(
        jr.key(0),
        hidden_dim=4,
        num_blocks=2,
        state_dim=8,
        ssm_blocks=2,
        conj_sym=False,
        clip_eigs=False,
        dt_min=0.5,
        dt_max=0.5,
        step_rescale=3.0,
        discretization="bilinear",
        bidirectional=bidirectional,
        use_bias=False,
        norm="layer",
    )
    assert len(model.blocks) == 2
    mixer = model.blocks[1].sequence_mixer
    mixer = mixer.forward if bidirectional else mixer
    assert (mixer.discretization, mixer.step_rescale) == ("bilinear", 3.0)
    assert (mixer.conj_sym, mixer.clip_eigs) == (False, False)
    np.testing.assert_allclose(mixer.log_step, np.log(0.5), rtol=1e-6)
    assert mixer.Lambda_re.shape == (8,)
    np.testing.assert_allclose(mixer.Lambda_im[:4], mixer.Lambda_im[4:])
    assert model.blocks[1].channel_mixer.w1.bias is None


@pytest.mark.parametrize("activation", ["half_glu1", "half_glu2"])
def test_half_glu_without_bias(activation):
    model = S5(jr.key(0), hidden_dim=4, num_blocks=1, use_bias=False, activation=activation)
    assert model.blocks[0].channel_mixer.linear.bias is None


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"one of 'full_glu', 'half_glu1'.*got 'half_glu'"):
        S5(jr.key(0), hidden_dim=4, activation="half_glu")
