"""Training as the papers train: the recurrence at a lower rate and without weight decay."""

from typing import Any, Literal

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from discretax._features import check_size

Label = Literal["recurrent", "regular", "state"]


def recurrent_labels(params: PyTree) -> PyTree[Label]:
    """Labels each parameter for `optax.multi_transform`.

    - `"recurrent"`: acts inside a recurrence, as the `recurrent_parameters` of its mixer or model name it (for
        the LRU: nu, theta, gamma and B).
    - `"regular"`: every other parameter.
    - `"state"`: no parameter but the initial value of a state, which a model holds until
        `eqx.nn.make_with_state` or `eqx.nn.delete_init_state` takes it out.

    Pass the function itself, `optax.multi_transform(transforms, recurrent_labels)`: the tree of
    labels has the model's type and its `__call__`, and optax would call it.

    **Arguments:** `params`: the model, or `eqx.filter(model, eqx.is_inexact_array)`.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _label(params, path), params)


def adamw_cosine(
    learning_rate: float,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    recurrent_factor: float = 0.25,
    weight_decay: float = 0.05,
    final_fraction: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up and cosine decay; gentler, and undecayed, on the recurrence.

    The recipe of the S5 and LRU papers (arXiv:2208.04933, arXiv:2303.06349); the numbers are to
    start from.

    **Arguments:**

    - `learning_rate`: at its peak.
    - `total_steps`: of the whole training, warm-up included.
    - `warmup_steps`: a tenth of `total_steps` if left out.
    - `recurrent_factor`: the recurrent parameters' rate is this fraction of `learning_rate`.
    - `weight_decay`: on the regular parameters.
    - `final_fraction`: of the peak, where the cosine ends.

    **Raises:**

    `ValueError` if `warmup_steps` is not below `total_steps`.
    """
    total_steps = check_size("total_steps", total_steps)
    warmup_steps = total_steps // 10 if warmup_steps is None else warmup_steps
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"`warmup_steps` must lie in [0, total_steps); got {warmup_steps} of {total_steps}."
        )

    def adamw(peak: float, decay: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup_steps, total_steps, end_value=final_fraction * peak
        )
        return optax.adamw(schedule, weight_decay=decay)

    return optax.multi_transform(
        {
            "recurrent": adamw(recurrent_factor * learning_rate, 0.0),
            "regular": adamw(learning_rate, weight_decay),
            "state": optax.set_to_zero(),
        },
        recurrent_labels,
    )


def _label(params: PyTree, path: tuple[Any, ...]) -> Label:
    """Walks from the root to the leaf, asking whatever names `recurrent_parameters` on the way."""
    tree: Any = params
    for entry in path:
        if isinstance(tree, eqx.nn.StateIndex):
            return "state"
        named = getattr(tree, "recurrent_parameters", ())
        if isinstance(entry, jax.tree_util.GetAttrKey) and entry.name in named:
            return "recurrent"
        tree = _child(tree, entry)
    return "regular"


def _child(tree: Any, entry: Any) -> Any:
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return getattr(tree, entry.name)
    return tree[entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else entry.key]
