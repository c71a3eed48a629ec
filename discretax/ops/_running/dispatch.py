"""One operation, several forms: which one runs is decided when a function is lowered.

An operation of this kind is traced alike everywhere, and only the form of the platform at hand is
ever built. `jax.vmap`, nested or not, makes one call of it with a batch axis, and the compiler can
split that call over a mesh.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from discretax.ops._running.manual_axes import in_shard_map, split_by_compiler, vary_alike

PLATFORMS = ("cpu", "cuda", "tpu", None)  # None: all others
KERNELS = {"cuda": "mosaic_gpu", "tpu": "mosaic_tpu"}
DEVICES = {"mosaic_gpu": "NVIDIA GPUs from Hopper (sm_90) on", "mosaic_tpu": "TPUs"}
_kernels_wanted = jax.make_user_context(True)  # part of what `jax.jit` keeps its programs by


def without_kernels() -> contextlib.AbstractContextManager[None]:
    """What is traced within takes XLA's form in place of kernels, in models too.

    For a comparison, or where a kernel misbehaves. A jitted function is traced again inside, and
    again outside. `implementation="mosaic_gpu"`, by name, still insists on the kernel.

    !!! example

        ```python
        with discretax.ops.without_kernels():
            y, state = jax.jit(model)(x, state)
        ```
    """
    return _kernels_wanted(False)


def chosen(implementation: str | None) -> str | None:
    """The implementation asked for; XLA's where none is and no kernel may be taken."""
    if implementation is None and (split_by_compiler() or not _kernels_wanted.value):
        return "xla"
    return implementation


def kernel_on(
    platform: str | None, implementation: str | None, why_not: Callable[[str], str | None]
) -> str | None:
    """The kernel by which `platform` computes, None for XLA.

    `why_not(kernel)` says what keeps the arguments from it, if anything does. One that is asked for
    by name and cannot run raises a `ValueError`.
    """
    own = KERNELS.get(platform or "")
    if implementation in DEVICES and implementation != own:
        reason = f"it runs on {DEVICES[implementation]}; got the platform {platform!r}"
    elif own is None or implementation not in (None, own):
        return None
    else:
        reason = _too_old(own) or why_not(own)
    if reason is None:
        return own
    if implementation is None:
        return None
    raise ValueError(
        f"`implementation={implementation!r}` cannot take these arguments: {reason}. With "
        "`implementation=None` the kernel is taken where it can run, and XLA elsewhere."
    )


def _too_old(kernel: str) -> str | None:
    # Where there is no GPU, what is lowered for one is for another machine.
    if kernel != "mosaic_gpu" or jax.default_backend() != "gpu":
        return None
    capability = jax.devices()[0].compute_capability
    return f"it runs on {DEVICES[kernel]}; got {capability}" if float(capability) < 9 else None


_FORMS: dict[Primitive, Callable[..., Sequence[Array]]] = {}


def plain_form(primitive: Primitive) -> Callable[..., Sequence[Array]] | None:
    """How an operation of this kind is computed without a kernel; None for another primitive."""
    form = _FORMS.get(primitive)
    return None if form is None else functools.partial(form, "cpu")


def operation(
    name: str,
    form: Callable[..., Sequence[Array]],
    axes: Callable[..., tuple[Sequence[str], Sequence[str]]],
    results: Callable[..., Sequence[Any]],
) -> Callable[..., Sequence[Array]]:
    """An operation on arrays of one example, with options by keyword.

    `form(platform, *arrays, **options)` computes it for arrays with a batch axis in front, which is
    of size 1 where all examples share a value. `axes(*arrays, **options)` names the axes of these
    arrays and of the results, a letter for each, and `results` says which arrays they are like.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    _FORMS[primitive] = form

    @primitive.def_abstract_eval
    def _(*avals, **options):
        batch = _shared(aval.shape[0] for aval in avals)
        like = results(*avals, **options)
        return [aval.update(shape=(batch, *aval.shape[1:])) for aval in like]

    def form_on(platform, *arrays, **options):
        # A kernel is launched with numbers. Where `jax.export` leaves a size open, there are none.
        is_open = not all(isinstance(size, int) for x in arrays for size in x.shape)
        return form(None if is_open and platform in KERNELS else platform, *arrays, **options)

    for platform in PLATFORMS:
        lowered = mlir.lower_fun(functools.partial(form_on, platform), multiple_results=True)
        mlir.register_lowering(primitive, lowered, platform=platform)

    @primitive.def_impl
    def _(*arrays, **options):
        """Outside of `jax.jit`, step by step: what JAX's debugging switches ask for."""
        forms = {
            platform or "default": functools.partial(form, platform, **options)
            for platform in PLATFORMS
        }
        return lax.platform_dependent(*arrays, **forms)

    # Compiled even where the caller is not.
    @functools.cache
    def batched(inputs, outputs, options, in_shard_map):
        bind = functools.partial(primitive.bind, **dict(options))

        @custom_vmap
        def batch(*arrays):
            # There, all is split already, or not to be split by rules of ours.
            return bind(*arrays) if in_shard_map else _over_mesh(bind, inputs, outputs, *arrays)

        @batch.def_vmap
        def _(size, is_batched, *arrays):
            inner = _shared(x.shape[int(b)] for x, b in zip(arrays, is_batched, strict=True))

            def merge(x, is_batched):
                if not is_batched and x.shape[0] == 1:
                    return x
                x = x if is_batched else x[None]
                return jnp.broadcast_to(x, (size, inner, *x.shape[2:])).reshape(-1, *x.shape[2:])

            merged = batch(*map(merge, arrays, is_batched))
            return [x.reshape(size, inner, *x.shape[1:]) for x in merged], [True] * len(merged)

        def run(*arrays):
            # Through the rules for a batch and a mesh, JAX would lose where a NaN arose.
            rules = any(isinstance(x, Tracer) for x in arrays)
            return batch(*arrays) if rules else bind(*arrays)

        return jax.jit(run)

    def call(*arrays, **options):
        arrays = [x[None] for x in vary_alike(*arrays)]
        inputs, outputs = axes(*arrays, **options)
        run = batched(tuple(inputs), tuple(outputs), tuple(options.items()), in_shard_map())
        return [x[0] for x in run(*arrays)]

    return call


def _shared(sizes: Iterable[int]) -> int:
    """The size that all have but for those of 1. It may be symbolic, of which none is the larger."""
    return next((size for size in sizes if size != 1), 1)


def over_batch(function: Callable[..., Sequence[Array]], *arrays: Array) -> Sequence[Array]:
    """`function` of one example on every example, where a batch axis of size 1 is shared by all."""
    if all(x.shape[0] == 1 for x in arrays):
        return [value[None] for value in function(*(x[0] for x in arrays))]
    shared = [x.shape[0] == 1 for x in arrays]
    axes = tuple(None if one else 0 for one in shared)
    values = (x[0] if one else x for x, one in zip(arrays, shared, strict=True))
    return jax.vmap(function, in_axes=axes)(*values)


def _over_mesh(
    kernel: Callable[..., Sequence[Array]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *arrays: Array,
) -> Sequence[Array]:
    """`kernel(*arrays)`, which the compiler may split along the axes "b" and "n".

    `inputs` and `outputs` name the axes of each array, a letter for an axis. The compiler cannot look
    into a kernel; without these names it would gather all of its arguments on every device. A result
    without "n" is a sum over it.
    """

    def partition(mesh, operands, results):
        split: dict[str, Any] = {}
        for value, axes in zip(operands, inputs, strict=True):
            for axis, size, over in zip(axes, value.shape, value.sharding.spec, strict=False):
                if axis == "b" and size > 1 and over is not None:
                    split.setdefault(axis, over)
                if (
                    axis == "n"
                    and over is not None
                    and size % (CHANNELS * _devices(mesh, over)) == 0
                ):
                    split.setdefault(axis, over)

        def sharding(value, axes):
            sizes = zip(axes, value.shape, strict=True)
            spec = [split.get(axis) if size > 1 else None for axis, size in sizes]
            return NamedSharding(mesh, PartitionSpec(*spec))

        def of_part(*arrays):
            summed = split.get("n")
            return [
                lax.psum(value, summed) if summed and "n" not in axes else value
                for value, axes in zip(kernel(*arrays), outputs, strict=True)
            ]

        of_results, of_operands = map(sharding, results, outputs), map(sharding, operands, inputs)
        return mesh, of_part, list(of_results), tuple(of_operands)

    alone = itertools.count()

    def name_all(letters, values):
        name = lambda axis, size: axis if size != 1 else f"one{next(alone)}"
        return [[*map(name, axes, x.shape)] for axes, x in zip(letters, values, strict=True)]

    named = [name_all(inputs, arrays), name_all(outputs, jax.eval_shape(kernel, *arrays))]
    rule = " -> ".join(", ".join(" ".join(axes) for axes in side) for side in named)
    axes = dict.fromkeys(axis for side in named for names in side for axis in names)
    whole = tuple(axis for axis in axes if len(axis) == 1 and axis not in "bn")
    split_kernel = custom_partitioning(lambda *arrays: kernel(*arrays))
    split_kernel.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    return split_kernel(*arrays)


CHANNELS = 8  # of which a device takes a multiple: 16 bytes of bfloat16, the stride of a copy


def _devices(mesh, axes) -> int:
    return math.prod(mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
