"""How a law finds that two outcomes part, and says where."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

OVER_TIME = {"output", "outcome.output", "samples", "gradients.samples", "cotangent.output"}


class LawError(AssertionError):
    """Raised by laws alone, with what was found: an assertion of the mixer's own is another."""


def require(holds: Any, found: str) -> None:
    if not holds:
        raise LawError(found)


def same(actual: PyTree, expected: PyTree, rtol: float = 1e-5, *, of: str, to: str) -> None:
    """Each leaf differs from its like by at most `rtol` of the largest finite entry of that.

    `of` and `to` are what `actual` and `expected` are, for the report.
    """
    (paths, leaves), (expected_paths, expected_leaves) = map(_by_path, (actual, expected))
    require(
        len(leaves) == len(expected_leaves),
        f"{of}: {_listed(paths)}\n{to}: {_listed(expected_paths)}",
    )
    parting = [
        part
        for path, a, e in zip(paths, leaves, expected_leaves, strict=True)
        if (part := _parting(path, a, e, rtol)) is not None
    ]
    require(not parting, "\n".join([f"{of}, against {to}:", *parting]))


def refuses(attempt: Callable[[], Any], wrong: str, *says: str) -> None:
    """`attempt` ends in a `ValueError` that says what was `wrong`, by these words of it."""
    wanted = "a ValueError" + (f" that says {' and '.join(map(repr, says))}" if says else "")
    try:
        attempt()
    except ValueError as error:
        missing = [word for word in says if word not in str(error)]
        require(not missing, f"{wrong}: {wanted} is due; got: {first_line(error)}")
    except Exception as error:
        message = f"{wrong}: {wanted} is due; got {type(error).__name__}: {first_line(error)}"
        raise LawError(message) from error
    else:
        raise LawError(f"{wrong}: {wanted} is due; it was accepted.")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def at(tree: PyTree, index: Any = ...) -> PyTree:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def kind(array: Any) -> str:
    return f"{array.dtype}{array.shape}"


def path_of(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _by_path(tree: PyTree) -> tuple[list[str], list[Any]]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return [path_of(keys) or "value" for keys, _ in leaves], [leaf for _, leaf in leaves]


def _listed(paths: list[str]) -> str:
    return f"{len(paths)} arrays ({', '.join(paths)})"


def _parting(path: str, actual: Any, expected: Any, rtol: float) -> str | None:
    a, e = (np.asarray(leaf, np.float64) for leaf in (actual, expected))
    if a.shape != e.shape:
        return f"  {path}: of shape {a.shape}, not {e.shape}"
    with np.errstate(invalid="ignore"):
        difference = np.where(a == e, 0.0, np.abs(a - e))  # two infinities alike are alike
    scale = max(np.abs(e[np.isfinite(e)]).max(initial=0), 1e-30)
    apart = ~(difference <= rtol * scale)  # a NaN is apart from everything
    if not apart.any():
        return None
    worst = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), a.shape)
    where, first = f" at {list(map(int, worst))}" if worst else "", ""
    if path in OVER_TIME:
        where = f" at time {worst[0]}, feature {worst[1]}"
        first = f"; first at time {np.flatnonzero(apart.any(axis=1))[0]}"
    return (
        f"  {path}{where}: {a[worst]:.6g}, not {e[worst]:.6g}\n"
        f"    difference {difference[worst]:.3g}, allowed {rtol * scale:.3g} "
        f"({rtol:g} of the largest, {scale:.3g}){first}"
    )
