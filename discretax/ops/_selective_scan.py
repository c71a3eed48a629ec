"""The selective scan of Mamba: a diagonal recurrence whose steps and projections the input chooses."""

import functools as ft
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from discretax._features import check_name, check_size
from discretax._timeseries import check_length, check_resets, valid_samples
from discretax._types import accumulation_dtype
from discretax.ops._checks import check_array
from discretax.ops._chunks import scan_chunks
from discretax.ops._discretization import bilinear, dirac, zoh

SelectiveDiscretization = Literal["mamba", "zoh", "bilinear", "dirac"]


def selective_scan(
    x: Float[Array, "time features"],
    dt: Float[Array, "time features"],
    A: Float[Array, "features state"],
    B: Float[Array, "time state"],
    C: Float[Array, "time state"],
    D: Float[Array, " features"] | None = None,
    h0: Float[Array, "features state"] | None = None,
    *,
    dt_A: Float[Array, "time features"] | None = None,
    discretization: SelectiveDiscretization = "mamba",
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int = 32,
) -> tuple[Float[Array, "time features"], Float[Array, "features state"]]:
    r"""Each feature is the input of a system of its own, sampled with a step that changes with time.

    $$h_t = \bar A_t \odot h_{t-1} + \gamma_t \odot (x_t B_t^T), \qquad y_t = h_t C_t + D \odot x_t$$

    | `discretization` | $\bar A_t$ | $\gamma_t$ |
    |---|---|---|
    | `"mamba"` | $e^{\Delta^A_t A}$ | $\Delta_t$ |
    | `"zoh"` | $e^{\Delta^A_t A}$ | $A^{-1}(e^{\Delta_t A} - 1)$ |
    | `"bilinear"` | $\frac{1 + \Delta^A_t A/2}{1 - \Delta^A_t A/2}$ | $\frac{\Delta_t}{1 - \Delta_t A/2}$ |
    | `"dirac"` | $e^{\Delta^A_t A}$ | 1 |

    The states, (time, features, state) of them, are never held together, neither forward nor
    backward: the forward pass keeps one state per chunk, and the backward pass computes a chunk's
    states again. (Mamba, arXiv:2312.00752, algorithm 2 and section 3.3.)

    **Arguments:**

    - `x`: the input.
    - `dt`: $\Delta$, the steps.
    - `A`: the rates, negative for a state that decays.
    - `B`, `C`: how each sample is written to the states and read from them, alike for all features.
    - `D`: the elementwise skip; none if left out.
    - `h0`: the state before the first sample; zero if left out.
    - `dt_A`: $\Delta^A$, the steps over which the state decays, where they are not `dt`, as between
        events.
    - `discretization`: see the table. `"mamba"` is the first order of `"zoh"` in the input alone.
    - `length`: number of valid samples; those at or past it leave the state as it is.
    - `resets`: where True at `t`, the state before `t` is zero. It is selected, not multiplied, so
        that a NaN in the past does not pass.
    - `chunk_size`: samples between two states that the backward pass keeps.

    **Returns:**

    The output, in the type of `x`, and the state after the last valid sample, in the type in which
    it accumulates: float32, or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit, the discretization is unknown or an input is not real.
    """
    check_name("discretization", discretization, SelectiveDiscretization)
    check_size("chunk_size", chunk_size)
    if x.ndim != 2 or A.ndim != 2:
        raise ValueError(
            "`x` must be (time, features) and `A` (features, state); got "
            f"x: {x.shape} and A: {A.shape}. Use `jax.vmap` to batch."
        )
    (time, features), state_dim = x.shape, A.shape[1]
    for name, array in (("x", x), ("dt", dt), ("dt_A", dt_A)):
        check_array(name, array, time=time, features=features)
    for name, array in (("A", A), ("h0", h0)):
        check_array(name, array, features=features, state=state_dim)
    for name, array in (("B", B), ("C", C)):
        check_array(name, array, time=time, state=state_dim)
    check_array("D", D, features=features)
    check_length(length, time)
    check_resets(resets, time)
    dtype = accumulation_dtype(*jax.tree.leaves((x, dt, dt_A, A, B, C, D, h0)))
    h = jnp.zeros(A.shape, dtype) if h0 is None else h0.astype(dtype)
    if time == 0:
        return x, h

    if length is not None:
        # Padding becomes a step of zero and an input of zero: the identity on the state.
        valid = valid_samples(time, length)
        x, dt, dt_A, B, C = jax.tree.map(
            lambda value: jnp.where(valid[:, None], value, 0), (x, dt, dt_A, B, C)
        )
        resets = None if resets is None else resets & valid
    step = ft.partial(_step, discretization, A.astype(dtype).T)

    def run(h, inputs, _):
        *samples, resets = inputs
        samples = jax.tree.map(lambda value: value.astype(dtype), samples)
        return lax.scan(step, h, (*samples, resets))

    h, y = scan_chunks(run, h.T, (x, dt, dt_A, B, C, resets), None, chunk_size)
    if D is not None:
        y = y + D.astype(dtype) * x.astype(dtype)
    return y.astype(x.dtype), h.T


# Features lie next to each other in memory: twice the speed of states next to each other on CPU.
# Computing a step again in the backward pass costs less than reading back what it held.
@ft.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))
def _step(
    discretization: SelectiveDiscretization,
    A: Float[Array, "state features"],
    h: Float[Array, "state features"],
    inputs: tuple[Array, ...],
) -> tuple[Float[Array, "state features"], Float[Array, " features"]]:
    x, dt, dt_A, B, C, reset = inputs
    over_states = ft.partial(_outer, jnp.ones(A.shape[0], A.dtype))
    decay_step, input_step = over_states(dt if dt_A is None else dt_A), over_states(dt)
    if discretization == "mamba":
        A_bar, drive = dirac(A, decay_step)[0], _outer(B, dt * x)
    elif discretization == "zoh":
        A_bar, drive = dirac(A, decay_step)[0], zoh(A, input_step)[1] * _outer(B, x)
    elif discretization == "bilinear":
        A_bar, drive = bilinear(A, decay_step)[0], bilinear(A, input_step)[1] * _outer(B, x)
    else:
        A_bar, drive = dirac(A, decay_step)[0], _outer(B, x)
    if reset is not None:
        h = jnp.where(reset, 0, h)
    h = A_bar * h + drive
    return h, jnp.dot(C, h, precision="highest")


def _outer(a: Float[Array, " state"], b: Float[Array, " features"]):
    # As a product of matrices, so that its derivatives are such products too. Those of a product
    # with broadcasting would be sums, at which XLA on CPU calls its threads in every step.
    return jnp.tensordot(a, b, axes=0, precision="highest")
