"""Derivatives written out, for both modes of differentiation.

`jax.custom_vjp` serves reverse mode alone. Here the tangents of a function are the results of a linear
operation, which forward mode evaluates and reverse mode transposes.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

Tangents = list[Array | None]  # None: zero


def is_floating(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def differentiated(
    function: Callable[..., PyTree[Array]],
    forward: Callable[..., tuple[PyTree[Array], PyTree[Array]]],
    push: Callable[[Any, PyTree[Array], Tangents], PyTree[Array]],
    pull: Callable[[Any, PyTree[Array], PyTree[Array]], PyTree[Array]],
) -> Callable[..., PyTree[Array]]:
    """`function(options, *arguments)`, whose derivatives are written out.

    - `forward(options, *arguments)` gives the outputs, and what is kept for the derivatives. It is
      differentiated itself for derivatives of second order.
    - `push(options, kept, tangents)` gives the tangents of the outputs from those of the arguments,
      one for each floating array.
    - `pull(options, kept, cotangents)` gives the cotangents of the arguments, None for those that
      are not floating.
    """

    @ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def rule(options, floating, others):
        return function(options, *eqx.combine(floating, others))

    def derivative(options, primals, tangents):
        outputs, kept = forward(options, *eqx.combine(*primals))
        tangents = jax.tree.leaves(tangents[0])
        zero = [isinstance(tangent, SymbolicZero) for tangent in tangents]
        kept, kept_as = jax.tree.flatten(kept)
        outputs, outputs_as = jax.tree.flatten(outputs)

        def push_moving(kept, moving):
            moving = iter(moving)
            tangents = [None if none else next(moving) for none in zero]
            return jax.tree.leaves(push(options, kept_as.unflatten(kept), tangents))

        def pull_moving(kept, cotangents):
            cotangents = outputs_as.unflatten(cotangents)
            cotangents = jax.tree.leaves(pull(options, kept_as.unflatten(kept), cotangents))
            return [value for value, none in zip(cotangents, zero, strict=True) if not none]

        moved = _linear.bind(
            *kept,
            *(tangent for tangent, none in zip(tangents, zero, strict=True) if not none),
            push=push_moving,
            pull=pull_moving,
            kept=len(kept),
            results=tuple(jax.typeof(value) for value in outputs),
        )
        return outputs_as.unflatten(outputs), outputs_as.unflatten(moved)

    rule.defjvp(derivative, symbolic_zeros=True)
    return lambda options, *arguments: rule(options, *eqx.partition(arguments, is_floating))


def differentiated_as(
    definition: Callable[..., PyTree[Array]], function: Callable[..., PyTree[Array]]
) -> Callable[..., PyTree[Array]]:
    """`function(options, *arguments)`, whose derivatives are those of `definition`."""

    def push(options, arguments, tangents):
        return push_through(ft.partial(definition, options), arguments, tangents)

    def pull(options, arguments, cotangents):
        floating, others = eqx.partition(arguments, is_floating)
        run = lambda floating: definition(options, *eqx.combine(floating, others))
        return jax.vjp(run, floating)[1](cotangents)[0]

    def forward(options, *arguments):
        return rule(options, *arguments), arguments

    rule = differentiated(function, forward, push, pull)
    return rule


def push_through(
    function: Callable[..., PyTree[Array]], arguments: Sequence[PyTree[Array]], tangents: Tangents
) -> PyTree[Array]:
    """The tangents of `function(*arguments)` from those of its floating arrays."""
    floating, others = eqx.partition(tuple(arguments), is_floating)
    values, structure = jax.tree.flatten(floating)
    zero = [tangent is None for tangent in tangents]

    def run(moving):
        moving = iter(moving)
        both = zip(values, zero, strict=True)
        floating = structure.unflatten([x if none else next(moving) for x, none in both])
        return function(*eqx.combine(floating, others))

    moving = [value for value, none in zip(values, zero, strict=True) if not none]
    return jax.jvp(run, (moving,), ([tangent for tangent in tangents if tangent is not None],))[1]


def turns_kept_whole(number: int) -> Array:
    """As the bound of a `lax.fori_loop` within a function that is `differentiated`.

    From a loop of so many turns as a plain number says, JAX's partial evaluation takes what all turns
    have in common; constants, too, become arrays that each turn reads.
    """
    return jnp.asarray(number)


_linear = Primitive("linear")
_linear.multiple_results = True


@_linear.def_impl
def _evaluate(*arrays, push, pull, kept, results):
    return push(arrays[:kept], arrays[kept:])


mlir.register_lowering(_linear, mlir.lower_fun(_evaluate, multiple_results=True))


@_linear.def_abstract_eval
def _(*arrays, push, pull, kept, results):
    return results


def _differentiate(arrays, tangents, **parameters):
    # Of what is kept as well: this is a derivative of second order.
    moving = [
        None if isinstance(tangent, ad.Zero) else tangent
        for tangent, array in zip(tangents, arrays, strict=True)
        if is_floating(array)
    ]
    moved = push_through(ft.partial(_evaluate, **parameters), arrays, moving)
    return _linear.bind(*arrays, **parameters), moved


def _transpose(cotangents, *arrays, push, pull, kept, results):
    cotangents = pull(arrays[:kept], [ad.instantiate_zeros(value) for value in cotangents])
    moving = [ad.is_undefined_primal(array) for array in arrays[kept:]]
    return [None] * kept + [
        value if one else None for value, one in zip(cotangents, moving, strict=True)
    ]


def _batch(arrays, at, *, push, pull, kept, results):
    axes = tuple(at[:kept]), tuple(at[kept:])
    size = next(x.shape[i] for x, i in zip(arrays, at, strict=True) if i is not None)

    def pull_all(kept, cotangents):
        cotangents = jax.vmap(pull, in_axes=(axes[0], 0))(kept, cotangents)
        return [
            value.sum(0) if i is None else jnp.moveaxis(value, 0, i)
            for value, i in zip(cotangents, axes[1], strict=True)
        ]

    moved = _linear.bind(
        *arrays,
        push=jax.vmap(push, in_axes=axes),
        pull=pull_all,
        kept=kept,
        results=tuple(result.update(shape=(size, *result.shape)) for result in results),
    )
    return moved, [0] * len(moved)


ad.primitive_jvps[_linear] = _differentiate
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
