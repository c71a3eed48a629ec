"""The selective scan of Mamba: a diagonal recurrence whose steps and projections the input chooses.

What belongs to its kernels is imported where it is called: their compiler takes long to load.
"""

import functools as ft
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from discretax._features import check_name, check_size
from discretax._timeseries import check_length, check_resets, valid_samples
from discretax._types import accumulation_dtype
from discretax.ops._checks import check_array
from discretax.ops._running.derivatives import (
    differentiated,
    differentiated_as,
    push_through,
)
from discretax.ops._running.dispatch import chosen, kernel_on, operation, over_batch
from discretax.ops._running.split_time import incoming_state
from discretax.ops._selective_scan.groups import group_by_group, groups_of
from discretax.ops._selective_scan.xla import (
    Samples,
    SelectiveDiscretization,
    scan_backward,
    scan_forward,
)

SelectiveImplementation = Literal["xla", "mosaic_gpu"] | None


def selective_scan(
    x: Float[Array, "time features"],
    dt: Float[Array, "time features"],
    A: Float[Array, "features state"],
    B: Float[Array, "time *groups state"],
    C: Float[Array, "time *groups state"],
    D: Float[Array, " features"] | None = None,
    h0: Float[Array, "features state"] | None = None,
    *,
    dt_A: Float[Array, "time features"] | None = None,
    discretization: SelectiveDiscretization = "mamba",
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int | None = None,
    implementation: SelectiveImplementation = None,
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
    - `B`, `C`: how each sample is written to the states and read from them: `(time, state)`, alike for
        all features, or `(time, groups, state)`: feature $i$ takes those of group
        $\lfloor i \cdot \mathrm{groups} / \mathrm{features} \rfloor$.
    - `D`: the elementwise skip; none if left out.
    - `h0`: the state before the first sample; zero if left out.
    - `dt_A`: $\Delta^A$, the steps over which the state decays, where they are not `dt`, as between
        events.
    - `discretization`: see the table. `"mamba"` is the first order of `"zoh"` in the input alone.
    - `length`: number of valid samples; those at or past it leave the state as it is.
    - `resets`: where True at `t`, the state before `t` is zero. It is selected, not multiplied, so
        that a NaN in the past does not pass. For gradients put a finite number in its place before
        the call, `jnp.where(jnp.isfinite(x), x, 0)`: its product with a cotangent of zero is NaN.
    - `chunk_size`: samples between two states that the backward pass keeps. `None`: 32, or on a GPU
        as many as leave room for two programs on a multiprocessor.
    - `implementation`: `"mosaic_gpu"` is a kernel for NVIDIA GPUs from Hopper on, for `"mamba"`
        alone, 4, 8, 16 or 32 states and features that fill a multiple of 16 bytes; `"xla"` runs
        everywhere. `None` chooses when the function is lowered: the kernel where it can run.

    **Returns:**

    The output, in the type of `x`, and the state after the last valid sample, in the type in which
    it accumulates: float32, or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit, the features cannot be shared out among the groups, the
    discretization or the implementation is unknown, an input is not real, or an implementation asked
    for by name cannot run.
    """
    check_name("discretization", discretization, SelectiveDiscretization)
    check_name("implementation", implementation, SelectiveImplementation)
    if chunk_size is None:
        chunk_size = _chunk_size(A.shape[-1])
    chunk_size = check_size("chunk_size", chunk_size)
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
    groups = groups_of(B, features)
    for name, array in (("B", B), ("C", C)):
        check_array(name, array, time=time, **groups, state=state_dim)
    check_array("D", D, features=features)
    check_length(length, time)
    check_resets(resets, time)
    if groups:
        scan = ft.partial(
            selective_scan,
            discretization=discretization,
            length=length,
            resets=resets,
            chunk_size=chunk_size,
            implementation=implementation,
        )
        return group_by_group(scan, x, dt, A, B, C, D, h0, dt_A)
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
    A = A.astype(dtype).T
    samples = Samples(x, dt, dt_A, B, C)
    over_time = ft.partial(_scan, (discretization, chunk_size, chosen(implementation)))

    def summary():
        silence = samples._replace(x=jnp.zeros_like(samples.x))
        return (
            over_time(silence, resets, A, jnp.ones_like(A))[1],
            over_time(samples, resets, A, jnp.zeros_like(A))[1],
        )

    y, h = over_time(samples, resets, A, incoming_state(h.T, summary, resets))
    if D is not None:
        y = (y.astype(dtype) + D.astype(dtype)[None] * x.astype(dtype)).astype(x.dtype)
    return y, h.T


def _chunk_size(state_dim: int) -> int:
    if jax.default_backend() != "gpu":
        return 32
    from discretax.ops._selective_scan.gpu_backward import checkpoint_every

    return checkpoint_every(state_dim)


# The operations take the leaves of a structure, which has no place for arrays that are left out.
def _forward_on(platform, *arrays, structure, discretization, chunk_size, implementation):
    samples, resets, A, h0 = structure.unflatten(arrays)
    why_not = ft.partial(_why_no_kernel, discretization, chunk_size, samples, A)
    if kernel_on(platform, implementation, why_not):
        from discretax.ops._selective_scan.gpu import forward

        return forward(*_in_order(samples, A), h0, resets, checkpoint_every=chunk_size)
    run = lambda *arrays: scan_forward(discretization, chunk_size, *structure.unflatten(arrays))
    return over_batch(run, *arrays)


def _backward_on(platform, *arrays, structure, discretization, chunk_size, implementation):
    samples, resets, A, starts, d_y, d_h = structure.unflatten(arrays)
    why_not = ft.partial(_why_no_kernel, discretization, chunk_size, samples, A)
    if kernel_on(platform, implementation, why_not):
        from discretax.ops._selective_scan.gpu_backward import backward

        d_x, d_dt, d_dt_A, d_A, d_B, d_C, d_h0 = backward(
            *_in_order(samples, A), resets, starts, d_y, d_h, checkpoint_every=chunk_size
        )
        return jax.tree.leaves((Samples(d_x, d_dt, d_dt_A, d_B, d_C), d_A, d_h0))
    run = lambda *arrays: jax.tree.leaves(
        scan_backward(discretization, chunk_size, *structure.unflatten(arrays))
    )
    return over_batch(run, *arrays)


def _why_no_kernel(discretization, chunk_size, samples, A, kernel):
    if kernel != "mosaic_gpu":
        return "it runs on NVIDIA GPUs alone"
    if discretization != "mamba":
        return f"`discretization` must be 'mamba'; got {discretization!r}"
    from discretax.ops._selective_scan.gpu_backward import supports

    return supports(*_in_order(samples, A), checkpoint_every=chunk_size)


def _in_order(samples, A):
    return samples.x, samples.dt, samples.dt_A, A, samples.B, samples.C


def _axes_of(samples):
    """Names of axes: a batch and features can be split over devices."""
    names: Any = "btn", "btn", None if samples.dt_A is None else "btn", "bts", "bts"
    return Samples(*names)


def _forward_axes(*arrays, structure, **options):
    samples, resets, _, _ = structure.unflatten(arrays)
    flags = None if resets is None else "bt"
    return jax.tree.leaves((_axes_of(samples), flags, "bsn", "bsn")), ["btn", "bsn", "bcsn"]


def _forward_results(*arrays, structure, chunk_size, **options):
    samples, _, _, h0 = structure.unflatten(arrays)
    chunks = -(-samples.x.shape[1] // chunk_size)
    return [samples.x, h0, h0.update(shape=(1, chunks, *h0.shape[1:]))]


def _backward_axes(*arrays, structure, **options):
    samples, resets, *_ = structure.unflatten(arrays)
    samples, flags = _axes_of(samples), None if resets is None else "bt"
    inputs = jax.tree.leaves((samples, flags, "bsn", "bcsn", "btn", "bsn"))
    return inputs, jax.tree.leaves((samples, "bsn", "bsn"))


def _backward_results(*arrays, structure, **options):
    samples, _, A, _, _, d_h = structure.unflatten(arrays)
    return jax.tree.leaves((samples, A, d_h))


_forward = operation("selective_scan", _forward_on, _forward_axes, _forward_results)
_backward = operation("selectivescan_backward", _backward_on, _backward_axes, _backward_results)


def _run(call, options, *arguments):
    arrays, structure = jax.tree.flatten(arguments)
    discretization, chunk_size, implementation = options
    return call(
        *arrays,
        structure=structure,
        discretization=discretization,
        chunk_size=chunk_size,
        implementation=implementation,
    )


@ft.partial(differentiated_as, lambda options, *arguments: scan_backward(*options[:2], *arguments))
def _cotangents(options, samples, resets, A, starts, d_y, d_h):
    results = _run(_backward, options, samples, resets, A, starts, d_y, d_h)
    return jax.tree.structure((samples, A, d_h)).unflatten(results)


@ft.partial(differentiated_as, lambda options, *arguments: scan_forward(*options[:2], *arguments))
def _outputs(options, *arguments):
    return tuple(_run(_forward, options, *arguments))


def _scan_forward(options, samples, resets, A, h0):
    y, h, starts = _outputs(options, samples, resets, A, h0)
    return (y, h), (samples, resets, A, starts)


def _push(options, kept, tangents):
    discretization, chunk_size, _ = options
    samples, resets, A, starts = kept
    forward = ft.partial(scan_forward, discretization, chunk_size)
    run = lambda samples, A, h0: forward(samples, resets, A, h0)[:2]
    return push_through(run, (samples, A, starts[0]), tangents)


def _pull(options, kept, cotangents):
    d_samples, d_A, d_h0 = _cotangents(options, *kept, *cotangents)
    return d_samples, None, d_A, d_h0


_scan = differentiated(lambda *args: _scan_forward(*args)[0], _scan_forward, _push, _pull)
