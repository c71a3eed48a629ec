"""Other ways to run a backbone's blocks: those alike as one loop, and each again in the backward pass."""

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import PRNGKeyArray, PyTree

from discretax._features import check_instance
from discretax._stateful import check_state, found
from discretax.blocks import AbstractBlock
from discretax.blocks.base import Samples
from discretax.models._backbone import AbstractBackbone

Model = TypeVar("Model", bound=PyTree)


def scan_blocks(model: Model, value: bool = True) -> Model:
    """The model with blocks that are alike run by one loop, so that a deep model compiles fast.

    The numbers stay the same, and so do parameters, state and streaming. A pattern of blocks, as
    Griffin's, counts as alike from one repetition to the next. Blocks of another kind before the loop
    and behind it, as RWKV-7's first and last, run one by one. While the loop runs it holds a
    second copy of the blocks' parameters.

    **Arguments:** `model`: any PyTree of models; `value`: False to go back.

    **Raises:** `ValueError` if there is no backbone of `discretax.models` in it.
    """
    return _run_otherwise(model, scan=value)


def remat_blocks(model: Model, value: bool = True) -> Model:
    """The model with its blocks run again in the backward pass, which then keeps their inputs alone.

    Memory for training grows by one (time, hidden_dim) per block, against the time of another
    forward pass. The numbers stay the same.

    **Arguments:** `model`: any PyTree of models; `value`: False to go back.

    **Raises:** `ValueError` if there is no backbone of `discretax.models` in it.
    """
    return _run_otherwise(model, remat=value)


class DeepBackbone(eqx.nn.StatefulLayer):
    """A backbone whose blocks run in another way, with the same numbers.

    Made by [`discretax.models.scan_blocks`][] and [`discretax.models.remat_blocks`][].

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(LRU)(hidden_dim=64, num_blocks=24, key=key)
        model = scan_blocks(model)  # a DeepBackbone, compiled as fast as one block
        y, state = eqx.nn.inference_mode(model)(x, state)  # x, y: (time, 64)
        ```
    """

    backbone: AbstractBackbone
    scan: bool = eqx.field(static=True, default=False)
    remat: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_instance("backbone", self.backbone, AbstractBackbone)

    @property
    def blocks(self) -> tuple[AbstractBlock, ...]:
        return self.backbone.blocks

    def __call__(
        self, x: Samples, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        """As the backbone's own."""
        check_state(state, self)
        blocks = self.blocks
        keys = None if key is None else jr.split(key, len(blocks))
        loop, period = _pattern(blocks, state) if self.scan else (range(0), 1)
        of_loop = lambda many: many[loop.start : loop.stop]
        for i, block in enumerate(blocks):
            if i not in loop:
                x, state = _run(block, x, state, None if keys is None else keys[i], self.remat)
            elif i == loop.start:
                loop_keys = None if keys is None else of_loop(keys)
                x, state = _run_repeated(of_loop(blocks), period, x, state, loop_keys, self.remat)
        return x, state


def _run_otherwise(model: Model, *, scan: bool | None = None, remat: bool | None = None) -> Model:
    """None: as before."""
    is_backbone = lambda node: isinstance(node, AbstractBackbone | DeepBackbone)
    new = lambda value, old: old if value is None else value

    def change(node):
        if isinstance(node, DeepBackbone):
            deep = DeepBackbone(node.backbone, new(scan, node.scan), new(remat, node.remat))
        elif isinstance(node, AbstractBackbone):
            deep = DeepBackbone(node, new(scan, False), new(remat, False))
        else:
            return node
        return deep if deep.scan or deep.remat else deep.backbone

    if not any(map(is_backbone, jax.tree.leaves(model, is_leaf=is_backbone))):
        raise ValueError(
            "There are no blocks to run in another way: expected a model with a backbone of "
            f"`discretax.models` in it; got {type(model).__name__}."
        )
    return jax.tree.map(change, model, is_leaf=is_backbone)


def _run(block, x, state, key, remat):
    apply = lambda block, x, state, key: block(x, state, key=key)
    return (eqx.filter_checkpoint(apply) if remat else apply)(block, x, state, key)


def _pattern(blocks: Sequence[AbstractBlock], state: eqx.nn.State) -> tuple[range, int]:
    """Which blocks repeat a pattern, and the length of the pattern: that which leaves the fewest
    blocks to be compiled; of those the shortest, as early as it can.

    Others may stand before them, as the first block of RWKV-7, and behind them.
    """
    forms = [_form(block, state) for block in blocks]
    alike = lambda one, other: one[0] == other[0] and eqx.tree_equal(one[1], other[1]) is True
    kinds = [next(k for k, other in enumerate(forms) if alike(form, other)) for form in forms]
    best, saved = (range(0), 1), 0
    for period in range(1, len(blocks) // 2 + 1):
        same = 0
        for i in range(period, len(blocks)):
            same = same + 1 if kinds[i] == kinds[i - period] else 0
            repeated = same - same % period
            if repeated > saved:
                start = i + 1 - same - period
                best, saved = (range(start, start + repeated + period), period), repeated
    return best


def _form(block: AbstractBlock, state: eqx.nn.State) -> tuple[Any, Any]:
    """What two blocks must share for one's code to run the other's arrays."""
    of_state = jax.tree.leaves(_substate(block, state))
    is_index = lambda node: isinstance(node, eqx.nn.StateIndex)
    block = jax.tree.map(lambda node: None if is_index(node) else node, block, is_leaf=is_index)
    arrays, static = eqx.partition(block, eqx.is_array)
    leaves = (*jax.tree.leaves(arrays), *of_state)
    shapes = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]
    return (shapes, jax.tree.structure(arrays)), static


def _substate(block: AbstractBlock, state: eqx.nn.State) -> eqx.nn.State:
    """What the state knows of a block. One that was put in later says itself what it needs."""
    _, known = state.tree_flatten()
    indices = found(block, eqx.nn.StateIndex).values()
    return state.substate([index for index in indices if index.marker in known])


def _run_repeated(blocks, period, x, state, keys, remat):
    """Blocks differ in their arrays and in the indices of their states: the first ones' run all."""
    blocks = eqx.nn.delete_init_state(blocks)  # a block put in later may have its own yet
    arrays, static = zip(*(eqx.partition(block, eqx.is_array) for block in blocks), strict=True)
    substates = [_substate(block, state) for block in blocks]

    def stacked(trees):
        """For each place in the pattern, what stands there, in the structure of the first."""
        return [
            jax.tree.unflatten(
                jax.tree.structure(trees[i]),
                map(jnp.stack, zip(*map(jax.tree.leaves, trees[i::period]), strict=True)),
            )
            for i in range(period)
        ]

    if keys is not None:
        keys = keys.reshape(-1, period, *keys.shape[1:])
    x, after = _loop(static[:period], remat, x, (stacked(arrays), stacked(substates), keys))
    for n, substate in enumerate(substates):
        if not jax.tree.leaves(substate):
            continue  # an update would make the caller's state an old one
        leaves = [leaf[n // period] for leaf in jax.tree.leaves(after[n % period])]
        state = state.update(jax.tree.unflatten(jax.tree.structure(substate), leaves))
    return x, state


@eqx.filter_jit
def _loop(static, remat, x, inputs):
    """Compiled once for blocks alike, also where the caller is not."""

    def advance(x, inputs):
        arrays, substates, keys = inputs
        after = []
        for i, parts in enumerate(zip(arrays, static, strict=True)):
            key = None if keys is None else keys[i]
            x, substate = _run(eqx.combine(*parts), x, substates[i], key, remat)
            after.append(substate)
        return x, after

    return lax.scan(advance, x, inputs)
