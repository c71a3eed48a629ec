"""Blocks one after the other: one by one, or those alike as one loop."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import PRNGKeyArray

from discretax.blocks import AbstractBlock
from discretax.blocks.base import Samples

Blocks = Sequence[AbstractBlock]


def run_blocks(
    blocks: Blocks,
    x: Samples,
    state: eqx.nn.State,
    key: PRNGKeyArray | None,
    *,
    scan: bool,
    remat: bool,
) -> tuple[Samples, eqx.nn.State]:
    """`scan`: a pattern of blocks that repeats is compiled once. `remat`: backward, run blocks again."""
    keys = None if key is None else jr.split(key, len(blocks))
    period, repeats = _pattern(blocks) if scan else (len(blocks), 1)
    start = 0
    if repeats > 1:
        start = period * repeats
        x, state = _run_repeated(blocks[:start], period, x, state, keys, remat)
    for i in range(start, len(blocks)):
        x, state = _run(blocks[i], x, state, None if keys is None else keys[i], remat)
    return x, state


def _run(block, x, state, key, remat):
    apply = lambda block, x, state, key: block(x, state, key=key)
    return (eqx.filter_checkpoint(apply) if remat else apply)(block, x, state, key)


def _pattern(blocks: Blocks) -> tuple[int, int]:
    """The length of the shortest pattern that repeats from the first block on, and how often."""
    forms = [_form(block) for block in blocks]
    alike = lambda one, other: one[0] == other[0] and eqx.tree_equal(one[1], other[1]) is True
    for period in range(1, len(blocks) // 2 + 1):
        same = 0
        while same + period < len(blocks) and alike(forms[same], forms[same + period]):
            same += 1
        if same >= period:
            return period, 1 + same // period
    return len(blocks), 1


def _form(block: AbstractBlock) -> tuple[Any, Any]:
    """What two blocks must share for one's code to run the other's arrays."""
    block = jax.tree.map(lambda node: None if _is_index(node) else node, block, is_leaf=_is_index)
    arrays, static = eqx.partition(block, eqx.is_array)
    shapes = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(arrays)]
    return (shapes, jax.tree.structure(arrays)), static


def _run_repeated(blocks, period, x, state, keys, remat):
    first, substates = blocks[:period], [state.substate(block) for block in blocks]
    static = [eqx.partition(block, eqx.is_array)[1] for block in first]
    own_state = [jax.tree.structure(substate) for substate in substates]

    def stacked(values):
        """For each place in the pattern, the leaves of the blocks that stand there, stacked."""
        return [
            [
                jnp.stack(leaves)
                for leaves in zip(*map(jax.tree.leaves, values[i::period]), strict=True)
            ]
            for i in range(period)
        ]

    arrays = stacked([eqx.filter(block, eqx.is_array) for block in blocks])
    structures = [jax.tree.structure(eqx.filter(block, eqx.is_array)) for block in first]

    def advance(x, inputs):
        arrays, substates, keys = inputs
        after = []
        for i in range(period):
            block = eqx.combine(jax.tree.unflatten(structures[i], arrays[i]), static[i])
            substate = jax.tree.unflatten(own_state[i], substates[i])
            x, substate = _run(block, x, substate, None if keys is None else keys[i], remat)
            after.append(jax.tree.leaves(substate))
        return x, after

    if keys is not None:
        keys = keys[: len(blocks)].reshape(-1, period, *keys.shape[1:])
    x, after = lax.scan(advance, x, (arrays, stacked(substates), keys))
    for n, structure in enumerate(own_state):
        leaves = [leaf[n // period] for leaf in after[n % period]]
        state = state.update(jax.tree.unflatten(structure, leaves))
    return x, state


def _is_index(node: Any) -> bool:
    return isinstance(node, eqx.nn.StateIndex)
