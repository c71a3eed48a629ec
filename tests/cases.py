"""One entry per exported mixer. Every law of `discretax.testing` runs over every entry.

A new mixer is one more `Case`. If it takes timesteps, cannot stream or has a kernel, its entry says
so.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import ops, sharding
from discretax._types import widened
from discretax.blocks import OffsetRMSNorm
from discretax.sequence_mixers import (
    AbstractLTIMixer,
    AbstractSequenceMixer,
    AttentionSequenceMixer,
    Bidirectional,
    BidirectionalS5,
    Centaurus,
    CombaSequenceMixer,
    DeltaNetSequenceMixer,
    Discretized,
    GatedDeltaNet2SequenceMixer,
    GatedDeltaNetSequenceMixer,
    GatedDeltaProductSequenceMixer,
    GatedSequenceMixer,
    GLASequenceMixer,
    GriffinSequenceMixer,
    HGRN2SequenceMixer,
    HydraSequenceMixer,
    IdentitySequenceMixer,
    KimiDeltaAttentionSequenceMixer,
    LinOSSSequenceMixer,
    LRUSequenceMixer,
    Mamba2SequenceMixer,
    Mamba3SequenceMixer,
    MambaSequenceMixer,
    MinGRUSequenceMixer,
    MinLSTMSequenceMixer,
    MLSTMSequenceMixer,
    RetentionSequenceMixer,
    RGLRUSequenceMixer,
    RWKV7ChannelMixer,
    RWKV7SequenceMixer,
    S4DSequenceMixer,
    S4SequenceMixer,
    S5SequenceMixer,
    S7SequenceMixer,
    SequenceParallel,
    ShortConvSequenceMixer,
    SumSequenceMixer,
)
from discretax.sequence_mixers.base import zero_cache
from discretax.sequence_mixers.lti._diagonal_system import DiagonalSystem
from discretax.sequence_mixers.ltv.mamba3 import RATES
from discretax.sequence_mixers.rotary_scaling import Yarn

FEATURES = 4
ONE_DEVICE = sharding.make_mesh(devices=jax.devices()[:1])


# One for each mechanism: what is a matter of code that mixers share is tried on these.
ONE_OF_EACH = (
    "LRUSequenceMixer",  # a diagonal recurrence
    "S5SequenceMixer.async",  # with timesteps
    "LinOSSSequenceMixer.IM",
    "MambaSequenceMixer",
    "Mamba2SequenceMixer",
    "Mamba3SequenceMixer.rank",
    "KimiDeltaAttentionSequenceMixer",  # delta rule, a decay for each element of a key
    "GatedDeltaProductSequenceMixer",  # several steps a sample
    "MLSTMSequenceMixer",
    "RWKV7SequenceMixer.takes",
    "RGLRUSequenceMixer",
    "ShortConvSequenceMixer",
    "HydraSequenceMixer",
    "AttentionSequenceMixer.window",
    "S4SequenceMixer",
    "Centaurus.dws",
    "GatedSequenceMixer",
    "Bidirectional",
    "SequenceParallel",
)


class Case:
    """A mixer, with the options of `discretax.testing.check_mixer`."""

    def __init__(
        self,
        name: str,
        make: Callable[[PRNGKeyArray], AbstractSequenceMixer],
        *,
        variant: str = "",
        **options: Any,
    ):
        self.name = name
        self.make = make
        self.variant = variant
        self.options = options

    @property
    def streams(self) -> bool:
        return self.options.get("streams", True)

    @property
    def is_one_of_each(self) -> bool:
        return str(self) in ONE_OF_EACH

    @property
    def has_another_of_its_class(self) -> bool:
        """Among `ONE_OF_EACH`, with other options."""
        classes = [name.split(".")[0] for name in ONE_OF_EACH]
        return self.name in classes and not self.is_one_of_each

    def __str__(self) -> str:
        return f"{self.name}.{self.variant}" if self.variant else self.name


class Decay(AbstractLTIMixer[Array]):
    """A continuous-time mixer for the tests: impulses decaying at rates between the samples."""

    log_rate: Float[Array, " state"]
    frequency: Float[Array, " state"]
    B: Float[Array, "state features 2"]
    C: Float[Array, "features state 2"]
    D: Float[Array, " features"]
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("log_rate", "frequency", "B")

    def __init__(self, in_features: int, key: PRNGKeyArray, *, state_dim: int = 3):
        keys = jr.split(key, 5)
        self.log_rate = jr.normal(keys[0], (state_dim,))
        self.frequency = jr.normal(keys[1], (state_dim,))
        self.B = jr.normal(keys[2], (state_dim, in_features, 2))
        self.C = jr.normal(keys[3], (in_features, state_dim, 2))
        self.D = jr.normal(keys[4], (in_features,))
        self.in_features = in_features

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        return zero_cache(batch_size, (2, self.log_rate.shape[0]), dtype)

    def discretize(self, integration_timesteps=None):
        mixer = widened(self)
        timesteps = jnp.ones((), mixer.D.dtype)
        if integration_timesteps is not None:
            timesteps = jnp.asarray(integration_timesteps, mixer.D.dtype)[..., None]
        A = jax.lax.complex(-jnp.exp(mixer.log_rate), mixer.frequency)
        A_bar, _ = ops.dirac(A, timesteps.astype(A.dtype))
        return DiagonalSystem(
            A_bar=(A_bar.real, A_bar.imag),
            B=(mixer.B[..., 0], mixer.B[..., 1]),
            C=(mixer.C[..., 0], mixer.C[..., 1]),
            D=mixer.D,
        )

    def compute_kernel(self, length):
        return self.discretize().powers(length)


def convolve_states(mixer: AbstractLTIMixer, x: Array) -> Array:
    """h_t = sum_l K_l (B_bar x)_{t-l}, lag by lag, for a kernel of shape (time, state)."""
    _, B_bar, C = mixer.discretize()
    kernel = mixer.compute_kernel(x.shape[0])
    drive = x.astype(B_bar.dtype) @ B_bar.T
    h = sum(kernel[lag, None] * delayed(drive, lag) for lag in range(x.shape[0]))
    return (h @ C.T).real + mixer.discretize().D[None] * x


def delayed(x: Array, lag: int) -> Array:
    return jnp.pad(x, ((lag, 0), (0, 0)))[: x.shape[0]]


def convolve_positions(mixer: LinOSSSequenceMixer, x: Array) -> Array:
    """y_t = sum_l K_l (B x)_{t-l}, lag by lag, for a kernel of shape (time, state)."""
    kernel = mixer.compute_kernel(x.shape[0])
    B, C = (jax.lax.complex(*jnp.moveaxis(parts, -1, 0)) for parts in (mixer.B, mixer.C))
    force = x.astype(B.dtype) @ B.T
    y = sum(kernel[lag].astype(C.dtype)[None] * delayed(force, lag) for lag in range(x.shape[0]))
    return (y @ C.T).real + mixer.D[None] * x


def convolve_features(mixer: S4DSequenceMixer | S4SequenceMixer, x: Array) -> Array:
    """y_t = sum_l K_l x_{t-l} + D x_t for each feature, lag by lag."""
    kernel = mixer.compute_kernel(x.shape[0])  # (time, 1, features)
    return sum(kernel[lag] * delayed(x, lag) for lag in range(x.shape[0])) + mixer.D * x


def convolve_channels(mixer: Centaurus, x: Array) -> Array:
    """Project, convolve each channel lag by lag, project back."""
    kernel = mixer.compute_kernel(x.shape[0])
    features = x.shape[1]
    if mixer.mode == "full":
        u = x[:, None] * mixer.B.reshape(1, features, features)  # (time, out, in)
        u = u.reshape(x.shape[0], -1)
    else:
        u = x @ mixer.B.T if mixer.mode == "neck" else x * mixer.B[None]
    v = sum(kernel[lag, None] * delayed(u, lag) for lag in range(x.shape[0]))
    if mixer.mode == "neck":
        return v @ mixer.C.T
    v = v * mixer.C[None]
    return v.reshape(-1, features, features).sum(-1) if mixer.mode == "full" else v


def oscillator_size(mixer: LinOSSSequenceMixer) -> Array:
    """Without damping it is one, to rounding."""
    size = jnp.abs(mixer.discretize().eigenvalues())
    return size / (1 + 2**-20)


def linoss(variant: str, **options) -> Case:
    return Case(
        "LinOSSSequenceMixer",
        lambda key: LinOSSSequenceMixer(FEATURES, key, state_dim=3, **options),
        takes_timesteps=True,
        reference=convolve_positions,
        transition_size=oscillator_size,
        variant=variant,
    )


def spectral_norm(mixer: S4SequenceMixer) -> Array:
    return jnp.linalg.norm(mixer.discretize().A_bar, ord=2, axis=(-2, -1))


def centaurus(mode: str, **options) -> Case:
    pointwise = mode == "pointwise"
    fixed = ("log_A_real", "A_imag", "log_delta", *(("B", "C") if mode == "dws" else ()))
    return Case(
        "Centaurus",
        lambda key: Centaurus(
            FEATURES, key, mode=mode, sub_state_dim=3, dt_min=0.1, dt_max=1.0, **options
        ),
        takes_timesteps=True,
        gap_is_zero_input=options.get("discretization") == "dirac",
        reference=convolve_states if pointwise else convolve_channels,
        transition_size=diagonal_size,
        rounds_the_past=options.get("route") == "fft",
        not_drawn=fixed,
        variant=mode,
    )


def diagonal_size(mixer: AbstractLTIMixer) -> Array:
    return jnp.abs(mixer.discretize().A_bar)


def lru(key: PRNGKeyArray) -> LRUSequenceMixer:
    return LRUSequenceMixer(FEATURES, key, state_dim=3, r_min=0.3)


def mamba(key: PRNGKeyArray, **options) -> MambaSequenceMixer:
    """With B and C large enough for the state to be heard beside the skip."""
    mixer = MambaSequenceMixer(FEATURES, key, state_dim=3, dt_min=0.1, dt_max=1.0, **options)
    return eqx.tree_at(lambda m: m.x_proj.weight, mixer, replace_fn=lambda weight: 4 * weight)


def mamba_size(mixer: MambaSequenceMixer) -> Array:
    """For steps that inputs of any size ask for, and for those between events."""
    low_rank = 3 * jr.normal(jr.key(0), (100, mixer.dt_rank))
    steps = jax.nn.softplus(jax.vmap(mixer.dt_proj)(low_rank))
    if mixer.dt_A_bias is not None:
        steps = jnp.linspace(0, 5, 100)[:, None] * jax.nn.softplus(mixer.dt_A_bias)[None]
    discretize = ops.bilinear if mixer.discretization == "bilinear" else ops.dirac
    return jnp.abs(discretize(-jnp.exp(mixer.A_log), steps[..., None])[0])


def mamba2_size(mixer: Mamba2SequenceMixer) -> Array:
    """For steps that inputs of any size ask for."""
    steps = jax.nn.softplus(jnp.linspace(-10, 10, 100)[:, None] + mixer.dt_bias[None])
    return jnp.exp(-jnp.exp(mixer.A_log)[None] * jnp.clip(steps, *mixer.dt_limit))


def mamba2_with_options(key: PRNGKeyArray) -> Mamba2SequenceMixer:
    """Those of mamba_ssm; sequences start from a state that is not zero."""
    mixer_key, state_key = jr.split(key)
    mixer = Mamba2SequenceMixer(
        FEATURES,
        mixer_key,
        state_dim=3,
        head_dim=2,
        ssm_dim=4,
        num_groups=2,
        norm_groups=1,
        dt_min=0.1,
        dt_max=1.0,
        A_init_range=(0.3, 2.0),
        D_has_hdim=True,
        learnable_init_states=True,
    )
    return eqx.tree_at(lambda m: m.initial_state, mixer, jr.normal(state_key, (2, 2, 3)))


def mamba3(key: PRNGKeyArray, **options: Any) -> Mamba3SequenceMixer:
    """Steps of up to a sample, in which states turn far enough to be seen."""
    return Mamba3SequenceMixer(
        FEATURES, key, state_dim=6, head_dim=4, dt_min=0.1, dt_max=1.0, **options
    )


def mamba3_size(mixer: Mamba3SequenceMixer) -> Array:
    """For steps and rates that inputs of any size ask for; to turn changes no size."""
    wide = jnp.linspace(-10, 10, 100)
    steps = jax.nn.softplus(wide[:, None, None] + mixer.dt_bias[None, None])
    return jnp.exp(-steps * jnp.maximum(RATES[mixer.rate](wide), mixer.A_floor)[None, :, None])


def matrix_memories():
    """Small heads, whose states forget within some samples where they can."""
    common = {"num_heads": 2, "head_dim": 3, "conv_width": 2, "norm_eps": 0.1}
    decaying = {"A_init_range": (0.3, 2.0), "dt_min": 0.1, "dt_max": 1.0, **common}
    grouped = {"num_value_heads": 4, "value_dim": 2, **decaying}
    not_drawn = ("norm_weight",)
    kinds = (
        (DeltaNetSequenceMixer, {**common, "gate": True}),
        (GatedDeltaNetSequenceMixer, {**grouped, "negative_eigenvalues": True}),
        (KimiDeltaAttentionSequenceMixer, {**grouped, "lower_bound": -2.0}),
        (GatedDeltaNet2SequenceMixer, decaying),
        (GatedDeltaProductSequenceMixer, {**decaying, "value_dim": 2}),
        (CombaSequenceMixer, {**grouped, "value_dim": 3}),
        (GLASequenceMixer, {**common, "value_dim": 4, "decay_rank": 2, "temperature": 2.0}),
        (HGRN2SequenceMixer, {"num_heads": 2, "head_dim": 3, "lower_bound": 0.3}),
        (RetentionSequenceMixer, {"num_heads": 2, "head_dim": 4, "value_dim": 3}),
        (
            MLSTMSequenceMixer,
            {
                "num_heads": 2,
                "value_dim": 4,
                "input_bias": 0.5,
                "forget_bias": (-1.0, 2.0),
                "norm_eps": 0.01,
            },
        ),
    )
    for mixer, options in kinds:
        own = {
            KimiDeltaAttentionSequenceMixer: ("A_log",),
            CombaSequenceMixer: ("inner_decay", "correction"),
            MLSTMSequenceMixer: ("input_proj", "forget_proj"),
        }.get(mixer, ())
        make = ft.partial(loud, ft.partial(mixer, FEATURES, **options))
        yield Case(mixer.__name__, make, not_drawn=(*not_drawn, *own))


def loud(make: Callable[..., AbstractSequenceMixer], key: PRNGKeyArray) -> AbstractSequenceMixer:
    """Outputs are normalised, and so never large: here large enough for what moves them to be seen."""
    weight = lambda mixer: mixer.output.out_proj.weight
    return eqx.tree_at(weight, make(key), replace_fn=lambda weight: 8 * weight)


def noisy(make: Callable[..., AbstractSequenceMixer], key: PRNGKeyArray) -> AbstractSequenceMixer:
    """For mixers that start as constants, or at zero: noise is added to every number."""
    make_key, *keys = jr.split(key, 100)
    arrays, rest = eqx.partition(make(make_key), eqx.is_array)
    leaves, tree = jax.tree.flatten(arrays)
    drawn = [leaf + 0.5 * jr.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=False)]
    return eqx.combine(jax.tree.unflatten(tree, drawn), rest)


def rwkv7(key: PRNGKeyArray, in_features: int = FEATURES, **options: Any) -> AbstractSequenceMixer:
    make = ft.partial(
        RWKV7SequenceMixer,
        in_features,
        head_dim=2,
        decay_rank=2,
        strength_rank=2,
        value_rank=2,
        gate_rank=2,
        norm_eps=0.1,
        **options,
    )
    return noisy(make, key)


def rg_lru_size(mixer: RGLRUSequenceMixer) -> Array:
    """For every opening of the gate."""
    openings = jnp.linspace(0, 1, 100)[:, None]
    return jnp.exp(-8 * openings * jax.nn.softplus(mixer.Lambda)[None])


def s7_size(mixer: S7SequenceMixer) -> Array:
    """For whatever the input adds to alpha."""
    return jnp.abs(1 - 1 / ((jnp.linspace(-5, 5, 100)[:, None] + mixer.alpha[None]) ** 2 + 0.5))


def applied(layer: eqx.nn.Linear | None, x: Array) -> Array:
    if layer is None:
        return x
    y = x @ layer.weight.T
    return y if layer.bias is None else y + jax.lax.broadcast_to_rank(layer.bias, y.ndim)


def min_gru(mixer: MinGRUSequenceMixer, x: Array) -> Array:
    """Sample by sample, with the gate of the paper."""
    return minimal(mixer, x, lambda x: jax.nn.sigmoid(applied(mixer.gate_proj, x)))


def min_lstm(mixer: MinLSTMSequenceMixer, x: Array) -> Array:
    def share(x):
        gates = (jax.nn.sigmoid(applied(p, x)) for p in (mixer.forget_proj, mixer.input_proj))
        forget, enter = gates
        return enter / (forget + enter)

    return minimal(mixer, x, share)


def minimal(mixer, x: Array, share: Callable[[Array], Array]) -> Array:
    h, states = 0, []
    for sample in x:
        u, z = applied(mixer.candidate_proj, sample), share(sample)
        h = (1 - z) * h + z * jnp.where(u >= 0, u + 0.5, jax.nn.sigmoid(u))
        states.append(h)
    return applied(mixer.out_proj, jnp.stack(states))


def largest_held(mixer: MinGRUSequenceMixer | MinLSTMSequenceMixer) -> Array:
    """Of the past, for inputs of any size."""
    return jax.nn.sigmoid(-mixer.log_odds(10 * jr.normal(jr.key(0), (100, FEATURES))))


def short_convolution(mixer: ShortConvSequenceMixer, x: Array) -> Array:
    b, c, u = jnp.split(applied(mixer.in_proj, x), 3, axis=-1)
    width = mixer.conv_weight.shape[1]
    taps = [mixer.conv_weight[None, :, width - 1 - k] * delayed(b * u, k) for k in range(width)]
    return applied(mixer.out_proj, c * (sum(taps) + mixer.conv_bias[None]))


def quasiseparable(mixer: HydraSequenceMixer, x: Array) -> Array:
    """One matrix over time for each head, entry by entry."""
    time, inner, heads = len(x), mixer.norm_weight.size, mixer.D.size
    z, u, d = jnp.split(x @ mixer.in_proj.weight.T, (inner, inner + len(mixer.conv_weight)), axis=1)
    half = mixer.conv_weight.shape[1] // 2
    padded = jnp.pad(u, ((half, half), (0, 0)))
    taps = (w[None] * padded[k : k + time] for k, w in enumerate(mixer.conv_weight.T))
    u = jax.nn.silu(sum(taps) + mixer.conv_bias[None])
    v, rest = u[:, :inner].reshape(time, heads, -1), u[:, inner:]
    B_f, C_f, B_b, C_b = (
        jnp.repeat(p.reshape(time, mixer.num_groups, -1), heads // mixer.num_groups, axis=1)
        for p in jnp.split(rest, 4, axis=1)
    )
    dt_f, dt_b = (jax.nn.softplus(p + mixer.dt_bias[None]) for p in jnp.split(d, 2, axis=1))
    a_f, a_b = (-jnp.exp(mixer.A_log)[None] * dt for dt in (dt_f, dt_b))
    rows = []
    for t in range(time):
        y = ((v[t].reshape(-1) @ mixer.D_proj.weight.T) + mixer.D)[:, None] * v[t]
        for s in range(t):  # read out one sample before
            weight = jnp.exp(a_f[s + 1 : t].sum(0)) * dt_f[s] * (C_f[t - 1] * B_f[s]).sum(-1)
            y = y + weight[:, None] * v[s]
        for s in range(t + 1, time):
            weight = jnp.exp(a_b[t + 1 : s].sum(0)) * dt_b[s] * (C_b[t + 1] * B_b[s]).sum(-1)
            y = y + weight[:, None] * v[s]
        rows.append(y.reshape(-1))
    y = jnp.stack(rows)
    y = y / jnp.sqrt((y**2).mean(1, keepdims=True) + mixer.norm_eps) * mixer.norm_weight[None]
    return (y * jax.nn.silu(z)) @ mixer.out_proj.weight.T


def bidirectional(key: PRNGKeyArray) -> Bidirectional:
    forward_key, backward_key = jr.split(key)
    return Bidirectional(Decay(FEATURES, forward_key), Decay(FEATURES, backward_key))


CASES = (
    Case("LRUSequenceMixer", lru, reference=convolve_states, transition_size=diagonal_size),
    Case(
        "Discretized",
        lambda key: Discretized(lru(key)),
        without=["no_array_stands_twice"],  # it keeps the skip of what it wraps
    ),
    Case(
        "S5SequenceMixer",
        lambda key: S5SequenceMixer(FEATURES, key, state_dim=6, dt_min=0.1, dt_max=1.0),
        takes_timesteps=True,
        reference=convolve_states,
        transition_size=diagonal_size,
        not_drawn=("Lambda_re", "Lambda_im"),
    ),
    Case(
        "S5SequenceMixer",
        lambda key: S5SequenceMixer(
            FEATURES, key, state_dim=4, ssm_blocks=2, conj_sym=False, discretization="async"
        ),
        takes_timesteps=True,
        gap_is_zero_input=True,
        reference=convolve_states,
        transition_size=diagonal_size,
        not_drawn=("Lambda_re", "Lambda_im"),
        variant="async",
    ),
    linoss("", r_min=0.3),
    linoss("IM", discretization="IM", damping=False),
    linoss("IMEX", damping=False),
    Case(
        "BidirectionalS5",
        lambda key: BidirectionalS5(FEATURES, key, state_dim=4, discretization="bilinear"),
        streams=False,
        takes_timesteps=True,
        not_drawn=("Lambda_re", "Lambda_im"),
    ),
    Case(
        "MambaSequenceMixer",
        mamba,
        transition_size=mamba_size,
        not_drawn=("A_log", "D"),
    ),
    Case(
        "MambaSequenceMixer",
        lambda key: mamba(key, event=True, discretization="bilinear", use_bias=True),
        takes_timesteps=True,
        transition_size=mamba_size,
        not_drawn=("A_log", "D"),
        variant="event",
    ),
    Case(
        "Mamba2SequenceMixer",
        lambda key: Mamba2SequenceMixer(
            FEATURES,
            key,
            state_dim=3,
            head_dim=2,
            num_groups=2,
            dt_min=0.1,
            dt_max=1.0,
            dt_limit=(0.2, 2.0),
            A_init_range=(0.3, 2.0),
        ),
        transition_size=mamba2_size,
        not_drawn=("D", "norm_weight"),
    ),
    Case(
        "Mamba2SequenceMixer",
        mamba2_with_options,
        transition_size=mamba2_size,
        not_drawn=("D", "norm_weight"),
        variant="options",
    ),
    Case(
        "Mamba3SequenceMixer",
        mamba3,
        transition_size=mamba3_size,
        not_drawn=("D", "B_weight", "C_weight", "B_bias", "C_bias"),
    ),
    Case(
        "Mamba3SequenceMixer",
        lambda key: mamba3(key, num_groups=2, rank=2, rate="heavy_tail", output_norm=True),
        transition_size=mamba3_size,
        not_drawn=(
            *("D", "B_weight", "C_weight", "B_bias", "C_bias"),
            *("norm_weight", "in_weight", "gate_weight", "out_weight"),
        ),
        variant="rank",
    ),
    *matrix_memories(),
    Case("RWKV7SequenceMixer", rwkv7),
    Case(
        "RWKV7SequenceMixer",
        ft.partial(rwkv7, in_features=FEATURES // 2, value_residual="takes", layer=1, num_layers=3),
        variant="takes",
    ),
    Case("RWKV7ChannelMixer", ft.partial(noisy, ft.partial(RWKV7ChannelMixer, FEATURES))),
    Case(
        "RGLRUSequenceMixer",
        lambda key: RGLRUSequenceMixer(FEATURES, key, num_heads=2, a_min=0.3, a_max=0.9),
        transition_size=rg_lru_size,
        not_drawn=("a_bias", "input_bias"),
    ),
    Case(
        "GriffinSequenceMixer",
        lambda key: GriffinSequenceMixer(FEATURES, key, lru_width=6, num_heads=2),
        transition_size=lambda mixer: rg_lru_size(mixer.rg_lru),
        not_drawn=("a_bias", "input_bias", "conv_bias"),
    ),
    Case(
        "MinGRUSequenceMixer",
        lambda key: MinGRUSequenceMixer(FEATURES, key),
        reference=min_gru,
        transition_size=largest_held,
    ),
    Case(
        "MinLSTMSequenceMixer",
        lambda key: MinLSTMSequenceMixer(FEATURES, key, expand=2),
        reference=min_lstm,
        transition_size=largest_held,
    ),
    Case(
        "ShortConvSequenceMixer",
        lambda key: ShortConvSequenceMixer(FEATURES, key, use_bias=True),
        reference=short_convolution,
    ),
    Case(
        "HydraSequenceMixer",
        lambda key: HydraSequenceMixer(
            FEATURES,
            key,
            state_dim=3,
            conv_width=5,
            head_dim=2,
            num_groups=2,
            dt_min=0.1,
            dt_max=1.0,
        ),
        streams=False,
        reference=quasiseparable,
        not_drawn=("A_log", "D", "norm_weight"),
    ),
    Case(
        "IdentitySequenceMixer",
        lambda key: IdentitySequenceMixer(FEATURES, key),
        reference=lambda mixer, x: x,
    ),
    Case(
        "S7SequenceMixer",
        lambda key: S7SequenceMixer(FEATURES, key, state_dim=3, a_max=0.9),
        transition_size=s7_size,
        not_drawn=("alpha",),
    ),
    Case(
        "AttentionSequenceMixer",
        lambda key: AttentionSequenceMixer(FEATURES, key, num_heads=2, num_kv_heads=1),
        longest=1_000,
    ),
    Case(
        "AttentionSequenceMixer",
        lambda key: AttentionSequenceMixer(
            FEATURES,
            key,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            window=3,
            rotary_fraction=0.5,
            rotary_scaling=Yarn(4.0, original_length=20),
            scale=0.3,
            qk_norm=OffsetRMSNorm,
            norm_over="all",
            gate="head",
            use_bias=True,
            out_bias=True,
        ),
        not_drawn=("q_norm", "k_norm"),
        variant="window",
    ),
    Case(
        "SumSequenceMixer",
        lambda key: SumSequenceMixer(
            FEATURES,
            key,
            mixers=(
                ft.partial(LRUSequenceMixer, state_dim=3),
                ft.partial(
                    AttentionSequenceMixer,
                    num_heads=2,
                    window=3,
                    qk_norm=eqx.nn.RMSNorm,
                    gate="element",
                ),
            ),
            in_scales=(1.0, 0.5),
            out_scales=(0.8, 1.2),
        ),
        not_drawn=("q_norm", "k_norm"),
    ),
    Case(
        "S4DSequenceMixer",
        lambda key: S4DSequenceMixer(
            FEATURES, key, state_dim=6, dt_min=0.1, dt_max=1.0, route="chunks"
        ),
        takes_timesteps=True,
        reference=convolve_features,
        transition_size=diagonal_size,
        not_drawn=("A_real", "A_imag", "B"),
    ),
    Case(
        "S4DSequenceMixer",
        lambda key: S4DSequenceMixer(
            FEATURES,
            key,
            state_dim=4,
            init="rand",
            n_ssm=2,
            dt_tie=False,
            discretization="dirac",
            route="fft",
        ),
        takes_timesteps=True,
        gap_is_zero_input=True,
        reference=convolve_features,
        transition_size=diagonal_size,
        rounds_the_past=True,
        not_drawn=("A_real", "B"),
        variant="fft",
    ),
    Case(
        "S4SequenceMixer",
        lambda key: S4SequenceMixer(FEATURES, key, state_dim=6, dt_min=0.1, dt_max=1.0),
        takes_timesteps=True,
        reference=convolve_features,
        transition_size=spectral_norm,
        not_drawn=("A_real", "A_imag", "B", "P"),
    ),
    centaurus("neck", state_dim=5, route="chunks"),
    centaurus("pointwise", state_dim=2),
    centaurus("dws", discretization="dirac"),
    centaurus("full", route="fft"),
    Case(
        "GatedSequenceMixer",
        lambda key: GatedSequenceMixer(FEATURES, key, sequence_mixer=Decay, bottleneck=2, gate=1),
        takes_timesteps=True,
        transition_size=lambda mixer: diagonal_size(mixer.sequence_mixer),
    ),
    Case("Bidirectional", bidirectional, streams=False, takes_timesteps=True),
    Case("SequenceParallel", lambda key: SequenceParallel(lru(key), ONE_DEVICE)),
    Case(
        "Decay",
        lambda key: Decay(FEATURES, key),
        takes_timesteps=True,
        gap_is_zero_input=True,
        reference=convolve_states,
        transition_size=diagonal_size,
    ),
)


# One of each, and with `--thorough` all.
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.is_one_of_each else pytest.mark.thorough)
        for case in CASES
    ],
    ids=str,
)
