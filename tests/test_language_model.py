"""The language model: what it computes, what its loss is, how it starts, and in which types."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, changed

from discretax import Timeseries, inference_state, streaming_mode
from discretax.architectures import LanguageModel
from discretax.blocks import OffsetRMSNorm
from discretax.channel_mixers import SwiGLU
from discretax.heads import LanguageModelHead
from discretax.models import scan_blocks
from discretax.ops import chunked_cross_entropy
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    GatedDeltaNetSequenceMixer,
    GriffinSequenceMixer,
    MambaSequenceMixer,
)

pytestmark = pytest.mark.slow

TOKENS, WIDTH, TIME = 11, 8, 9
recurrent = ft.partial(GriffinSequenceMixer, num_heads=2)
attention = ft.partial(AttentionSequenceMixer, num_heads=2, window=4)
MODELS = {
    "mamba": {"pattern": (MambaSequenceMixer,), "num_blocks": 2},
    "griffin": {
        "pattern": (recurrent, recurrent, attention),
        "num_blocks": 4,
        "channel_mixer": ft.partial(SwiGLU, intermediate_dim=12),
        "tie_embeddings": False,
        "embedding_scale": WIDTH**0.5,
        "soft_cap": 2.0,
        "norm": ft.partial(OffsetRMSNorm, eps=1e-5),
    },
}
every_model = pytest.mark.parametrize("name", MODELS)
delta = ft.partial(GatedDeltaNetSequenceMixer, num_heads=2, value_dim=4)
HYBRID = {
    "pattern": (delta, delta, delta, attention),
    "num_blocks": 4,
    "channel_mixer": ft.partial(SwiGLU, intermediate_dim=12),
}


@ft.cache
def make(name, **options):
    sizes = HYBRID if name == "hybrid" else MODELS[name]
    model, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0), vocab_size=TOKENS, hidden_dim=WIDTH, **sizes, **options
    )
    return changed(model), state


def tokens(time=TIME):
    return jr.randint(jr.key(3), (time,), 0, TOKENS)


@eqx.filter_jit
def run(model, x, state):
    return model(x, state)


@every_model
def test_equation(name):
    model, state = make(name)
    logits, _ = run(model, tokens(), state)
    x = model.encoder.embedding.weight[tokens()] * (WIDTH**0.5 if name == "griffin" else 1)
    for block in model.backbone.blocks:
        x, state = run(block, x, state)
    scale = 1 + model.norm.offset if name == "griffin" else model.norm.weight
    x = scale[None] * x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + model.norm.eps)
    if name == "griffin":
        expected = 2 * jnp.tanh(x @ model.head.weight.T / 2)
    else:
        expected = x @ model.encoder.embedding.weight.T
    assert_close(logits, expected)


@eqx.filter_jit
@eqx.filter_value_and_grad
def of_logits(model, state, x):
    log_p = jax.nn.log_softmax(model(x, state)[0])
    return -jnp.mean(jnp.stack([log_p[t - 1, x.values[t]] for t in (1, 2, 4, 5, 6)]))


@every_model
@pytest.mark.parametrize("chunk_size", [3, 128])
def test_loss_and_its_gradients(name, chunk_size):
    """That of the logits, over the tokens that are neither padding nor the first of a document."""
    model, state = make(name)
    resets = jnp.arange(TIME) == 3
    x = Timeseries(tokens(), length=7, resets=resets)

    @eqx.filter_jit
    @ft.partial(eqx.filter_value_and_grad, has_aux=True)
    def of_loss(model):
        loss, _ = model.loss(x, state, chunk_size=chunk_size)
        return loss.total / loss.count, loss.count

    (loss, count), gradients = of_loss(model)
    assert count == 5
    assert_close((loss, gradients), of_logits(model, state, x))


def test_one_token_has_no_loss():
    model, state = make("mamba")
    count = eqx.filter_jit(lambda model, x: model.loss(x, state)[0].count)
    assert count(model, tokens(1)) == 0


def test_gradients_of_a_narrow_head_are_added_up_in_float32():
    """In its own type a sum over chunks would stop growing at 256 times what each adds."""
    model, state = make("griffin")
    narrow = eqx.tree_at(lambda m: m.head.weight, model, replace_fn=lambda w: w.astype("bfloat16"))
    wide = eqx.tree_at(lambda m: m.head.weight, narrow, replace_fn=lambda w: w.astype("float32"))
    x = jnp.zeros(601, int)
    loss = lambda model: model.loss(x, state, chunk_size=1)[0].total
    actual, expected = (
        eqx.filter_jit(eqx.filter_grad(loss))(either).head.weight for either in (narrow, wide)
    )
    assert actual.dtype == jnp.bfloat16
    assert_close(np.asarray(actual, np.float64), expected, 2**-8)


@pytest.mark.parametrize("time, chunk_size", [(7, 3), (6, 3), (2, 3), (0, 3)])
def test_chunked_cross_entropy(time, chunk_size):
    with jax.enable_x64(True):
        x, weight = (jr.normal(jr.key(i), (n, 4), float) for i, n in ((0, time), (1, 5)))
        targets = jr.randint(jr.key(2), (time,), 0, 5)
        weights = jnp.cos(jnp.arange(time, dtype=float))
        losses = lambda x, weight: chunked_cross_entropy(
            lambda x: x @ weight.T, x, targets, chunk_size=chunk_size
        )
        expected = lambda x, weight: -jax.nn.log_softmax(x @ weight.T)[jnp.arange(time), targets]
        np.testing.assert_allclose(losses(x, weight), expected(x, weight), rtol=1e-13)
        for argument in (0, 1):
            gradients = [
                jax.grad(lambda *a, f=f: f(*a) @ weights, argument)(x, weight)
                for f in (losses, expected)
            ]
            np.testing.assert_allclose(*gradients, rtol=1e-12, atol=1e-14)


def test_targets_out_of_range_are_seen():
    logits = lambda x: x
    losses = chunked_cross_entropy(logits, jnp.zeros((3, 5)), jnp.array([4, 5, -1], jnp.int8))
    np.testing.assert_allclose(losses, [np.log(5), np.nan, np.nan], rtol=1e-6)


def test_logits_of_a_chunk_alone_exist():
    """A vocabulary of 4096, 1024 samples: 16 MB of logits in float32."""
    model = LanguageModelHead(8, 4096, jr.key(0))
    loss = lambda model, x, targets: chunked_cross_entropy(model.logits, x, targets).sum()
    spec = jax.ShapeDtypeStruct((1024, 8), jnp.float32), jax.ShapeDtypeStruct((1024,), jnp.int32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(model, *spec).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * 128 * 4096


@pytest.mark.parametrize("name", [*MODELS, "hybrid"])
def test_streaming_and_blocks_in_a_loop(name):
    model, state = make(name)
    expected, _ = run(model, tokens(), state)
    live = scan_blocks(streaming_mode(eqx.nn.inference_mode(model)))
    stream, ys = inference_state(live, state, max_seqlen=TIME), []
    for start, end in ((0, 4), (4, 5), (5, TIME)):
        y, stream = run(live, tokens()[start:end], stream)
        ys.append(y)
    assert_close(jnp.concatenate(ys), expected)


def test_initialisation():
    def blocks(mixer, **options):
        model = LanguageModel(
            jr.key(0), vocab_size=2000, hidden_dim=64, num_blocks=8, pattern=(mixer,), **options
        )
        assert abs(np.std(model.encoder.embedding.weight) / 0.02 - 1) < 0.02
        return model.backbone.blocks

    mamba = blocks(MambaSequenceMixer)
    griffin = blocks(recurrent, channel_mixer=SwiGLU)
    deltas = blocks(GatedDeltaNetSequenceMixer)
    assert (mamba[0].sequence_mixer.in_proj.weight != mamba[1].sequence_mixer.in_proj.weight).any()
    for weight, sums in (
        (mamba[3].sequence_mixer.in_proj.weight, 1),
        (mamba[3].sequence_mixer.out_proj.weight, 8),
        (deltas[2].sequence_mixer.beta_proj.weight, 1),
        (deltas[2].sequence_mixer.output.out_proj.weight, 8),
        (griffin[1].sequence_mixer.linear_out.weight, 16),
        (griffin[1].channel_mixer.up_proj.weight, 1),
        (griffin[1].channel_mixer.down_proj.weight, 16),
    ):
        expected = (3 * weight.shape[1] * sums) ** -0.5  # uniform, by the width that it reads
        assert abs(np.std(weight) / expected - 1) < 0.05


@every_model
def test_bfloat16_activations(name):
    """Parameters, recurrences and logits stay in single precision."""
    model, state = make(name)
    rough = make(name, dtype=jnp.bfloat16)[0]
    precise, _ = run(model, tokens(), state)
    y, _ = run(rough, tokens(), state)
    assert y.dtype == jnp.float32
    assert 0 < jnp.abs(y - precise).max() < 3e-2 * jnp.abs(precise).max()
    seen, _ = eqx.filter_eval_shape(rough._hidden, tokens(), state, None)
    assert seen.dtype == jnp.bfloat16
    loss = lambda model: model.loss(tokens(), state)[0].total
    gradients = eqx.filter_jit(eqx.filter_grad(loss))(rough)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_offset_norm():
    norm = eqx.tree_at(lambda n: n.offset, OffsetRMSNorm(3, eps=0.5), jnp.array([0.0, 1.0, -1.0]))
    x = jnp.array([1.0, 2.0, 3.0])
    root = np.sqrt(14 / 3 + 0.5)
    np.testing.assert_allclose(norm(x), [1 / root, 4 / root, 0], rtol=1e-6)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pattern": ()}, "`pattern` must have a function .* at least one block"),
        ({"num_blocks": 0}, "`num_blocks` must be a whole number of at least 1; got 0"),
        ({"vocab_size": 0}, "`vocab_size` must be a whole number of at least 1; got 0"),
        ({"soft_cap": -1.0}, "`soft_cap` must be positive; got -1.0"),
        ({"norm": "group"}, "`norm` must be 'batch', .*; got 'group'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        given = {"vocab_size": TOKENS, "hidden_dim": WIDTH, **MODELS["mamba"], **options}
        LanguageModel(jr.key(0), **given)


def test_bad_input():
    model, state = make("mamba")
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 11\); got values from 0 to 11"):
        model(jnp.array([0, 11]), state)
    with pytest.raises(ValueError, match="whole numbers"):
        model(jnp.zeros(3), state)
    with pytest.raises(ValueError, match="needs the model's state"):
        model(tokens(), None)
    with pytest.raises(ValueError, match=r"`targets` must be \(time,\) = \(4,\); got \(3,\)"):
        chunked_cross_entropy(lambda x: x, jnp.zeros((4, 2)), jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"`targets` \(time,\) whole numbers; got .*float32"):
        chunked_cross_entropy(lambda x: x, jnp.zeros((4, 2)), jnp.zeros(4))
