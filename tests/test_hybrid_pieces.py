"""What hybrid language models are made of: norms, gates, scales and sums, and the errors of each."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from helpers import assert_close, assert_equal, draw

from discretax.architectures import LanguageModel
from discretax.blocks import OffsetRMSNorm, ResidualBlock, StandardBlock
from discretax.channel_mixers import IdentityChannelMixer, MLPChannelMixer, SwiGLU
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    Bidirectional,
    IdentitySequenceMixer,
    LRUSequenceMixer,
    Mamba2SequenceMixer,
    MambaSequenceMixer,
    SumSequenceMixer,
    rotary_scaling,
)

WIDTH, TIME = 8, 6
run = eqx.filter_jit(lambda mixer, x: mixer(x)[0])
lru = ft.partial(LRUSequenceMixer, WIDTH, state_dim=4)


def test_gated_attention_of_qwen3_5():
    """On disk, each head's rows of queries are followed by those of its gate."""
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        with jax.enable_x64(dtype == "float64"):
            golden = Golden("hf_qwen3_5_attention_L48", dtype)
            mixer = AttentionSequenceMixer(
                16,
                jr.key(0),
                num_heads=4,
                num_kv_heads=2,
                head_dim=8,
                rotary_fraction=0.5,
                qk_norm=OffsetRMSNorm,
                gate="element",
            )

            def leaves(m):
                projections = (m.q_proj, m.gate_proj, m.k_proj, m.v_proj, m.out_proj)
                norms = (m.q_norm.offset, m.k_norm.offset)
                return [layer.weight for layer in projections] + list(norms)

            def original(kind, golden=golden):
                arrays = golden.fields(kind)
                q, gate = jnp.split(arrays["q_proj.weight"].reshape(4, 16, 16), 2, axis=1)
                names = ("k_proj.weight", "v_proj.weight", "o_proj.weight")
                norms = ("q_norm.weight", "k_norm.weight")
                return [
                    q.reshape(32, 16),
                    gate.reshape(32, 16),
                    *(arrays[name] for name in names + norms),
                ]

            mixer = eqx.tree_at(leaves, mixer, original("p"))

            @jax.jit
            @ft.partial(jax.grad, argnums=(0, 1), has_aux=True)
            def loss(mixer, x, golden=golden):
                y, _ = mixer(x)
                return jnp.sum(y * golden["w"][0]), y

            (d_mixer, d_x), y = loss(mixer, golden["x"][0])
            assert_close(y, golden["y"][0], tolerance)
            assert_close(d_x, golden["g.x"][0], tolerance)
            for gradient, expected in zip(leaves(d_mixer), original("g.p"), strict=True):
                assert_close(gradient, expected, tolerance)


ROTARY = 10_000.0 ** (-np.arange(8) / 8)
STRETCHED = {
    "linear": (rotary_scaling.Linear(4.0), ROTARY / 4),
    # transformers 5.24.0, `ROPE_INIT_FUNCTIONS`, in float32.
    "llama3": (
        rotary_scaling.Llama3(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=512),
        np.array(
            [
                1.0,
                0.3162277638912201,
                0.10000000149011612,
                0.01849667727947235,
                0.0012499999720603228,
                0.00039528473280370235,
                0.0001250000059371814,
                3.9528473280370235e-05,
            ]
        ),
    ),
    "yarn": (
        rotary_scaling.Yarn(4.0, original_length=512),
        np.array(
            [
                1.0,
                0.2569350600242615,
                0.0625,
                0.013834965415298939,
                0.0024999999441206455,
                0.0007905694656074047,
                0.0002500000118743628,
                7.905694656074047e-05,
            ]
        ),
    ),
    "proportional": (
        rotary_scaling.Proportional(0.5),
        np.concatenate([ROTARY[:4], np.zeros(4)]),
    ),
}


@pytest.mark.parametrize("name", STRETCHED)
def test_stretched_frequencies(name):
    scaling, expected = STRETCHED[name]
    np.testing.assert_allclose(scaling(ROTARY, 10_000.0), expected, rtol=1e-6)


def test_yarn_magnifies_queries_and_keys():
    assert rotary_scaling.Yarn(4.0, 512).magnitude == pytest.approx(1.138629436111989)
    assert rotary_scaling.Yarn(4.0, 512, attention_factor=2.0).magnitude == 2.0
    make = ft.partial(AttentionSequenceMixer, WIDTH, jr.key(0), num_heads=2)
    factor = lambda f: rotary_scaling.Yarn(1.0, 512, attention_factor=f)
    x = draw(TIME, WIDTH)
    doubled = run(make(rotary_scaling=factor(2.0)), x)
    assert_close(doubled, run(make(rotary_scaling=factor(1.0), scale=4 * 4**-0.5), x), 1e-5)


def test_scores_without_a_norm_over_heads_see_their_size():
    """Norms make scores blind to the size of the input; over all heads, not to that of one head."""
    x = draw(TIME, WIDTH)
    make = ft.partial(AttentionSequenceMixer, WIDTH, jr.key(0), num_heads=2)
    norm = ft.partial(eqx.nn.RMSNorm, eps=1e-12)

    def weights(mixer, factor):
        """What is read of values that do not change: with keys of one head times the factor."""
        rows = jnp.repeat(jnp.array([factor, 1.0]), WIDTH // 2)[:, None]
        mixer = eqx.tree_at(lambda m: m.k_proj.weight, mixer, replace_fn=lambda w: w * rows)
        return run(mixer, x)

    by_head, over_all = make(qk_norm=norm), make(qk_norm=norm, norm_over="all")
    assert_close(weights(by_head, 3.0), weights(by_head, 1.0), 1e-4)
    assert jnp.abs(weights(over_all, 3.0) - weights(over_all, 1.0)).max() > 1e-3


def test_gates_multiply_what_heads_read():
    x = draw(TIME, WIDTH)
    for gate, gates in (("element", WIDTH), ("head", 2)):
        mixer = AttentionSequenceMixer(WIDTH, jr.key(0), num_heads=2, gate=gate)
        assert mixer.gate_proj.weight.shape == (gates, WIDTH)
        half = eqx.tree_at(lambda m: m.gate_proj.weight, mixer, replace_fn=jnp.zeros_like)
        plain = eqx.tree_at(lambda m: m.gate_proj, mixer, None)
        assert_close(run(half, x), run(plain, x) / 2, 1e-6)


def test_a_sum_of_mixers():
    lru = ft.partial(LRUSequenceMixer, state_dim=4)
    mixer = SumSequenceMixer(
        WIDTH,
        jr.key(0),
        mixers=(lru, ft.partial(AttentionSequenceMixer, num_heads=2)),
        in_scales=(1.0, 0.5),
        out_scales=(0.8, 1.2),
    )
    first, second = mixer.mixers
    x = draw(TIME, WIDTH)
    expected = 0.8 * run(first, x) + 1.2 * run(second, 0.5 * x)
    assert_close(run(mixer, x), expected, 1e-6)


def test_numbers_of_numpy_are_no_types():
    """A constant multiplies activations of eight bits, and leaves them what they are."""
    x = draw(TIME, WIDTH).astype(jnp.bfloat16)
    mixer = SumSequenceMixer(
        WIDTH, jr.key(0), mixers=(ft.partial(LRUSequenceMixer, state_dim=4),), in_scales=np.ones(1)
    )
    assert mixer(x)[0].dtype == jnp.bfloat16
    swiglu = SwiGLU(WIDTH, jr.key(0), intermediate_dim=5, out_scale=np.float64(0.5))
    assert swiglu(x).dtype == jnp.bfloat16
    attention = AttentionSequenceMixer(WIDTH, jr.key(0), num_heads=2, scale=jnp.asarray(0.5))
    assert type(attention.scale) is float


def test_scales_of_mamba2_are_those_of_its_map():
    scales = (1.3, 0.7, 1.5, 0.6, 1.2)
    make = ft.partial(Mamba2SequenceMixer, WIDTH, jr.key(0), state_dim=3, head_dim=4, inner_dim=12)
    rows = jnp.asarray(np.repeat(scales, (12, 12, 3, 3, 3)), jnp.float32)[:, None]
    folded = eqx.tree_at(lambda m: m.in_proj.weight, make(), replace_fn=lambda w: w * rows)
    x = draw(TIME, WIDTH)
    assert_close(run(make(scales=scales), x), run(folded, x), 1e-5)


def test_where_the_norm_of_mamba2_stands():
    """With the last map taken away, what comes out without a norm is the gated state's reading."""
    sizes = {"state_dim": 3, "head_dim": 4, "inner_dim": WIDTH, "norm_groups": 2}
    make = ft.partial(Mamba2SequenceMixer, WIDTH, jr.key(0), **sizes)
    weight = jnp.linspace(0.5, 2.0, WIDTH)
    x = draw(TIME, WIDTH)

    def read(gate_norm):
        mixer = make(gate_norm=gate_norm)
        mixer = eqx.tree_at(lambda m: m.out_proj.weight, mixer, jnp.eye(WIDTH))
        if gate_norm is not None:
            mixer = eqx.tree_at(lambda m: m.norm_weight, mixer, weight)
        return run(mixer, x)

    def norm(y):
        groups = y.reshape(TIME, 2, WIDTH // 2)
        size = jnp.sqrt(jnp.mean(groups**2, axis=-1, keepdims=True) + 1e-5)
        return (groups / size).reshape(TIME, WIDTH) * weight[None]

    gate = jax.nn.silu(x @ make().in_proj.weight[:WIDTH].T)
    plain = read(None)
    assert_close(read("after"), norm(plain), 1e-5)
    assert_close(read("before"), norm(plain / gate) * gate, 1e-5)


def test_block_of_jamba():
    """Mamba with learned weights of its inner norms."""
    with jax.enable_x64(True):
        golden = Golden("hf_jamba_block_L37", "float64")
        block, state = eqx.nn.make_with_state(ResidualBlock)(
            16,
            sequence_mixer=ft.partial(
                MambaSequenceMixer,
                state_dim=4,
                dt_rank=3,
                b_c_dt_rms_eps=1e-6,
                b_c_dt_weights=True,
            ),
            channel_mixer=ft.partial(SwiGLU, intermediate_dim=24),
            norm=ft.partial(eqx.nn.RMSNorm, eps=1e-6, use_bias=False),
            key=jr.key(0),
        )

        def leaves(block):
            mamba, mlp = block.sequence_mixer, block.channel_mixer
            dt, b, c = mamba.dt_b_c_weights
            return {
                "input_layernorm.weight": block.sequence_norm.weight,
                "pre_ff_layernorm.weight": block.channel_norm.weight,
                "mamba.in_proj.weight": mamba.in_proj.weight,
                "mamba.conv1d.weight": mamba.conv_weight,
                "mamba.conv1d.bias": mamba.conv_bias,
                "mamba.x_proj.weight": mamba.x_proj.weight,
                "mamba.dt_proj.weight": mamba.dt_proj.weight,
                "mamba.dt_proj.bias": mamba.dt_proj.bias,
                "mamba.dt_layernorm.weight": dt,
                "mamba.b_layernorm.weight": b,
                "mamba.c_layernorm.weight": c,
                "mamba.A_log": mamba.A_log,
                "mamba.D": mamba.D,
                "mamba.out_proj.weight": mamba.out_proj.weight,
                "feed_forward.gate_proj.weight": mlp.gate_proj.weight,
                "feed_forward.up_proj.weight": mlp.up_proj.weight,
                "feed_forward.down_proj.weight": mlp.down_proj.weight,
            }

        original = golden.fields("p")
        original["mamba.conv1d.weight"] = original["mamba.conv1d.weight"][:, 0]
        assert original.keys() == leaves(block).keys()
        arrays = [original[name] for name in leaves(block)]
        block = eqx.tree_at(lambda b: list(leaves(b).values()), block, arrays)
        assert_close(eqx.filter_jit(block)(golden["x"], state)[0], golden["y"], 1e-10)


def test_residual_block_with_norms_of_branches():
    x = draw(TIME, WIDTH)
    make = ft.partial(
        ResidualBlock,
        WIDTH,
        jr.key(0),
        sequence_mixer=ft.partial(LRUSequenceMixer, state_dim=4),
        channel_mixer=ft.partial(SwiGLU, intermediate_dim=5),
    )
    block, state = eqx.nn.make_with_state(make)(norm=None, branch_norm="rms", residual_scale=0.4)
    norm = lambda y: y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    expected = x + 0.4 * norm(run(block.sequence_mixer, x))
    expected = expected + 0.4 * norm(block.channel_mixer(expected))
    assert_close(block(x, state)[0], expected, 1e-5)


def test_mlp_of_two_layers():
    mixer = MLPChannelMixer(WIDTH, jr.key(0), intermediate_dim=5, non_linearity="relu2")
    x = draw(TIME, WIDTH)
    expected = jnp.maximum(x @ mixer.linear.weight.T, 0) ** 2 @ mixer.down_proj.weight.T
    assert_close(mixer(x), expected, 1e-6)


def test_swiglu_with_constants():
    mixer = SwiGLU(WIDTH, jr.key(0), intermediate_dim=5, gate_scale=0.8, out_scale=1.3)
    folded = SwiGLU(WIDTH, jr.key(0), intermediate_dim=5)
    folded = eqx.tree_at(
        lambda m: (m.gate_proj.weight, m.down_proj.weight),
        folded,
        (0.8 * mixer.gate_proj.weight, 1.3 * mixer.down_proj.weight),
    )
    x = draw(TIME, WIDTH)
    assert_close(mixer(x), folded(x), 1e-6)


mlp = ft.partial(
    StandardBlock,
    sequence_mixer=IdentitySequenceMixer,
    channel_mixer=ft.partial(MLPChannelMixer, intermediate_dim=5, non_linearity="relu2"),
    activation=None,
    norm="rms",
    drop_rate=0.0,
)
mamba = ft.partial(
    StandardBlock,
    sequence_mixer=MambaSequenceMixer,
    channel_mixer=IdentityChannelMixer,
    activation=None,
    norm="rms",
    drop_rate=0.0,
)
TOKENS = jnp.array([3, 1, 4, 1, 5, 9])


def make_model(**options):
    options = {"blocks": (mamba, mlp), "num_blocks": 4} | options
    return eqx.nn.make_with_state(LanguageModel)(
        jr.key(0), vocab_size=11, hidden_dim=WIDTH, **options
    )


def test_a_model_of_blocks():
    """Blocks of two kinds in turn; the logits' scale comes before their cap."""
    model, state = make_model(logit_scale=0.7, soft_cap=2.0)
    kinds = [type(block.sequence_mixer) for block in model.backbone.blocks]
    assert kinds == [MambaSequenceMixer, IdentitySequenceMixer] * 2
    plain, _ = make_model()
    expected = 2 * jnp.tanh(0.7 * plain(TOKENS, state)[0] / 2)
    assert_close(model(TOKENS, state)[0], expected, 1e-6)


def test_a_residual_stream_of_more_digits():
    """Blocks of bfloat16: with the sum in float32, it is nearer to all in float32."""
    logits = {}
    for name, types in {
        "float32": {},
        "bfloat16": {"dtype": jnp.bfloat16},
        "beside": {"dtype": jnp.bfloat16, "residual_dtype": jnp.float32},
    }.items():
        model, state = make_model(blocks=(mlp,), num_blocks=16, embedding_scale=1000.0, **types)
        logits[name] = model(TOKENS, state)[0]
    error = {name: jnp.abs(y - logits["float32"]).mean() for name, y in logits.items()}
    assert 0 < error["beside"] < error["bfloat16"] / 2


def test_loss_of_some_tokens():
    model, state = make_model()
    mask = jnp.array([True, False, True, True, False, True])
    losses, _ = model.loss(TOKENS, state, mask=mask)
    log_p = jax.nn.log_softmax(model(TOKENS, state)[0])
    expected = -sum(log_p[t - 1, TOKENS[t]] for t in (2, 3, 5))
    assert losses.count == 3
    assert_close(losses.total, expected, 1e-5)
    everything, _ = model.loss(TOKENS, state, mask=jnp.ones(6, bool))
    assert_equal(everything, model.loss(TOKENS, state)[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: AttentionSequenceMixer(8, jr.key(0), norm_over="both"),
            ValueError,
            "`norm_over` must be one of 'head', 'all'; got 'both'",
        ),
        (
            lambda: AttentionSequenceMixer(8, jr.key(0), gate="row"),
            ValueError,
            "`gate` must be one of 'element', 'head', None; got 'row'",
        ),
        (
            lambda: AttentionSequenceMixer(8, jr.key(0), scale=0.0),
            ValueError,
            "`scale` must be positive; got 0.0",
        ),
        (
            lambda: AttentionSequenceMixer(8, jr.key(0), rotary_scaling=4.0),
            TypeError,
            "`rotary_scaling` must be None or one of .*; got 4.0",
        ),
        (
            lambda: AttentionSequenceMixer(8, jr.key(0), qk_norm="rms"),
            TypeError,
            "`qk_norm` must be None or a function of a width that makes a norm",
        ),
        (
            lambda: AttentionSequenceMixer(
                8, jr.key(0), rotary_scaling=rotary_scaling.Linear(float("nan"))
            ),
            ValueError,
            "`factor` of `Linear` must be a positive number; got nan",
        ),
        (
            lambda: AttentionSequenceMixer(
                8, jr.key(0), rotary_scaling=rotary_scaling.Llama3(8.0, 2.0, 2.0, 64)
            ),
            ValueError,
            "`high_freq_factor` of `Llama3` must be above its `low_freq_factor`",
        ),
        (
            lambda: AttentionSequenceMixer(
                8, jr.key(0), rotary_scaling=rotary_scaling.Proportional(2.0)
            ),
            ValueError,
            "`fraction` of `Proportional` must be at most 1; got 2.0",
        ),
        (
            lambda: AttentionSequenceMixer(
                8, jr.key(0), rotary_base=1.0, rotary_scaling=rotary_scaling.Yarn(2.0, 64)
            ),
            ValueError,
            "`rotary_base` must be above 1 with `Yarn`; got 1.0",
        ),
        (
            lambda: SumSequenceMixer(8, jr.key(0), mixers=[lru(jr.key(0))] * 2),
            ValueError,
            r"`mixers\[1\]` is one of the mixers before it",
        ),
        (
            lambda: SumSequenceMixer(8, jr.key(0), mixers=(LRUSequenceMixer,), in_scales="a"),
            ValueError,
            "`in_scales` must be one number for each of 1 mixers; got 'a'",
        ),
        (
            lambda: Bidirectional(
                8, forward=lambda n, *, key: LRUSequenceMixer(4, key), key=jr.key(0)
            ),
            ValueError,
            "`forward` must make a mixer of width in_features = 8; got LRUSequenceMixer of width 4",
        ),
        (
            lambda: make_model(dtype=jnp.int32),
            TypeError,
            "`dtype` must be a floating type, such as `jax.numpy.bfloat16`; got",
        ),
        (
            lambda: mlp(8, jr.key(0), dtype="nonsense"),
            TypeError,
            "`dtype` must be a floating type, such as `jax.numpy.bfloat16`; got 'nonsense'",
        ),
        (
            lambda: SumSequenceMixer(8, jr.key(0), mixers=()),
            ValueError,
            "`mixers` must be a sequence of at least one mixer",
        ),
        (
            lambda: SumSequenceMixer(8, jr.key(0), mixers=(LRUSequenceMixer(4, jr.key(0)),)),
            ValueError,
            r"`mixers\[0\]` must be of width in_features = 8; got LRUSequenceMixer of width 4",
        ),
        (
            lambda: SumSequenceMixer(8, jr.key(0), mixers=(LRUSequenceMixer,), in_scales=(1, 2)),
            ValueError,
            "`in_scales` must be one number for each of 1 mixers",
        ),
        (
            lambda: Mamba2SequenceMixer(8, jr.key(0), head_dim=4, scales=(1.0, 1.0)),
            TypeError,
            "`scales` of `Mamba2SequenceMixer` must be 5 numbers, such as",
        ),
        (
            lambda: Mamba2SequenceMixer(8, jr.key(0), head_dim=4, scales=(1.0, 1.0, 0.0, 1.0, 1.0)),
            ValueError,
            r"`scales\[2\]` must be positive; got 0.0",
        ),
        (
            lambda: Mamba2SequenceMixer(8, jr.key(0), head_dim=4, inner_dim=10),
            ValueError,
            "`head_dim` must divide inner_dim = 10; got 4",
        ),
        (
            lambda: Mamba2SequenceMixer(8, jr.key(0), head_dim=4, norm_groups=3),
            ValueError,
            "`norm_groups` must divide",
        ),
        (
            lambda: MambaSequenceMixer(8, jr.key(0), b_c_dt_weights=True),
            ValueError,
            "`b_c_dt_weights=True` multiplies what is normalised; got b_c_dt_rms_eps=None",
        ),
        (lambda: make_model(blocks=()), ValueError, "or `blocks` one that makes a block; got none"),
        (
            lambda: make_model(pattern=(MambaSequenceMixer,)),
            ValueError,
            "or `blocks` one that makes a block; got both",
        ),
        (
            lambda: make_model(blocks=(MambaSequenceMixer,)),
            TypeError,
            r"`blocks\[0\]` must be a function .* that makes an `AbstractBlock`",
        ),
        (
            lambda: make_model(drop_rate=0.1),
            ValueError,
            "`channel_mixer` and `drop_rate` are options of the blocks that are made of a `pattern`",
        ),
        (
            lambda: make_model(residual_dtype=jnp.float32),
            ValueError,
            "`residual_dtype` is that of a residual stream beside activations of another type",
        ),
        (
            lambda: make_model()[0].loss(TOKENS, make_model()[1], mask=jnp.ones(5, bool)),
            ValueError,
            r"`mask` must be one boolean per token, bool\(6,\); got bool\(5,\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
