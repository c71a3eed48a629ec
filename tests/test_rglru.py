"""RG-LRU, Griffin's recurrent block and Griffin: the numbers of the original code, and their errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from test_golden import assert_close, both_precisions, golden_gradients, value_and_gradients

from discretax import inference_state, streaming_mode
from discretax.blocks import ResidualBlock
from discretax.models import RGLRU, Griffin
from discretax.sequence_mixers import GriffinSequenceMixer, RGLRUSequenceMixer
from discretax.sequence_mixers.ltv.rglru import RGLRUCache

documents = pytest.mark.parametrize("kind", ["pos", "reset"])

RG_LRU = {
    "a_param": lambda m: m.Lambda,
    "a_gate.w": lambda m: m.a_weight,
    "a_gate.b": lambda m: m.a_bias,
    "input_gate.w": lambda m: m.input_weight,
    "input_gate.b": lambda m: m.input_bias,
}
RECURRENT_BLOCK = {
    "linear_x.weight": lambda m: m.linear_x.weight,
    "linear_x.bias": lambda m: m.linear_x.bias,
    "linear_y.weight": lambda m: m.linear_y.weight,
    "linear_y.bias": lambda m: m.linear_y.bias,
    "linear_out.weight": lambda m: m.linear_out.weight,
    "linear_out.bias": lambda m: m.linear_out.bias,
    "conv_1d.b": lambda m: m.conv_bias,
    "conv_1d.w": lambda m: m.conv_weight,
} | {f"rg_lru.{name}": lambda m, leaf=leaf: leaf(m.rg_lru) for name, leaf in RG_LRU.items()}
LRNNX = {
    "in_proj.weight": lambda m: m.linear_x.weight,
    "gate_proj.weight": lambda m: m.linear_y.weight,
    "out_proj.weight": lambda m: m.linear_out.weight,
    "conv1d.weight": lambda m: m.conv_weight,
    "conv1d.bias": lambda m: m.conv_bias,
    "a_log": lambda m: m.rg_lru.Lambda,
    "recurrent_gate_proj.weight": lambda m: m.rg_lru.a_weight,
    "recurrent_gate_proj.bias": lambda m: m.rg_lru.a_bias,
    "input_gate_proj.weight": lambda m: m.rg_lru.input_weight,
    "input_gate_proj.bias": lambda m: m.rg_lru.input_bias,
}
# From the original's array to ours, and its gradient likewise.
LAYOUT = {
    "conv_1d.w": jnp.transpose,
    "conv1d.weight": lambda w: w[:, 0],
    "a_log": lambda a: -a[:, 0],
    "recurrent_gate_proj.weight": lambda w: w.T[None],
    "recurrent_gate_proj.bias": lambda b: b[None],
    "input_gate_proj.weight": lambda w: w.T[None],
    "input_gate_proj.bias": lambda b: b[None],
}


def in_our_layout(golden, kind, names, prefix=""):
    arrays = golden.fields(kind, prefix)
    same = lambda array: array
    return [LAYOUT.get(name, same)(arrays[name]) for name in names]


def load(mixer, golden, names, prefix=""):
    leaves = lambda m: [leaf(m) for leaf in names.values()]
    return eqx.tree_at(leaves, mixer, in_our_layout(golden, "p", names, prefix))


def assert_gradients(gradients, golden, names, dtype, prefix=""):
    expected = in_our_layout(golden, "g.p", names, prefix)
    for leaf, gradient in zip(names.values(), expected, strict=True):
        assert_close(leaf(gradients), gradient, dtype)


def over_documents(golden):
    starts = golden["segment_pos"] == 0
    return lambda mixer, x: jax.vmap(lambda x, resets: mixer(x, resets=resets)[0])(x, starts)


@both_precisions
@documents
def test_golden_rg_lru(kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(f"rg_rglru_{kind}_L56", dtype)
        mixer = load(RGLRUSequenceMixer(8, jr.key(0), num_heads=2), golden, RG_LRU)
        y, d_mixer, d_x = value_and_gradients(over_documents(golden), mixer, golden)
        assert_close(y, golden["y"], dtype)
        assert_close(y[:, -1], golden["last_h"], dtype)
        assert_close(d_x, golden["g.x"], dtype)
        assert_gradients(d_mixer, golden, RG_LRU, dtype)


@both_precisions
@documents
def test_golden_recurrent_block(kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(f"rg_recurrentblock_{kind}_L56", dtype)
        mixer = GriffinSequenceMixer(6, jr.key(0), lru_width=8, num_heads=2)
        mixer = load(mixer, golden, RECURRENT_BLOCK)
        d_mixer = golden_gradients(over_documents(golden), mixer, golden, dtype)
        assert_gradients(d_mixer, golden, RECURRENT_BLOCK, dtype)


@pytest.mark.slow
@documents
def test_golden_prefill_then_steps(kind):
    with jax.enable_x64(True):
        golden = Golden(f"rg_recurrentblock_{kind}_L56", "float64")
        mixer = GriffinSequenceMixer(6, jr.key(0), lru_width=8, num_heads=2)
        mixer = load(mixer, golden, RECURRENT_BLOCK)

        @eqx.filter_jit
        @jax.vmap
        def run(x, starts):
            whole = mixer(x, resets=starts)[1]
            first, cache = mixer(x[:30], resets=starts[:30])

            def step(cache, inputs):
                y, cache = mixer(inputs[0][None], cache, resets=inputs[1][None])
                return cache, y[0]

            cache, rest = jax.lax.scan(step, cache, (x[30:], starts[30:]))
            return jnp.concatenate([first, rest]), cache, whole

        y, cache, whole = run(golden["x"], golden["segment_pos"] == 0)
        assert_close(y, golden["y_prefill30_decode"], "float64")
        for final in (cache, whole):
            assert_close(final.window, golden["conv1d_state"], "float64")
            assert_close(final.recurrence.state, golden["rg_lru_state"], "float64")
            assert final.recurrence.started.all()


@pytest.mark.slow
@both_precisions
def test_golden_lrnnx(dtype):
    """One head, exact GELU, no biases around, and no exception for the first sample."""
    with jax.enable_x64(dtype == "float64"):
        golden = Golden("lrnnx_rglru_L56", dtype)
        exact_gelu = lambda x: jax.nn.gelu(x, approximate=False)
        mixer = GriffinSequenceMixer(6, jr.key(0), use_bias=False, activation=exact_gelu)
        mixer = load(mixer, golden, LRNNX)
        empty = mixer.allocate_inference_cache()
        started = empty._replace(recurrence=RGLRUCache(empty.recurrence.state, jnp.array(True)))

        def run(mixer, x):
            return jax.vmap(lambda x: mixer(x, started)[0])(x)

        y, d_mixer, d_x = value_and_gradients(run, mixer, golden)
        assert_close(y, golden["y"], dtype)
        assert_close(d_x, golden["g.x"], dtype)
        assert_gradients(d_mixer, golden, LRNNX, dtype)
        if dtype == "float64":
            final = jax.vmap(lambda x: mixer(x, started)[1].recurrence.state)(golden["x"])
            assert_close(final, golden["final_state"][..., 0], dtype)

            def step(cache, sample):
                y, cache = mixer.step(sample, cache)
                return cache, y

            y_step = jax.vmap(lambda x: jax.lax.scan(step, started, x)[1])(golden["x"])
            assert_close(y_step, golden["y_step"], dtype)


def residual_leaves(block):
    mlp = block.channel_mixer
    return [
        block.sequence_norm.weight,
        block.channel_norm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.gate_proj.bias,
        mlp.up_proj.bias,
        mlp.down_proj.weight,
        mlp.down_proj.bias,
    ]


def golden_residual(golden, kind, prefix):
    arrays = golden.fields(kind, prefix)
    scale = 1 if kind == "p" else 0  # the original's RMS norm multiplies by 1 + scale
    up, bias = arrays["mlp_block.ffw_up.w"], arrays["mlp_block.ffw_up.b"]
    return [
        scale + arrays["temporal_pre_norm.scale"],
        scale + arrays["channel_pre_norm.scale"],
        *(up[0].T, up[1].T, bias[0].ravel(), bias[1].ravel()),
        arrays["mlp_block.ffw_down.weight"],
        arrays["mlp_block.ffw_down.bias"],
    ]


ATTENTION = {
    "proj_q.weight": lambda m: m.q_proj.weight,
    "proj_k.weight": lambda m: m.k_proj.weight,
    "proj_v.weight": lambda m: m.v_proj.weight,
    "proj_final.weight": lambda m: m.out_proj.weight,
    "proj_final.bias": lambda m: m.out_proj.bias,
}
TEMPORAL = [("recurrent_block", RECURRENT_BLOCK)] * 2 + [("attention_block", ATTENTION)]


def wide_griffin(window):
    """The width of the originals' MLP, 24, is no multiple of the stream's."""
    model = Griffin(jr.key(0), hidden_dim=16, num_blocks=3, num_heads=2, window=window, expansion=1)
    up, down = eqx.nn.Linear(16, 24, key=jr.key(0)), eqx.nn.Linear(24, 16, key=jr.key(0))
    mlps = lambda m: [
        linear
        for block in m.blocks
        for linear in (
            block.channel_mixer.gate_proj,
            block.channel_mixer.up_proj,
            block.channel_mixer.down_proj,
        )
    ]
    return eqx.tree_at(mlps, model, [up, up, down] * 3)


def load_griffin(golden):
    model, blocks = wide_griffin(window=17), []
    for i, block in enumerate(model.blocks):
        prefix, (temporal, names) = f"blocks.{i}.", TEMPORAL[i]
        block = eqx.tree_at(residual_leaves, block, golden_residual(golden, "p", prefix))
        mixer = load(block.sequence_mixer, golden, names, f"{prefix}{temporal}.")
        blocks.append(eqx.tree_at(lambda b: b.sequence_mixer, block, mixer))
    return eqx.tree_at(lambda m: m.blocks, model, tuple(blocks))


def logits(model, state, embedding, scale, tokens):
    """The original's ends: embeddings times the root of the width, tied and softly capped logits."""
    y, state = model(embedding[tokens] * 4.0, state)
    y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)[None]
    return 30 * jnp.tanh(y @ embedding.T / 30), state


@pytest.mark.slow
@both_precisions
def test_golden_griffin(dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden("rg_griffin_L56", dtype)
        model = load_griffin(golden)
        state = eqx.nn.State(model)
        tokens = golden["tokens"].astype(int)
        ends = golden["p.embedder.input_embedding"], golden["p.final_norm.scale"]

        @eqx.filter_jit
        @eqx.filter_value_and_grad(has_aux=True)
        def loss(arguments):
            model, (embedding, scale) = arguments
            y = jax.vmap(lambda ids: logits(model, state, embedding, scale, ids)[0])(tokens)
            return jnp.sum(y * golden["w"]), y

        (_, y), (d_model, (d_embedding, d_scale)) = loss((model, ends))
        assert_close(y, golden["y"], dtype)
        assert_close(d_embedding, golden["g.p.embedder.input_embedding"], dtype)
        assert_close(d_scale, golden["g.p.final_norm.scale"], dtype)
        for i, block in enumerate(d_model.blocks):
            prefix, (temporal, names) = f"blocks.{i}.", TEMPORAL[i]
            expected = golden_residual(golden, "g.p", prefix)
            for actual, gradient in zip(residual_leaves(block), expected, strict=True):
                assert_close(actual, gradient, dtype)
            mixer_prefix = f"{prefix}{temporal}."
            assert_gradients(block.sequence_mixer, golden, names, dtype, mixer_prefix)


@pytest.mark.slow
def test_golden_griffin_streamed():
    """A stream longer than the window, in a chunk and then in single steps."""
    with jax.enable_x64(True):
        golden = Golden("rg_griffin_L56", "float64")
        live = streaming_mode(eqx.nn.inference_mode(load_griffin(golden)))
        state = inference_state(live, eqx.nn.State(live), batch_size=2)
        ends = golden["p.embedder.input_embedding"], golden["p.final_norm.scale"]
        run = eqx.filter_jit(jax.vmap(lambda state, ids: logits(live, state, *ends, ids)))
        tokens = golden["tokens"].astype(int)
        y, state = run(state, tokens[:, :30])
        ys = [y]
        for t in range(30, 56):
            y, state = run(state, tokens[:, t : t + 1])
            ys.append(y)
        assert_close(jnp.concatenate(ys, axis=1), golden["y"], "float64")


def test_initialisation():
    mixer = RGLRUSequenceMixer(2000, jr.key(0), num_heads=100, a_min=0.9, a_max=0.999)
    a = np.sort(np.exp(-np.logaddexp(0, np.asarray(mixer.Lambda, float))))
    assert 0.9 <= a[0] < 0.901 and 0.998 < a[-1] <= 0.999 + 1e-6
    quantiles = np.linspace(0.9**2, 0.999**2, 2000)
    assert np.abs(a**2 - quantiles).max() < 0.01  # uniform in the square
    for weight in (mixer.a_weight, mixer.input_weight):
        assert abs(np.std(weight) * 20**0.5 - 1) < 0.02
    assert (mixer.a_weight != mixer.input_weight).all()


def test_share_of_the_input_near_one():
    """1 - a^2 keeps its digits where a rounds to one, and its root's derivative stays bounded."""
    mixer = RGLRUSequenceMixer(1, jr.key(0))
    where = lambda m: (m.Lambda, m.a_weight, m.input_weight)
    zero = jnp.zeros((1, 1, 1))
    started = RGLRUCache(jnp.zeros(1), jnp.array(True))

    @jax.jit
    @jax.value_and_grad
    def output(Lambda):
        return eqx.tree_at(where, mixer, (Lambda[None], zero, zero))(jnp.ones((1, 1)), started)[
            0
        ].sum()

    for Lambda in (-18.0, -40.0, -60.0):
        log_a = -4 * np.exp(Lambda)  # softplus far below zero; both gates are half open
        y, slope = output(jnp.asarray(Lambda))
        np.testing.assert_allclose(y, 0.5 * np.sqrt(-np.expm1(2 * log_a)), rtol=1e-5)
        root_slope = min(1000.0, 0.5 / np.sqrt(max(-2 * log_a, 1e-300)))
        np.testing.assert_allclose(slope, 0.5 * root_slope * -2 * log_a, rtol=1e-4)


@pytest.mark.slow
def test_models():
    """Hawk has the recurrence in every block, Griffin attention in each third."""
    model = RGLRU(jr.key(0), hidden_dim=8, num_blocks=2, lru_width=6, num_heads=2, expansion=2)
    assert all(isinstance(block, ResidualBlock) for block in model.blocks)
    assert [block.sequence_mixer.rg_lru.a_weight.shape for block in model.blocks] == [(2, 3, 3)] * 2
    assert model.blocks[0].channel_mixer.gate_proj.weight.shape == (16, 8)
    griffin = Griffin(jr.key(0), hidden_dim=16, num_blocks=7, window=5)
    assert [block.sequence_mixer.__class__.__name__[:7] for block in griffin.blocks] == [
        "Griffin",
        "Griffin",
        "Attenti",
        "Griffin",
        "Griffin",
        "Attenti",
        "Griffin",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"`num_heads` must divide the width of the recurrence = 8; got 3"),
        ({"num_heads": 0}, r"`num_heads` must be a whole number of at least 1; got 0"),
        ({"a_min": 0.9, "a_max": 0.5}, "a_min <= a_max < 1; got a_min=0.9 and a_max=0.5"),
        ({"a_max": 1.0}, "got a_min=0.9 and a_max=1.0"),
        ({"a_min": 0.0}, "got a_min=0.0"),
        ({"lru_width": 0}, "`lru_width` must be .* at least 1; got 0"),
        ({"conv_width": 0}, "`conv_width` must be .* at least 1; got 0"),
    ],
)
def test_unfit_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        GriffinSequenceMixer(8, jr.key(0), **options)


@pytest.mark.slow
def test_cache_of_another_mixer():
    mixer = GriffinSequenceMixer(4, jr.key(0))
    for other in (
        GriffinSequenceMixer(4, jr.key(0), conv_width=3),
        GriffinSequenceMixer(4, jr.key(0), lru_width=6),
        RGLRUSequenceMixer(4, jr.key(0)),
    ):
        with pytest.raises(ValueError, match="`GriffinSequenceMixer` takes a cache of shapes"):
            mixer(jnp.ones((3, 4)), other.allocate_inference_cache())
