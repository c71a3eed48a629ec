"""Groups of features, each with projections of its own: examples of a batch, with rates of their own."""

import functools as ft
from collections.abc import Callable

import jax
from jaxtyping import Array, Float


def groups_of(B: Array, features: int) -> dict[str, int]:
    """The axis that `B` and `C` have where there are groups."""
    if B.ndim != 3:
        return {}
    groups = B.shape[1]
    if groups == 0 or features % groups:
        raise ValueError(
            "the number of features must be a multiple of the number of groups; got "
            f"{features} features, and B: {B.shape}, {groups} groups."
        )
    return {"groups": groups}


def group_by_group(
    scan: Callable[..., tuple[Array, Array]],
    x: Float[Array, "time features"],
    dt: Float[Array, "time features"],
    A: Float[Array, "features state"],
    B: Float[Array, "time groups state"],
    C: Float[Array, "time groups state"],
    D: Float[Array, " features"] | None,
    h0: Float[Array, "features state"] | None,
    dt_A: Float[Array, "time features"] | None,
) -> tuple[Float[Array, "time features"], Float[Array, "features state"]]:
    """`scan`, of features that share `B` and `C`, over the features of each group."""
    groups = B.shape[1]
    width = x.shape[1] // groups

    def split(array, axis):
        return array.reshape(*array.shape[:axis], groups, width, *array.shape[axis + 1 :])

    samples = *jax.tree.map(ft.partial(split, axis=1), (x, dt, dt_A)), B, C
    of_features = jax.tree.map(ft.partial(split, axis=0), (A, D, h0))

    @ft.partial(jax.vmap, in_axes=(1, 0), out_axes=(1, 0))
    def of_group(samples, of_features):
        (x, dt, dt_A, B, C), (A, D, h0) = samples, of_features
        return scan(x, dt, A, B, C, D, h0, dt_A=dt_A)

    y, h = of_group(samples, of_features)
    return y.reshape(x.shape), h.reshape(A.shape)
