"""S7: the numbers of lrnnx, its initialisation, its memory and its errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from test_golden import assert_close, both_precisions, golden_gradients

from discretax.models import S7
from discretax.sequence_mixers import S7SequenceMixer

WEIGHTS = {
    "in_proj.weight": lambda m: m.in_proj.weight,
    "x_proj.weight": lambda m: m.x_proj.weight,
    "gate_proj.weight": lambda m: m.gate_proj.weight,
    "base_params": lambda m: m.alpha,
}


def load(golden):
    arrays = golden.fields("p")
    return eqx.tree_at(
        lambda m: [leaf(m) for leaf in WEIGHTS.values()],
        S7SequenceMixer(6, jr.key(0), state_dim=4),
        [arrays[name] for name in WEIGHTS],
    )


@both_precisions
def test_golden(dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden("lrnnx_s7_L56", dtype)
        add = lambda mixer, x: x + jax.vmap(lambda x: mixer(x)[0])(x)
        d_mixer = golden_gradients(add, load(golden), golden, dtype)
        gradients = golden.fields("g.p")
        for name, leaf in WEIGHTS.items():
            assert_close(leaf(d_mixer), gradients[name], dtype)


def test_golden_steps_and_final_state():
    with jax.enable_x64(True):
        golden = Golden("lrnnx_s7_L56", "float64")
        mixer = load(golden)

        def step(cache, sample):
            y, cache = mixer.step(sample, cache)
            return cache, sample + y

        stepped = jax.jit(jax.vmap(lambda x: jax.lax.scan(step, jnp.zeros(4), x)))
        whole = jax.jit(jax.vmap(lambda x: mixer(x)[1]))
        final, y = stepped(golden["x"])
        assert_close(y, golden["y_step"], "float64")
        assert_close(final, golden["final_state"], "float64")
        assert_close(whole(golden["x"]), golden["final_state"], "float64")


def test_initialisation():
    """Memories evenly spread in logarithm, and outputs of the size of the inputs."""
    mixer = S7SequenceMixer(64, jr.key(0), state_dim=32, a_min=0.5, a_max=0.999)
    A_bar = 1 - 1 / (np.asarray(mixer.alpha, float) ** 2 + 0.5)
    np.testing.assert_allclose(1 - A_bar, np.geomspace(0.5, 0.001, 32), rtol=1e-3)
    assert abs(np.std(mixer.x_proj.weight) * 64 - 1) < 0.01
    y, _ = eqx.filter_jit(mixer)(jr.normal(jr.key(1), (500, 64)))
    assert 0.1 < np.std(y) < 10


def test_memory_grows_with_the_sum_of_features_and_state():
    """B_t and C_t of all samples would take 2 * time * features * state numbers."""
    mixer = S7SequenceMixer(32, jr.key(0), state_dim=32)
    loss = jax.grad(lambda x: jnp.sum(mixer(x)[0] ** 2))

    def temporary(time):
        x = jax.ShapeDtypeStruct((time, 32), jnp.float32)
        return jax.jit(loss).lower(x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(4096)
    matrices = 4 * 2 * 32 * 32  # bytes for each sample
    assert (long - short) / 3072 < matrices / 4


def test_model():
    model = S7(jr.key(0), hidden_dim=4, num_blocks=2, state_dim=3)
    assert [block.sequence_mixer.alpha.shape for block in model.blocks] == [(3,), (3,)]
    assert model.blocks[0].activation is None  # the mixer has its own gate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "`state_dim` must be a whole number of at least 1; got 0"),
        ({"a_min": 0.9, "a_max": 0.5}, "-1 <= a_min <= a_max < 1; got a_min=0.9 and a_max=0.5"),
        ({"a_max": 1.0}, "got a_min=0.5 and a_max=1.0"),
        ({"a_min": -1.5}, "got a_min=-1.5"),
    ],
)
def test_unfit_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        S7SequenceMixer(4, jr.key(0), **options)
