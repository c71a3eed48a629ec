"""The linear recurrence h_t = a_t h_{t-1} + b_t: its meaning, its derivative rule, its dispatch.

Every mixer of the library ends here, and nowhere else is the recurrence's step or its
associative combination written down.
"""

import functools as ft
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from discretax._broken import mended
from discretax._features import check_name
from discretax.ops._recurrence import kernels
from discretax.ops._recurrence.transitions import NUMBERS, PLANES, Transitions
from discretax.ops._recurrence.xla import accumulated, align, associative, sequential
from discretax.ops._running.derivatives import differentiated, differentiated_as
from discretax.ops._running.dispatch import chosen, kernel_on, operation, over_batch
from discretax.ops._running.manual_axes import vary_alike
from discretax.ops._running.split_time import incoming_state, time_parts

Implementation = Literal["sequential", "associative", "xla", "mosaic_gpu", "mosaic_tpu"] | None


def linear_recurrence(
    a: Inexact[Array, "time *state"] | Inexact[Array, "*state"],
    b: Inexact[Array, "time *state"],
    h0: Inexact[Array, "*state"] | None = None,
    *,
    resets: Bool[Array, " time"] | None = None,
    reverse: bool = False,
    implementation: Implementation = None,
) -> Inexact[Array, "time *state"]:
    r"""All states of the elementwise linear recurrence $h_t = a_t h_{t-1} + b_t$.

    The derivative rule saves the states alone. With $\lambda_t$ the cotangent that reaches
    $h_t$ through all later states, $\lambda_t = g_t + a_{t+1} \lambda_{t+1}$: the backward pass
    is the same recurrence in the other direction. (No conjugate appears for complex `a`: JAX's
    cotangents are transposed, not adjoint.) In forward mode the tangents are those of the same
    recurrence too. The rules can be differentiated again, in either mode.

    **Arguments:**

    - `a`: the transition, real or complex; shaped like `b`, or like one state if it does not
        change with time.
    - `b`: the drive, of shape `(time, *state)`.
    - `h0`: the state before the first sample (with `reverse=True`, after the last one). Zero
        if left out.
    - `resets`: where True at `t`, the state before `t` is taken to be zero. It is selected, not
        multiplied, so that a NaN in the past does not pass.
    - `reverse`: run from the last sample to the first, $h_t = a_t h_{t+1} + b_t$.
    - `implementation`: `"sequential"` walks through time with `lax.scan`: least work, least
        rounding, fastest on CPU. `"associative"` is a parallel scan of logarithmic depth. `"xla"` is
        the first on CPU and the second elsewhere. `"mosaic_gpu"` (NVIDIA GPUs from Hopper on) and
        `"mosaic_tpu"` are kernels that go through the arrays once. `None` chooses when the function
        is lowered: the platform's kernel where it takes the arrays, and XLA elsewhere.

    **Returns:**

    The states $h_t$, of shape `(time, *state)`. Inputs narrower than float32 are accumulated in
    float32 and the states returned in the inputs' type.

    **Raises:**

    `ValueError` if the shapes do not fit, `implementation` is unknown or, asked for by name, cannot
    run on the platform or with these arrays; `TypeError` if the types
    of `a`, `b` and `h0` differ or are not floating.
    """
    check_name("implementation", implementation, Implementation)
    if b.ndim == 0 or a.shape not in (b.shape, b.shape[1:]):
        raise ValueError(
            "`a` must have the shape of `b`, (time, *state), or of one state, (*state,); "
            f"got a: {a.shape} and b: {b.shape}. Broadcast `a` with `jnp.broadcast_to`."
        )
    if h0 is None:
        h0 = jnp.zeros(b.shape[1:], b.dtype)
    if h0.shape != b.shape[1:]:
        raise ValueError(f"`h0` must have the shape of one state, {b.shape[1:]}; got {h0.shape}.")
    if resets is not None and (resets.shape != b.shape[:1] or resets.dtype != bool):
        raise ValueError(
            f"`resets` must be a boolean array of shape (time,) = {b.shape[:1]}; got "
            f"{resets.dtype}{resets.shape}."
        )
    if not (a.dtype == b.dtype == h0.dtype) or not jnp.issubdtype(b.dtype, jnp.inexact):
        raise TypeError(
            "`a`, `b` and `h0` must be of one floating or complex type; got "
            f"{a.dtype}, {b.dtype} and {h0.dtype}. Convert with `.astype`."
        )
    states = ft.partial(
        recurrence, a, resets=resets, reverse=reverse, implementation=implementation
    )
    if time_parts() > 1 and reverse:
        raise ValueError(
            "with time split over devices, `linear_recurrence` runs forward alone; got reverse=True."
        )
    summary = lambda: (
        states(jnp.zeros_like(b), jnp.ones_like(h0))[-1],
        states(b, jnp.zeros_like(h0))[-1],
    )
    return states(b, incoming_state(h0, summary, resets))


def recurrence(
    a: Array,
    b: Array,
    h0: Array,
    resets: Array | None,
    *,
    reverse: bool = False,
    transitions: Transitions = NUMBERS,
    implementation: Implementation = None,
) -> Array:
    """`linear_recurrence` without checks, also for states held as two real planes.

    With `PLANES`, axis -2 of `a`, `b` and `h0` has size two and holds real and imaginary part:
    a float array of shape (time, 2, state), which a reshape turns into the (time, 2*state) that
    one real matrix product yields or consumes. With `MATRICES`, the planes are any two numbers, and
    axis -2 of `a` has size four.
    """
    if b.shape[0] == 0:
        return b
    arrays = vary_alike(a, b, h0, resets)
    return _recurrence((transitions, reverse, chosen(implementation)), *arrays)


def _run(options, a, b, h0, resets):
    transitions, reverse, implementation = options
    if implementation == "sequential" or b.shape[0] == 1:
        return sequential(transitions, reverse, a, b, h0, resets)
    if implementation == "associative":
        return associative(transitions, reverse, a, b, h0, resets)
    return _states(a, b, h0, *_given(resets), **_named(options))[0]


def _named(options):
    return dict(zip(("transitions", "reverse", "implementation"), options, strict=True))


def _given(resets):
    return () if resets is None else (resets,)


def _forward(options, a, b, h0, resets):
    h = _recurrence(options, a, b, h0, resets)
    return h, (a, h0, resets, h)


def _push(options, kept, tangents):
    """Of the same recurrence, driven by what changes in `b` and in the product with `a`."""
    transitions, reverse, _ = options
    a, h0, resets, h = kept
    d_a, d_b, d_h0 = tangents
    drive = jnp.zeros_like(h) if d_b is None else d_b
    if d_a is not None:
        before = [h0[None], h[:-1]] if not reverse else [h[1:], h0[None]]
        before = jnp.concatenate(before)
        if resets is not None:
            before = jnp.where(align(resets, before), 0, before)
        wide = accumulated(h)
        d_a = (d_a if d_a.ndim == h.ndim else d_a[None]).astype(wide)
        change = transitions.apply(d_a, before.astype(wide))
        drive = (drive.astype(wide) + change).astype(h.dtype)
    d_h0 = jnp.zeros_like(h0) if d_h0 is None else d_h0
    return _recurrence(options, a, drive, d_h0, resets)


def _pull(options, kept, g):
    a, h0, resets, h = kept
    if resets is not None:  # behind one, a broken sample before it has a cotangent of zero
        a, h0, h = mended((a, h0, h))
    in_xla = options[2] in ("sequential", "associative") or h.shape[0] == 1
    derivatives = _derivatives_by_recurrence if in_xla else _derivatives
    return *derivatives(options, a, h0, h, g, resets), None


_recurrence = differentiated(_run, _forward, _push, _pull)


def _states_on(platform, a, b, h0, resets=None, *, transitions, reverse, implementation):
    kernel = kernel_on(platform, implementation, ft.partial(kernels.why_no_kernel, transitions, b))
    if kernel is not None:
        return [kernels.states(kernel, transitions is PLANES, reverse, a, b, h0, resets)]
    form = sequential if platform == "cpu" else associative
    run = lambda a, b, h0, resets=None: [form(transitions, reverse, a, b, h0, resets)]
    return over_batch(run, a, b, h0, *_given(resets))


def _axes(a, b):
    """Names of the axes of `a`, of `b` and of the state; a batch can be split, and channels.

    The planes of a matrix are more than those of a state.
    """
    state, transition = (
        planes[: b.ndim - 3] + "n" * (b.ndim > 2) for planes in ("uvwxyz", "ijklmo")
    )
    return "bt"[: 1 + (a.ndim == b.ndim)] + transition, "bt" + state, "b" + state


def _states_axes(a, b, h0, *resets, **options):
    a_axes, b_axes, h_axes = _axes(a, b)
    return [a_axes, b_axes, h_axes, "bt"][: 3 + len(resets)], [b_axes]


_states = operation(
    "linear_recurrence", _states_on, _states_axes, lambda a, b, *rest, **options: [b]
)


def _derivatives_on(platform, a, h0, h, g, resets=None, *, transitions, reverse, implementation):
    why_not = ft.partial(kernels.why_no_kernel, transitions, h)
    if kernel_on(platform, implementation, why_not) == "mosaic_gpu":
        return kernels.derivatives(transitions is PLANES, reverse, a, h0, h, g, resets)
    run = ft.partial(_derivatives_by_recurrence, (transitions, reverse, implementation))
    return over_batch(run, a, h0, h, g, *_given(resets))


def _derivatives_axes(a, h0, h, g, *resets, **options):
    a_axes, h_axes, h0_axes = _axes(a, h)
    inputs = [a_axes, h0_axes, h_axes, h_axes, "bt"]
    return inputs[: 4 + len(resets)], [a_axes, h_axes, h0_axes]


_derivatives_operation = operation(
    "linear_recurrence_derivatives",
    _derivatives_on,
    _derivatives_axes,
    lambda a, h0, h, g, *resets, **options: [a, h, h0],
)


def _derivatives_by_recurrence(options, a, h0, h, g, resets=None):
    """The cotangents of `a`, `b` and `h0`; that of `b` is the recurrence run backward."""
    transitions, reverse, implementation = options
    first = -1 if reverse else 0
    earlier, later = slice(None, -1), slice(1, None)
    if reverse:
        earlier, later = later, earlier

    def next_sample(value):  # value[t + 1], and zero after the last sample
        end = jnp.zeros_like(value[:1])
        return jnp.concatenate([end, value[later]] if reverse else [value[later], end])

    varying = a.ndim == h.ndim
    adjoint = transitions.transpose(a)
    d_b = recurrence(
        next_sample(adjoint) if varying else adjoint,
        g,
        jnp.zeros_like(h0),
        None if resets is None else next_sample(resets),
        reverse=not reverse,
        transitions=transitions,
        implementation=implementation,
    )
    adjoint, lam, h, h0_wide = (value.astype(accumulated(value)) for value in (adjoint, d_b, h, h0))
    d_h0 = transitions.apply(adjoint[first] if varying else adjoint, lam[first])
    d_a_first = transitions.outer(lam[first], h0_wide)
    d_a_later = transitions.outer(lam[later], h[earlier])
    if resets is not None:
        d_h0 = jnp.where(resets[first], 0, d_h0)
        d_a_first = jnp.where(resets[first], 0, d_a_first)
        d_a_later = jnp.where(align(resets[later], d_a_later), 0, d_a_later)
    if varying:
        parts = [d_a_first[None], d_a_later]
        d_a = jnp.concatenate(parts[::-1] if reverse else parts)
    else:
        d_a = d_a_first + d_a_later.sum(0)
    return d_a.astype(a.dtype), d_b, d_h0.astype(h0.dtype)


@ft.partial(differentiated_as, _derivatives_by_recurrence)
def _derivatives(options, a, h0, h, g, resets):
    return tuple(_derivatives_operation(a, h0, h, g, *_given(resets), **_named(options)))
