from typing import Any, ClassVar, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import broken_since_reset, is_broken, mended, spoilt
from discretax._constructors import keyed
from discretax._features import check_positive, check_samples, check_size, divided, linear
from discretax._timeseries import (
    check_length,
    check_resets,
    check_timesteps,
    mirrored,
    valid_samples,
    zero_padding,
)
from discretax._types import Length, Resets, Timesteps, Values, accumulation_dtype
from discretax.init import short_convolution, step_bias
from discretax.ops import depthwise_convolution, ssd, token_shift
from discretax.ops._rms import rms_normalised
from discretax.sequence_mixers.base import (
    AbstractSequenceMixer,
    refuse_timesteps,
    refuse_to_stream,
)


class HydraSequenceMixer(AbstractSequenceMixer[None]):
    r"""Hydra: Mamba-2 in both directions at once, as one quasiseparable matrix for each head.

    $$[z, u, \overrightarrow{d}, \overleftarrow{d}] = W_{in} x, \qquad
    [v, \overrightarrow{B}, \overrightarrow{C}, \overleftarrow{B}, \overleftarrow{C}] =
    \mathrm{silu}(\mathrm{conv}(u)), \qquad \Delta = \mathrm{softplus}(d + \mathrm{dt\_bias})$$
    $$y = W_{out}\,(w \odot \mathrm{rms}(\mathrm{shift}(\overrightarrow{s}) +
    \mathrm{flip}(\mathrm{shift}(\overleftarrow{s})) + \delta v) \odot \mathrm{silu}(z))$$

    where $\overrightarrow{s}$ is what [`discretax.ops.ssd`][] makes of $v$ with
    $\overrightarrow{\Delta}, \overrightarrow{B}, \overrightarrow{C}$, and $\overleftarrow{s}$ what it
    makes of the flipped $v$ with the flipped others. The shift by one sample keeps a sample from
    reaching itself twice: that it does by $\delta = W_D v + D$, one number per head. $A$, $D$ and
    dt_bias are one number per head, for both directions. The convolution is centred.

    It needs the future: there is nothing to stream, no cache and no step. A sample that is not finite
    reaches all of its sequence.

    !!! example

        ```python
        mixer = HydraSequenceMixer(64, state_dim=16, head_dim=32, key=key)
        y, _ = mixer(x, length=length)  # x, y: (time, 64); there is no cache
        ```

    ??? cite

        Hwang, Lahoti, Puduppully, Dao and Gu, Hydra: Bidirectional State Space Models Through
        Generalized Matrix Mixers, NeurIPS 2024 (arXiv:2407.09941).
    """

    in_proj: eqx.nn.Linear
    conv_weight: Float[Array, "convolved width"]
    conv_bias: Float[Array, " convolved"] | None
    dt_bias: Float[Array, " heads"]
    A_log: Float[Array, " heads"]
    D: Float[Array, " heads"]
    D_proj: eqx.nn.Linear
    norm_weight: Float[Array, " inner"]
    out_proj: eqx.nn.Linear
    in_features: int = eqx.field(static=True)
    state_dim: int = eqx.field(static=True)
    num_groups: int = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 64,
        conv_width: int = 7,
        expand: int = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        norm_eps: float = 1e-5,
        conv_bias: bool = True,
        use_bias: bool = False,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `state_dim`: number of states per inner feature and direction.
        - `conv_width`: how many samples the convolution sees, an odd number.
        - `expand`: the inner width is `expand * in_features`.
        - `head_dim`: features per head; it divides the inner width.
        - `num_groups`: of heads that share $B$ and $C$; it divides the number of heads.
        - `dt_min`, `dt_max`: the biases of the steps start such that without input $\Delta$ is
            log-uniform between these, in sample intervals. $A$ starts at -1.
        - `dt_init_floor`: no step starts below it.
        - `norm_eps`: added to the mean squares of the norm.
        - `conv_bias`: of the convolution.
        - `use_bias`: of $W_{in}$ and $W_{out}$.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, an even `conv_width`, or a range that
        is none.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("state_dim", state_dim)
        conv_width = check_size("conv_width", conv_width)
        num_groups = check_size("num_groups", num_groups)
        check_positive("norm_eps", norm_eps)
        if conv_width % 2 == 0:
            raise ValueError(
                "`conv_width` must be odd, as many samples behind as ahead and one's own; got "
                f"{conv_width}."
            )
        inner = check_size("expand", expand) * in_features
        head_dim = check_size("head_dim", head_dim)
        num_heads = divided("the inner width, expand * in_features", inner, "head_dim", head_dim)
        heads = "the number of heads, expand * in_features / head_dim"
        divided(heads, num_heads, "num_groups", num_groups)
        in_key, conv_key, bias_key, step_key, D_key, out_key = draw.split(key, 6)
        convolved = inner + 4 * num_groups * state_dim

        self.in_proj = draw.linear(
            in_features, inner + convolved + 2 * num_heads, use_bias=use_bias, key=in_key
        )
        self.conv_weight, self.conv_bias = short_convolution(
            conv_key, bias_key, convolved, conv_width, use_bias=conv_bias
        )
        self.dt_bias = step_bias(step_key, (num_heads,), dt_min, dt_max, dt_init_floor)
        self.A_log = jnp.zeros(num_heads)
        self.D = jnp.ones(num_heads)
        self.D_proj = draw.linear(inner, num_heads, use_bias=False, key=D_key)
        self.norm_weight = jnp.ones(inner)
        self.out_proj = draw.linear(inner, in_features, use_bias=use_bias, key=out_key)
        self.in_features = in_features
        self.state_dim = state_dim
        self.num_groups = num_groups
        self.norm_eps = norm_eps

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> NoReturn:
        refuse_to_stream(self)

    def step(self, x: Any, cache: Any, *, integration_timestep: Any | None = None) -> NoReturn:
        refuse_to_stream(self)

    def __call__(
        self,
        x: Values,
        cache: None = None,
        *,
        integration_timesteps: Timesteps | None = None,
        length: Length | None = None,
        resets: Resets | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Values, None]:
        del key
        if cache is not None:
            refuse_to_stream(self)
        check_samples(self, x, self.in_features)
        check_length(length, x.shape[0])
        check_timesteps(integration_timesteps, x.shape[0], length)
        check_resets(resets, x.shape[0])
        refuse_timesteps(self, integration_timesteps, "its steps are the input's choice")
        time, x = x.shape[0], zero_padding(x, length)
        if resets is not None and length is not None:
            resets = resets & valid_samples(time, length)
        mirror, resets_behind, _ = mirrored(time, length, resets)
        onward = {"length": length, "resets": resets}
        backward = {"length": length, "resets": resets_behind}

        broken, before = is_broken(x, 1), jnp.zeros((), bool)
        reached = broken_since_reset(broken, before, resets)
        reached = reached | broken_since_reset(broken[mirror], before, resets_behind)[mirror]
        return spoilt(self._mixed(mended(x), mirror, onward, backward), reached), None

    def _mixed(self, x, mirror, onward, backward):
        inner, convolved = self.norm_weight.shape[0], self.conv_weight.shape[0]
        dtype = accumulation_dtype(x, self.D)
        z, u, d = jnp.split(linear(self.in_proj, x), (inner, inner + convolved), axis=-1)
        u = jax.nn.silu(self._convolved(u, mirror, onward, backward))
        v, BC = u[:, :inner], jnp.split(u[:, inner:], 2, axis=-1)
        d = jnp.split(d.astype(dtype), 2, axis=-1)
        y = self._scanned(v, BC[0], d[0], **onward)
        y = y + self._scanned(v[mirror], BC[1][mirror], d[1][mirror], **backward)[mirror]
        skip = linear(self.D_proj, v).astype(dtype) + self.D.astype(dtype)[None]
        y = y.astype(dtype) + jnp.repeat(skip, inner // self.D.shape[0], axis=1) * v.astype(dtype)
        y = rms_normalised(y, self.norm_eps) * self.norm_weight.astype(dtype)[None]
        return linear(self.out_proj, (y * jax.nn.silu(z.astype(dtype))).astype(x.dtype))

    def _convolved(self, u, mirror, onward, backward):
        """The filters' part that looks back, and the one that looks ahead, from the end."""
        half = self.conv_weight.shape[1] // 2
        behind, _ = depthwise_convolution(
            u, self.conv_weight[:, : half + 1], self.conv_bias, **onward
        )
        ahead = jnp.pad(self.conv_weight[:, :half:-1], ((0, 0), (0, 1)))
        ahead, _ = depthwise_convolution(u[mirror], ahead, **backward)
        return behind + ahead[mirror]

    def _scanned(self, v, BC, d, **options):
        time, heads = d.shape
        B, C = jnp.split(BC.reshape(time, 2 * self.num_groups, self.state_dim), 2, axis=1)
        steps = jax.nn.softplus(d + self.dt_bias.astype(d.dtype)[None])
        A = -jnp.exp(self.A_log.astype(d.dtype))
        y, _ = ssd(v.reshape(time, heads, -1), steps, A, B, C, **options)
        return token_shift(y.reshape(v.shape), **options)[0]
