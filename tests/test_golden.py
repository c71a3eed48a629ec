"""Outputs and gradients of the original implementations, from their parameters."""

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from golden_file import Golden

from discretax import Timeseries
from discretax.blocks import StandardBlock
from discretax.channel_mixers import GLU
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU, S5
from discretax.sequence_mixers import LRUSequenceMixer

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE)
S5_FIELDS = ("Lambda_re", "Lambda_im", "B", "C", "D", "log_step")
LRU_FIELDS = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D")


def assert_close(actual, expected, dtype):
    helpers.assert_close(actual, expected, TOLERANCE[dtype])


def value_and_gradients(run, model, golden):
    """Output on the golden input, and gradients of `sum(y * w)` in model and input."""

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(arguments):
        model, x = arguments
        y = run(model, x)
        return jnp.sum(y * golden["w"]), y

    (_, y), gradients = loss((model, golden["x"]))
    return y, *gradients


def golden_gradients(run, model, golden, dtype):
    """Those in the model. Output and gradient in the input are compared with the golden ones here."""
    y, d_model, d_x = value_and_gradients(run, model, golden)
    assert_close(y, golden["y"], dtype)
    assert_close(d_x, golden["g.x"], dtype)
    return d_model


def load_lru(mixer, golden, prefix=""):
    arrays = golden.fields("p", prefix)
    return eqx.tree_at(
        lambda m: [getattr(m, name) for name in LRU_FIELDS],
        mixer,
        [arrays[name] for name in LRU_FIELDS],
    )


def dense(linear):
    return [linear.weight, linear.bias]


def golden_dense(golden, kind, name):
    arrays = golden.fields(kind, f"{name}.")
    return [arrays["kernel"].T, arrays["bias"]]


def block_leaves(block):
    mixer = [getattr(block.sequence_mixer, name) for name in LRU_FIELDS]
    norm = [block.norm.weight, block.norm.bias]
    return mixer + norm + dense(block.channel_mixer.w1) + dense(block.channel_mixer.w2)


def golden_block(golden, kind, prefix=""):
    mixer, norm = (golden.fields(kind, prefix + name) for name in ("seq.", "normalization."))
    return (
        [mixer[name] for name in LRU_FIELDS]
        + [norm["scale"], norm["bias"]]
        + golden_dense(golden, kind, f"{prefix}out1")
        + golden_dense(golden, kind, f"{prefix}out2")
    )


@both_precisions
@pytest.mark.parametrize("name", ["minlru_lru_L56", "dx_lru_L56", "lrnnx_lru_L56"])
def test_lru(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        mixer = load_lru(LRUSequenceMixer(6, jr.key(0), state_dim=8), golden)
        d_mixer = golden_gradients(
            jax.vmap(lambda m, x: m(x)[0], in_axes=(None, 0)), mixer, golden, dtype
        )
        for field in LRU_FIELDS:
            assert_close(getattr(d_mixer, field), golden[f"g.p.{field}"], dtype)


@pytest.mark.slow
@both_precisions
def test_lru_step_and_final_state(dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden("lrnnx_lru_L56", dtype)
        mixer = load_lru(LRUSequenceMixer(6, jr.key(0), state_dim=8), golden)

        @jax.jit
        @jax.vmap
        def steps(x):
            cache = mixer.allocate_inference_cache()
            return jax.lax.scan(lambda h, u: mixer.step(u, h)[::-1], cache, x)

        final, y = steps(golden["x"])
        assert_close(y, golden["y_step"], dtype)
        assert_close(final[:, 0], golden["final_state.re"], dtype)
        assert_close(final[:, 1], golden["final_state.im"], dtype)


@pytest.mark.slow
@both_precisions
@pytest.mark.parametrize("prenorm", [True, False], ids=["prenorm", "postnorm"])
def test_block(prenorm, dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(f"minlru_layer_{'prenorm' if prenorm else 'postnorm'}_L56", dtype)
        block, state = eqx.nn.make_with_state(StandardBlock)(
            6,
            jr.key(0),
            sequence_mixer=LRUSequenceMixer(6, jr.key(1), state_dim=8),
            channel_mixer=GLU,
            norm="layer",
            prenorm=prenorm,
            drop_rate=0.0,
        )
        block = eqx.tree_at(block_leaves, block, golden_block(golden, "p"))
        run = jax.vmap(lambda block, x: block(x, state)[0], in_axes=(None, 0))
        d_block = golden_gradients(run, block, golden, dtype)
        for actual, expected in zip(
            block_leaves(d_block), golden_block(golden, "g.p"), strict=True
        ):
            assert_close(actual, expected, dtype)


@pytest.mark.slow
@both_precisions
def test_classifier(dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden("minlru_classifier_L56", dtype)

        def build():
            encoder = LinearEncoder(3, jr.key(0), out_features=6, use_bias=True)
            model = LRU(
                jr.key(1), hidden_dim=6, num_blocks=2, state_dim=8, norm="layer", drop_rate=0.0
            )
            return eqx.nn.Sequential([encoder, model, ClassificationHead(6, 5, jr.key(2))])

        def leaves(model):
            encoder, backbone, head = model
            inner = [leaf for block in backbone.blocks for leaf in block_leaves(block)]
            return dense(encoder.linear) + inner + dense(head.pooled_linear.linear)

        def golden_leaves(kind):
            inner = [
                leaf
                for i in range(2)
                for leaf in golden_block(golden, kind, f"encoder.layers_{i}.")
            ]
            encoder = golden_dense(golden, kind, "encoder.encoder")
            return encoder + inner + golden_dense(golden, kind, "decoder")

        model, state = eqx.nn.make_with_state(build)()
        model = eqx.tree_at(leaves, model, golden_leaves("p"))
        run = jax.vmap(lambda model, x: model(x, state)[0], in_axes=(None, 0))
        d_model = golden_gradients(run, model, golden, dtype)
        for actual, expected in zip(leaves(d_model), golden_leaves("g.p"), strict=True):
            assert_close(actual, expected, dtype)


S5_LAYERS = [
    f"s5_layer_{activation}_{order}_L56"
    for activation, order in (
        ("full_glu", "prenorm"),
        ("half_glu1", "prenorm"),
        ("half_glu1", "postnorm"),
        ("half_glu2", "prenorm"),
        ("gelu", "prenorm"),
    )
]


def s5_layer_leaves(block):
    mixer = [getattr(block.sequence_mixer, name) for name in S5_FIELDS]
    return [*mixer, block.norm.weight, block.norm.bias, *jax.tree.leaves(block.channel_mixer)]


def golden_s5_layer(golden, kind, mixer, norm, maps):
    mixer, norm = golden.fields(kind, f"{mixer}."), golden.fields(kind, f"{norm}.")
    maps = [name for name in maps if golden.fields(kind, f"{name}.")]
    return (
        [mixer[name] for name in S5_FIELDS]
        + [norm["scale"], norm["bias"]]
        + [leaf for name in maps for leaf in golden_dense(golden, kind, name)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float64") for name in (*S5_LAYERS, "eventssm_layer_async_L56")]
    + [("eventssm_layer_async_L56", "float32")],
)
def test_s5_layer(name, dtype):
    if name.startswith("eventssm"):
        names = ("S5SSM_0", "LayerNorm_0", ("Dense_0",))
        options = {"discretization": "async", "activation": "half_glu2"}
    else:
        names = ("seq", "norm", ("out1", "out2"))
        activation, _, order = name.removeprefix("s5_layer_").removesuffix("_L56").rpartition("_")
        options = {"activation": activation, "prenorm": order == "prenorm"}
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        model, state = eqx.nn.make_with_state(S5)(
            jr.key(0), hidden_dim=6, num_blocks=1, state_dim=8, norm="layer", drop_rate=0, **options
        )
        block = eqx.tree_at(s5_layer_leaves, model.blocks[0], golden_s5_layer(golden, "p", *names))
        timesteps = golden.arrays.get("dt")

        def run(arguments, x):
            block, timesteps = arguments
            series = Timeseries(x, timesteps=timesteps)
            return jax.vmap(lambda x: block(x, state)[0].values)(series)

        d_block, d_timesteps = golden_gradients(run, (block, timesteps), golden, dtype)
        for actual, expected in zip(
            s5_layer_leaves(d_block), golden_s5_layer(golden, "g.p", *names), strict=True
        ):
            assert_close(actual, expected, dtype)
        if timesteps is not None:
            assert_close(d_timesteps, golden["g.dt"], dtype)
