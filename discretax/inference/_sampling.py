"""From logits to the next token."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from discretax._constructors import check_key
from discretax._timeseries import known

Logits = Float[Array, " vocabulary"]


class Sampling(NamedTuple):
    """Arrays, so that new values need no new compilation. None: left out; `temperature` None: the
    most likely token, without drawing."""

    temperature: Float[Array, ""] | None
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    repetition_penalty: Float[Array, ""] | None


def sample_token(
    logits: Float[Array, " vocabulary"],
    key: PRNGKeyArray | None = None,
    *,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: Int[Array, ""] | int | None = None,
    top_p: Float[Array, ""] | float | None = None,
    min_p: Float[Array, ""] | float | None = None,
    repetition_penalty: Float[Array, ""] | float | None = None,
    seen: Bool[Array, " vocabulary"] | None = None,
) -> Int[Array, ""]:
    r"""One token, drawn from $\mathrm{softmax}(\mathrm{logits} / \mathrm{temperature})$.

    The options act in the order of the table, each on what the one before has left:

    | | |
    |---|---|
    | `repetition_penalty` $r$ | logits of `seen` tokens: $\ell / r$ where positive, $\ell r$ where negative |
    | `temperature` $T$ | $\ell / T$; with 0 the most likely token is taken |
    | `top_k` | the $k$ most likely tokens |
    | `top_p` | the smallest set of most likely tokens whose probability reaches $p$ |
    | `min_p` | the tokens at least $p$ times as likely as the most likely one |

    Of tokens that are equally likely, the lower ones come first. Logits of $\infty$ share all of the
    probability among them; a token whose logit is NaN or $-\infty$ is not drawn while there is any
    other. Computed in float32, in float64 with x64 enabled. For use under `jax.vmap` and `jax.jit`;
    [`discretax.generate`][] calls it.

    ??? cite

        Top-p: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv:1904.09751).
        Min-p: Nguyen et al. (arXiv:2407.01082). Repetition penalty: Keskar et al., CTRL
        (arXiv:1909.05858), with logits below zero multiplied, since to divide those would favour them.

    **Arguments:**

    - `logits`: `(vocabulary,)`.
    - `key`: needed unless `temperature` is 0.
    - `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`: scalars; None leaves one out.
        Within `jax.jit` a traced `temperature` must be positive.
    - `seen`: `(vocabulary,)`, the tokens that the repetition penalty is for.

    **Returns:** the token, a whole number.

    **Raises:**

    `ValueError` for logits of another rank or kind, a value out of its range, a missing key, several
    keys, or one of `repetition_penalty` and `seen` without the other; `TypeError` for a `key` that
    is none.
    """
    if logits.ndim != 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"`logits` must be floating, (vocabulary,); got {logits.dtype}{logits.shape}. Use "
            "`jax.vmap` to batch."
        )
    sampling = checked_sampling(key, temperature, top_k, top_p, min_p, repetition_penalty)
    if (repetition_penalty is None) != (seen is None):
        raise ValueError(
            "`repetition_penalty` is for the tokens of `seen`: give both or neither; got "
            f"repetition_penalty={repetition_penalty} and `seen` "
            f"{'missing' if seen is None else seen.shape}."
        )
    if seen is not None and (seen.shape != logits.shape or seen.dtype != bool):
        raise ValueError(
            f"`seen` must be booleans, one per token, {logits.shape}; got {seen.dtype}{seen.shape}."
        )
    return draw_token(logits, key, sampling, seen)


def checked_sampling(
    key: PRNGKeyArray | None,
    temperature: Any,
    top_k: Any | None,
    top_p: Any | None,
    min_p: Any | None,
    repetition_penalty: Any | None,
) -> Sampling:
    _check("temperature", temperature, lambda t: 0 <= t < math.inf, "at least 0 and finite")
    for name, value, valid, rule in (
        ("top_k", top_k, lambda k: k >= 1, "a whole number of at least 1"),
        ("top_p", top_p, lambda p: 0 < p <= 1, "in (0, 1]"),
        ("min_p", min_p, lambda p: 0 <= p <= 1, "in [0, 1]"),
        ("repetition_penalty", repetition_penalty, lambda r: 0 < r < math.inf, "positive, finite"),
    ):
        if value is not None:
            _check(name, value, valid, rule, whole=name == "top_k")
    if key is not None:
        check_key(key)
    at_zero = known(temperature)
    greedy = at_zero is not None and at_zero == 0
    if key is None and not greedy:
        raise ValueError(
            f"Drawing at random (temperature={temperature}) needs a `key`, such as "
            "`jax.random.key(0)`; `temperature=0` takes the most likely token and needs none."
        )
    return Sampling(
        None if greedy else _scalar(temperature, float),
        _scalar(top_k, int),
        _scalar(top_p, float),
        _scalar(min_p, float),
        _scalar(repetition_penalty, float),
    )


def draw_token(
    logits: Logits,
    key: PRNGKeyArray | None,
    sampling: Sampling,
    seen: Bool[Array, " vocabulary"] | None,
) -> Int[Array, ""]:
    logits = jnp.asarray(logits, float)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    if sampling.repetition_penalty is not None and seen is not None:
        penalty = _divisor(sampling.repetition_penalty)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    temperature, top_k, top_p, min_p, _ = sampling
    if temperature is None or key is None:
        return jnp.argmax(logits).astype(int)
    return jr.categorical(key, filtered(logits, temperature, top_k, top_p, min_p)).astype(int)


def log_probability(logits: Logits, token: Int[Array, ""]) -> Float[Array, ""]:
    """Of the token, as the logits say it, and as `draw_token` understands what is not finite."""
    logits = jnp.asarray(logits, float)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    below = jnp.where(logits == logits.max(), 0, logits - logits.max())
    return below[token] - jnp.log(jnp.exp(below).sum())


def filtered(
    logits: Logits,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""] | None,
    top_p: Float[Array, ""] | None,
    min_p: Float[Array, ""] | None,
) -> Logits:
    """Over the temperature and relative to the largest; -inf for the tokens not to be drawn."""
    # Equals of the largest have no distance to it, also where all are infinite.
    below = jnp.where(logits == logits.max(), 0, logits - logits.max()) / _divisor(temperature)
    kept = jnp.ones(logits.shape, bool)
    if top_k is not None:
        kept = _leading(logits, kept.astype(int), logits.size - top_k)
    if top_p is not None:
        kept &= _leading(logits, jax.nn.softmax(below, where=kept), 1 - top_p)
    if min_p is not None:
        kept &= jnp.exp(below) >= min_p
    return jnp.where(kept, below, -jnp.inf)


def _divisor(value: Float[Array, ""]) -> Float[Array, ""]:
    """`value` as near as may be: neither it nor its reciprocal is zero or infinite."""
    tiny = jnp.finfo(value.dtype).tiny
    return jnp.clip(value, tiny, 1 / tiny)


def _scalar(value: Any | None, kind: type) -> Any:
    """As an array; a number beyond the largest of its type is that one."""
    if value is None:
        return None
    dtype = jnp.result_type(kind)
    largest = (jnp.iinfo if kind is int else jnp.finfo)(dtype).max
    number = known(value)
    return jnp.asarray(value if number is None else min(number.item(), kind(largest)), dtype)


@jax.jit
def _leading(
    logits: Logits, weights: Shaped[Array, " vocabulary"], rest: Shaped[Array, ""]
) -> Bool[Array, " vocabulary"]:
    """The tokens that, with all tokens ranked behind them, weigh more than `rest`; the first in any
    case.

    To sort a vocabulary at every step would take longer than all else. The logit at the edge is
    found by halving, from the highest bit down, and only its equals are put in order. The sums
    begin at the far end: near one, a sum could not tell small probabilities from zero.
    """
    ranks = _ordered_bits(logits)
    bits = jnp.iinfo(ranks.dtype).bits
    most = ranks.max()

    def lower(i, edge):
        lower_edge = edge ^ (jnp.ones_like(edge) << (bits - 1 - i).astype(edge.dtype))
        behind = jnp.where(ranks <= lower_edge, weights, 0).sum()
        return jnp.where(behind > rest, lower_edge, edge)

    edge = lax.fori_loop(0, bits, lower, ~jnp.zeros_like(most))
    edge = jnp.minimum(edge, most)
    equals = jnp.where(ranks == edge, weights, 0)
    behind = jnp.where(ranks < edge, weights, 0).sum() + jnp.cumsum(equals[::-1])[::-1]
    first = jnp.arange(logits.size) == jnp.argmax(logits)
    return (ranks > edge) | ((ranks == edge) & (behind > rest)) | first


def _ordered_bits(x: Float[Array, " n"]) -> Shaped[Array, " n"]:
    """Unsigned whole numbers in the order of the floating ones, equal for equal ones."""
    x = jnp.where(x == 0, 0, x)  # no minus zero
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, unsigned)
    sign = jnp.asarray(1 << (8 * x.dtype.itemsize - 1), unsigned)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _check(name: str, value: Any, valid: Any, rule: str, whole: bool = False) -> None:
    kinds = (jnp.integer,) if whole else (jnp.integer, jnp.floating)
    is_scalar = eqx.is_array_like(value) and jnp.shape(value) == ()
    is_kind = is_scalar and any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds)
    number = known(value)
    if not is_kind or (number is not None and not valid(number)):
        raise ValueError(f"`{name}` must be {rule}; got {value}.")
