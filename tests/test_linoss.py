"""LinOSS against the original code, its equations written out, and what its papers promise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close, draw, numbers, sigmoid
from test_golden import assert_close as assert_golden, golden_gradients

from discretax import resampled
from discretax.inspection import eigenvalues, frequency_response, impulse_response
from discretax.models import LinOSS
from discretax.sequence_mixers import Bidirectional, Discretized, LinOSSSequenceMixer

NAMES = sorted(path.stem for path in FOLDER.glob("*linoss_*.npz"))
KINDS = {
    "IM": {"discretization": "IM", "damping": False},
    "IMEX": {"discretization": "IMEX", "damping": False},
    "damped": {"discretization": "IMEX", "damping": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, features=3, state_dim=5, **options):
    return LinOSSSequenceMixer(features, jr.key(0), state_dim=state_dim, **KINDS[kind], **options)


def loop(mixer, x, timesteps):
    """The two equations of a step, one after the other."""
    A, G = numbers(mixer.A_diag), 0 if mixer.G_diag is None else numbers(mixer.G_diag)
    A, G = np.maximum(A, 0), np.maximum(G, 0)
    B, C = (numbers(parts)[..., 0] + 1j * numbers(parts)[..., 1] for parts in (mixer.B, mixer.C))
    z, y, outputs = 0, 0, []
    for sample, tau in zip(numbers(x), numbers(timesteps), strict=True):
        step = tau * sigmoid(numbers(mixer.steps))
        if mixer.discretization == "IM":
            # z_t = z + step (-A (y + step z_t) + B x)
            z = (z + step * (B @ sample - A * y)) / (1 + step**2 * A)
        else:
            z = (z + step * (B @ sample - A * y)) / (1 + step * G)
        y = y + step * z
        outputs.append((C @ y).real + numbers(mixer.D) * sample)
    return np.stack(outputs)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        kind = "damped" if "damped" in name else name.split("_")[-2]
        fields = golden.fields("p")
        leaves = lambda mixer: [getattr(mixer, field) for field in fields]
        mixer = eqx.tree_at(leaves, make(kind, 6, 8), [*fields.values()])
        run = jax.vmap(lambda mixer, x: mixer(x)[0], in_axes=(None, 0))
        d_mixer = golden_gradients(run, mixer, golden, dtype)
        for field, expected in golden.fields("g.p").items():
            assert_golden(getattr(d_mixer, field), expected, dtype)


def test_there_are_golden_numbers():
    assert len(NAMES) == 5


@every_kind
def test_timesteps_scale_the_step(kind):
    """A gap of zero is no time: the sample moves nothing."""
    with jax.enable_x64(True):
        # Far from where A is held, whatever the gap.
        mixer = eqx.tree_at(lambda m: m.A_diag, make(kind), jnp.linspace(0.2, 0.4, 5))
        if kind == "damped":
            mixer = eqx.tree_at(lambda m: m.G_diag, mixer, jnp.linspace(0, 0.2, 5))
        x, timesteps = draw(20, 3), jnp.linspace(0, 2, 20)
        y, _ = jax.jit(lambda x: mixer(x, integration_timesteps=timesteps))(x)
        assert_close(y, loop(mixer, x, timesteps), 1e-12)
        twice = jax.jit(lambda x: resampled(mixer, 0.5)(x)[0])(x)
        assert_close(twice, loop(mixer, x, np.full(20, 2.0)), 1e-12)


@every_kind
def test_without_a_spring_it_integrates_twice(kind):
    """At A = 0 the transition has one eigenvector: after a push the position grows for ever."""
    mixer = eqx.tree_at(lambda m: m.A_diag, make(kind), -jnp.ones(5))
    if kind == "damped":
        mixer = eqx.tree_at(lambda m: m.G_diag, mixer, -jnp.ones(5))
    step = sigmoid(numbers(mixer.steps))
    expected = np.arange(1, 301)[:, None] * step**2
    assert_close(mixer.compute_kernel(300), expected, 1e-5)
    assert_close(eigenvalues(mixer), np.ones(5), 1e-6)
    x = draw(50, 3)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda p: jnp.asarray(p, float), (mixer, x))
        assert_close(double[0](double[1])[0], loop(*double, np.ones(50)), 1e-12)


@every_kind
def test_eigenvalues_are_those_of_the_papers(kind):
    with jax.enable_x64(True):
        mixer = make(kind, state_dim=50)
        step, A = sigmoid(numbers(mixer.steps)), numbers(mixer.A_diag)
        system = mixer.discretize()
        dense = np.linalg.eigvals(np.moveaxis(numbers(system.A_bar), -1, 0))
        ours = numbers(eigenvalues(mixer).real) + 1j * numbers(eigenvalues(mixer).imag)
        assert_close(ours, dense[np.arange(50), dense.imag.argmax(1)], 1e-8)
        forgotten = {"IM": step**2 * A, "IMEX": 0 * A}.get(kind)
        forgotten = step * numbers(mixer.G_diag) if forgotten is None else forgotten
        assert_close(np.abs(ours) ** 2, 1 / (1 + forgotten), 1e-12)


@pytest.mark.parametrize("kind", ["IMEX", "damped"])
@pytest.mark.parametrize("timestep", [None, 0.0, 0.3, 7.0])
def test_stiff_springs_are_held(kind, timestep):
    """Left alone, an explicit step of more than 2 / sqrt(A) would grow without bound."""
    mixer = eqx.tree_at(lambda m: m.A_diag, make(kind), jnp.array([0.0, 1e-6, 5.0, 1e3, 1e6]))
    system = mixer.discretize(timestep)
    assert np.abs(system.eigenvalues()).max() <= 1 + 1e-6
    x = draw(400, 3)
    timesteps = None if timestep is None else jnp.full(400, timestep)
    run = lambda mixer: mixer(x, integration_timesteps=timesteps)[0]
    y, pull = jax.vjp(eqx.filter_jit(run), mixer)
    assert np.abs(y).max() < 1e5
    (gradients,) = pull(jnp.ones_like(y))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("r_min", "theta_max"), [(0.9, np.pi), (0.5, 0.1)])
def test_damped_eigenvalues_start_on_a_ring(r_min, theta_max):
    with jax.enable_x64(True):
        mixer = make("damped", state_dim=20_000, r_min=r_min, theta_max=theta_max)
        found = np.asarray(eigenvalues(mixer))
        quantiles = np.linspace(0, 1, 11)
        squares, due = np.abs(found) ** 2, r_min**2 + quantiles * (1 - r_min**2)
        np.testing.assert_allclose(np.quantile(squares, quantiles), due, atol=0.01 * (1 - r_min**2))
        angles = np.quantile(np.angle(found), quantiles)
        np.testing.assert_allclose(angles, quantiles * theta_max, atol=0.015 * theta_max)


@every_kind
def test_frequency_response_is_the_transform_of_the_impulse_response(kind):
    with jax.enable_x64(True):
        mixer = make(kind)
        K = np.asarray(impulse_response(mixer, 3000))
        # Inside the circle of convergence, where every impulse response fades.
        damped = K * 0.98 ** np.arange(3000)[:, None, None]
        z = np.exp(2j * np.pi * np.array([0.0, 0.01, 0.2, -0.2, 0.5])) / 0.98
        expected = np.einsum("loi,zl->zoi", K, z[:, None] ** -np.arange(3000))
        assert np.abs(damped[-1]).max() < 1e-12
        assert_close(mixer.discretize().transfer(jnp.asarray(z)), expected, 1e-10)
        if kind == "damped":
            on_circle = np.fft.fft(K, axis=0)[:3]
            assert_close(frequency_response(mixer, jnp.arange(3) / 3000), on_circle, 1e-2)


def test_discrete_system_unpacks():
    mixer = make("damped")
    A_bar, B_bar, C = (np.asarray(part) for part in mixer.discretize())
    h, x = np.zeros((2, 5), complex), draw(30, 3)
    outputs = []
    for sample in numbers(x):
        h = np.einsum("ijn,jn->in", A_bar, h) + B_bar @ sample
        outputs.append(np.einsum("oin,in->o", C, h).real + numbers(mixer.D) * sample)
    assert_close(mixer(x)[0], np.stack(outputs), 1e-5)


@every_kind
def test_in_wrappers(kind):
    forward, x, timesteps = make(kind), draw(20, 3), jnp.linspace(0.5, 1.5, 20)
    backward = LinOSSSequenceMixer(3, jr.key(1), state_dim=5, **KINDS[kind])
    run = eqx.filter_jit(lambda mixer, x, tau=None: mixer(x, integration_timesteps=tau)[0])
    fixed = Discretized(forward)
    assert_close(run(fixed, x), run(forward, x), 1e-6)
    assert_close(run(fixed, x, timesteps), run(forward, x, timesteps), 1e-6)
    both = run(Bidirectional(forward, backward), x)
    assert_close(both, run(forward, x) + run(backward, x[::-1])[::-1], 1e-5)


def test_the_model_hands_its_options_on():
    options = {"discretization": "IM", "damping": False, "state_dim": 5}
    model, state = eqx.nn.make_with_state(LinOSS)(jr.key(0), hidden_dim=3, num_blocks=2, **options)
    for block in model.blocks:
        mixer = block.sequence_mixer
        assert (mixer.discretization, mixer.G_diag, mixer.A_diag.shape) == ("IM", None, (5,))
    damped, _ = eqx.nn.make_with_state(LinOSS)(jr.key(0), hidden_dim=3, r_min=0.3, theta_max=0.2)
    found = np.asarray(eigenvalues(damped.blocks[0].sequence_mixer))
    assert np.abs(found).min() < 0.7 and np.angle(found).max() < 0.2 + 1e-3
    model = eqx.nn.inference_mode(model)
    assert np.isfinite(eqx.filter_jit(model)(draw(7, 3), state)[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discretization": "IM"}, r'got "IM".*damping=False'),
        ({"discretization": "EX"}, r"`discretization` must be .*got 'EX'"),
        ({"r_min": 0.0}, r"0 < r_min <= 1.*got r_min=0.0"),
        ({"r_min": 1.1}, r"0 < r_min <= 1.*got r_min=1.1"),
        ({"r_min": 1.0}, "with damping `r_min` must be below 1; got 1"),
        ({"theta_max": 4.0}, r"theta_max <= pi; got .*theta_max=4.0"),
        ({"state_dim": 0}, r"`state_dim` must be .*got 0"),
        ({"step_rescale": 0.0}, r"`step_rescale` must be positive; got 0.0"),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LinOSSSequenceMixer(3, jr.key(0), **options)
