import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import is_broken, mended, spoilt
from discretax._constructors import keyed
from discretax._counts import counts_before
from discretax._features import (
    check_name,
    check_positive,
    check_size,
    described,
    divided,
    is_layer,
    linear,
    size_of_head,
)
from discretax._timeseries import known
from discretax._types import Length, Resets, Sample, Timesteps, Values, widened
from discretax.ops._attention import masked_attention, queries_at_a_time
from discretax.ops._rotary import frequencies, rotated
from discretax.ops._running.chunks import scan_chunks
from discretax.sequence_mixers._attention_cache import AttentionCache, moved, moved_by_one, past
from discretax.sequence_mixers.base import (
    AbstractSequenceMixer,
    check_call,
    check_step,
    in_types_of,
    refuse_timesteps,
    zero_cache,
)
from discretax.sequence_mixers.rotary_scaling import RotaryScaling, check_scaling

Gate = Literal["element", "head"]
NormOver = Literal["head", "all"]


class AttentionSequenceMixer(AbstractSequenceMixer[AttentionCache]):
    r"""Causal attention with rotary positions, for hybrids with recurrences.

    $$y_t = W_o \bigoplus_n \sum_{s \in S_t} \mathrm{softmax}_s
    \Big(\frac{(R_t q^n_t)^T R_s k^{\nu}_s}{\sqrt{d}}\Big) v^{\nu}_s, \qquad
    q = W_q x, \quad k = W_k x, \quad v = W_v x$$

    over heads $n$ of size $d$, `num_heads / num_kv_heads` of which share the keys and values
    $\nu$ (one for all is multi-query attention, several are grouped). $R_t$ turns pairs of features,
    $i$ and $i + r/2$ of the first $r$ = `rotary_fraction * head_dim`, by the angle
    $t\, \theta^{-2i/r}$, so that a score depends on the distance alone. $S_t$ are the samples up to
    $t$ of the same sequence; with a `window` the last `window` of them, $t$ included.

    The cache holds keys and values. With a `window` it is a ring of that many slots, and sequences
    may be of any length: angles are counted in whole numbers, so that late scores are as exact as
    early ones. Without, it has `max_seqlen` slots: a longer stream raises an error where
    its position is known, and inside `jax.jit` makes the outputs past the end NaN. A reset empties
    the cache, and positions begin at zero again.

    With a `window` a sequence is walked through in chunks of that length, so that memory grows
    linearly with time. `window=w + 1` is what the authors of Griffin call a window of `w`.

    With a `qk_norm`, queries and keys are normalised before they are turned. With a `gate`, what the
    heads read is multiplied by $\sigma(W_\gamma x)$ before $W_o$, element by element or each head by
    one number.

    !!! example

        ```python
        mixer = AttentionSequenceMixer(64, num_heads=4, num_kv_heads=1, window=256, key=key)
        cache = mixer.allocate_inference_cache(max_seqlen=1000)  # at most the window
        y, cache = mixer(x, cache)  # x, y: (time, 64)
        ```

    ??? cite

        Vaswani et al., Attention Is All You Need, NeurIPS 2017 (arXiv:1706.03762). Rotary positions:
        Su et al., RoFormer (arXiv:2104.09864). Shared keys and values: Ainslie et al., GQA
        (arXiv:2305.13245). As a mixer beside recurrences: De et al., Griffin (arXiv:2402.19427).
    """

    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    out_proj: eqx.nn.Linear
    q_norm: Callable[[Array], Array] | None
    k_norm: Callable[[Array], Array] | None
    gate_proj: eqx.nn.Linear | None
    in_features: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    rotary_dim: int = eqx.field(static=True)
    rotary_base: float = eqx.field(static=True)
    rotary_scaling: RotaryScaling | None = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    norm_over: NormOver = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rotary_fraction: float = 1.0,
        rotary_base: float = 10_000.0,
        rotary_scaling: RotaryScaling | None = None,
        scale: float | None = None,
        qk_norm: Callable[[int], Callable[[Array], Array]] | None = None,
        norm_over: NormOver = "head",
        gate: Gate | None = None,
        use_bias: bool = False,
        out_bias: bool = False,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: heads of queries.
        - `num_kv_heads`: heads of keys and values; `num_heads` if left out.
        - `head_dim`: size of a head; `in_features // num_heads` if left out.
        - `window`: how many samples a query sees, its own included; None for all before it.
        - `rotary_fraction`: the part of each head that is turned: 1 for all of it, 0 for none.
        - `rotary_base`: $\theta$ above; the longest wavelength is $2\pi\theta$ samples.
        - `rotary_scaling`: how the frequencies change for texts longer than those of training:
            one of [`discretax.sequence_mixers.rotary_scaling`][].
        - `scale`: what scores are multiplied by; $1/\sqrt{d}$ if left out.
        - `qk_norm`: a function of a width that makes the norm of queries and that of keys, such as
            `equinox.nn.RMSNorm`.
        - `norm_over`: each `"head"` by itself, as in Qwen3, or `"all"` heads at once, as in OLMo 2.
        - `gate`: `"element"`, as in Qwen3.5, or `"head"`.
        - `use_bias`: of queries, keys and values.
        - `out_bias`: of $W_o$.

        **Raises:**

        `ValueError` if `num_heads` does not divide `in_features` and there is no `head_dim`, if
        `num_kv_heads` does not divide `num_heads`, or if the part to turn is not of even size.
        """
        in_features = check_size("in_features", in_features)
        num_heads = check_size("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        num_kv_heads = check_size("num_kv_heads", num_kv_heads)
        divided("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        head_dim = size_of_head("head_dim", head_dim, in_features, num_heads)
        if window is not None:
            window = check_size("window", window)
        is_part = 0 <= rotary_fraction <= 1
        rotary_dim = round(rotary_fraction * head_dim) if is_part else 0
        if not is_part or rotary_dim % 2:
            raise ValueError(
                "`rotary_fraction` must lie in [0, 1] and leave an even number of features to turn; "
                f"got {rotary_fraction} of head_dim={head_dim}."
            )
        check_positive("rotary_base", rotary_base)
        if rotary_scaling is not None and not isinstance(rotary_scaling, RotaryScaling):
            raise TypeError(
                "`rotary_scaling` must be None or one of `discretax.sequence_mixers.rotary_scaling`, "
                f"such as `Linear(factor=4.0)`; got {described(rotary_scaling)}."
            )
        if rotary_scaling is not None:
            check_scaling(rotary_scaling, rotary_base)
        if qk_norm is not None and (not callable(qk_norm) or is_layer(qk_norm)):
            raise TypeError(
                "`qk_norm` must be None or a function of a width that makes a norm, such as "
                f"`equinox.nn.RMSNorm`; got {described(qk_norm)}."
            )
        if scale is not None:
            check_positive("scale", scale)
        check_name("norm_over", norm_over, NormOver)
        check_name("gate", gate, Gate | None)
        q_key, k_key, v_key, out_key = draw.split(key, 4)
        inner, kv_inner = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = draw.linear(in_features, inner, use_bias, key=q_key)
        self.k_proj = draw.linear(in_features, kv_inner, use_bias, key=k_key)
        self.v_proj = draw.linear(in_features, kv_inner, use_bias, key=v_key)
        self.out_proj = draw.linear(inner, in_features, out_bias, key=out_key)
        widths = (head_dim, head_dim) if norm_over == "head" else (inner, kv_inner)
        self.q_norm, self.k_norm = (
            (None, None) if qk_norm is None else (qk_norm(width) for width in widths)
        )
        self.gate_proj = None
        if gate is not None:
            gates = inner if gate == "element" else num_heads
            gate_key = jr.fold_in(key, 4)
            self.gate_proj = draw.linear(in_features, gates, use_bias=False, key=gate_key)
        self.in_features = in_features
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.window = window
        self.rotary_dim = rotary_dim
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling
        self.scale = head_dim**-0.5 if scale is None else scale
        self.norm_over = norm_over

    @property
    def head_dim(self) -> int:
        return self.q_proj.weight.shape[0] // self.num_heads

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> AttentionCache:
        slots = max_seqlen if self.window is None else self.window
        shape = (slots, self.num_kv_heads, self.head_dim)
        return AttentionCache(
            keys=zero_cache(batch_size, shape, dtype),
            values=zero_cache(batch_size, shape, dtype),
            broken=zero_cache(batch_size, shape[:1], bool),
            position=zero_cache(batch_size, (), int),
            clock=zero_cache(batch_size, (), int),
        )

    def __call__(
        self,
        x: Values,
        cache: AttentionCache | None = None,
        *,
        integration_timesteps: Timesteps | None = None,
        length: Length | None = None,
        resets: Resets | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Values, AttentionCache]:
        del key
        time = x.shape[0]
        chunk_size = time if self.window is None else max(self.window, 64)
        fresh = cache is None and time <= chunk_size
        state = self.allocate_inference_cache(max_seqlen=max(1, time)) if cache is None else cache
        x, state, _ = check_call(
            self, x, state, self._like(state), integration_timesteps, length, resets
        )
        refuse_timesteps(self, integration_timesteps, "its positions are counted in samples")
        self._check_room(time if length is None else length, state, resets)
        state, y = _over_time(chunk_size, fresh, self, state, x, resets, length)
        return y, state

    def step(
        self, x: Sample, cache: AttentionCache, *, integration_timestep: Any | None = None
    ) -> tuple[Sample, AttentionCache]:
        check_step(self, x, cache, self._like(cache))
        refuse_timesteps(self, integration_timestep, "its positions are counted in samples")
        self._check_room(1, cache, None)
        y, cache = self._attend(x[None], None, cache, 1, False)
        return y[0], cache

    def _attend(self, x, resets, cache, left, fresh):
        """A chunk of which `left` samples are valid; `fresh` if nothing is cached."""
        time, slots = x.shape[0], cache.keys.shape[0]
        if time == 0:
            return x, cache
        given = x, cache
        counts = (jnp.asarray(count, int) for count in (cache.position, cache.clock))
        cache = AttentionCache(*cache[:3], *counts)
        broken = is_broken(x, 1)
        x = mended(x)
        # Each sample's sequence and its position therein; what is cached belongs to sequence zero.
        sequence = jnp.zeros(time, int) if resets is None else jnp.cumsum(resets)
        positions = counts_before(cache.position, time, resets)
        clocks = counts_before(cache.clock, time, resets)
        turned = ft.partial(self._turned, counts=clocks, turns=self._turns())
        q = turned(linear(self.q_proj, x), self.q_norm, self.num_heads)
        k = turned(linear(self.k_proj, x), self.k_norm, self.num_kv_heads)
        v = linear(self.v_proj, x).reshape(time, self.num_kv_heads, -1)
        if resets is not None:  # what overflows is kept behind a reset, too
            broken |= is_broken((k, v), 1)
            k, v = mended((k, v))
        if time == 1 and resets is None:
            after = moved_by_one(cache, (k, v, broken), left)
        else:
            emptied = resets is not None
            after = moved(cache, (k, v, broken), positions, clocks, left, emptied=emptied)

        if resets is None and (self.window is None or time == 1):
            # All that a query may see is still there once the chunk has been cached.
            samples = past(after)
        elif fresh:
            samples = k, v, broken, positions, sequence
        else:
            samples = (
                jnp.concatenate([old.astype(new.dtype), new])
                for old, new in zip(past(cache), (k, v, broken, positions, sequence), strict=True)
            )
        keys, values, of_broken, key_positions, key_sequence = samples

        def attend(state, queries, left):
            """In training the scores are computed again, so that memory grows with time alone."""
            del left
            q, positions, sequence = queries
            distance = positions[:, None] - key_positions[None]
            seen = (
                (key_sequence[None] == sequence[:, None])
                & (distance >= 0)
                & (key_positions[None] >= 0)
            )
            if self.window is not None:
                seen &= distance < self.window
            y = masked_attention(q, keys, values, seen, self.scale)
            return state, (y, (seen & of_broken[None]).any(1))

        keys, values = keys.astype(q.dtype), values.astype(q.dtype)
        block = queries_at_a_time(self.num_heads, len(keys))
        _, (y, unknown) = scan_chunks(attend, (), (q, positions, sequence), None, block)
        if self.window is None:
            unknown |= positions >= slots
        # Counted on, the position would reach the end of its integers.
        position = jnp.minimum(after.position, slots + after.position % slots)
        after = after._replace(position=position)
        if self.gate_proj is not None:
            gates = jax.nn.sigmoid(linear(self.gate_proj, x))
            y = y * gates.reshape(time, self.num_heads, -1)
        y = spoilt(linear(self.out_proj, y.reshape(time, -1)), unknown)
        return in_types_of(given, (y, after))

    def _turns(self) -> tuple[float, ...]:
        """The frequency of each pair that turns."""
        turns = frequencies(self.rotary_dim, self.rotary_base)
        if self.rotary_scaling is None:
            return turns
        return tuple(self.rotary_scaling(np.asarray(turns), self.rotary_base).tolist())

    def _turned(self, x, norm, num_heads, counts, turns):
        """The heads of queries or keys, normalised and turned."""
        if norm is not None and self.norm_over == "all":
            x = jax.vmap(norm)(x)
        x = x.reshape(len(x), num_heads, -1)
        if norm is not None and self.norm_over == "head":
            x = jax.vmap(jax.vmap(norm))(x)
        scaling = self.rotary_scaling
        return rotated(x, counts, turns, 1.0 if scaling is None else float(scaling.magnitude))

    def _like(self, cache: Any) -> AttentionCache:
        """A cache that fits this mixer, with as many slots as `cache`."""
        keys = jax.tree.leaves(cache)[0] if jax.tree.leaves(cache) else jnp.zeros(())
        return self.allocate_inference_cache(max_seqlen=keys.shape[0] if keys.ndim == 3 else 1)

    def _check_room(self, samples: Length, cache: AttentionCache, resets: Resets | None) -> None:
        if self.window is not None or resets is not None:
            return
        slots, position, samples_known = cache.keys.shape[0], known(cache.position), known(samples)
        needed = sum(int(count) for count in (position, samples_known) if count is not None)
        if needed > slots:
            raise ValueError(
                "`AttentionSequenceMixer` without a window keeps every sample: its cache holds "
                f"{slots}, and this call makes them at least {needed}. Allocate it with "
                "`max_seqlen` of at least the length of the whole stream, or build the mixer with a "
                "`window`."
            )


@ft.partial(jax.jit, static_argnums=(0, 1))
def _over_time(chunk_size, fresh, mixer, state, x, resets, length):
    mixer = widened(mixer, x)  # the type in which the gradients of all chunks are added up

    def run(state, inputs, left):
        x, resets = inputs
        y, state = mixer._attend(x, resets, state, left, fresh)
        return state, y

    return scan_chunks(run, state, (x, resets), length, chunk_size)
