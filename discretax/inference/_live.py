"""A compiled step, for the least delay between a sample and its answer."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PyTree

from discretax._timeseries import Timeseries
from discretax.inference._streaming import inference_state, live_model

Stream = tuple[Array, ...]

# Bytes of weights from which on they are no constants of what is compiled.
LARGE = 2**27


def live(
    model: PyTree,
    state: eqx.nn.State,
    batch_size: int | None = None,
    max_seqlen: int = 1,
    dtype: Any = None,
) -> tuple["LiveStep", Stream]:
    """A compiled step of a trained model, and the stream before its first sample.

    The short way to stream, and the fast one. Inference mode, streaming mode and the discrete matrices
    of LTI mixers are seen to. The outputs of all chunks, concatenated, are those of the whole; a head
    that pools answers with what it has seen so far.

    !!! example

        ```python
        step, stream = discretax.live(model, state)
        for chunk in chunks:  # (time, features), one sample or more
            y, stream = step(chunk, stream)
        ```

    **Arguments:** `model`, in any mode, and its `state`, which stay as they are; `batch_size`,
    `max_seqlen` and `dtype` as in [`discretax.inference_state`][]. With a `batch_size`, chunks are
    `(batch, time, features)`, and every array of the stream has that axis in front.

    **Returns:** a [`discretax.LiveStep`][], and a stream: a tuple of arrays.

    **Raises:** as [`discretax.inference_state`][].
    """
    step = LiveStep(model, state, batch_size, max_seqlen, dtype)
    return step, step.start()


class LiveStep:
    """`y, stream = step(chunk, stream)`, compiled once for each length of chunks.

    Made by [`discretax.live`][]. The model is as it was then: what is trained afterwards has no effect.

    A call from Python is given a handful of arrays, however many layers there are. Small caches travel
    one behind the other in one array. Weights are constants of what is compiled, which then holds a
    copy of them for each length of chunks; beyond 128 MB they are arguments, since compiling would take
    long. In a loop of your own under `jax.jit` there is nothing to gain: take
    [`discretax.streaming_mode`][].
    """

    def __init__(
        self,
        model: PyTree,
        state: eqx.nn.State,
        batch_size: int | None = None,
        max_seqlen: int = 1,
        dtype: Any = None,
    ):
        """**Arguments:** those of [`discretax.live`][]."""
        model = live_model(model)
        first = inference_state(model, state, batch_size, max_seqlen, dtype)
        one = first if batch_size is None else jax.eval_shape(lambda: _row(first))
        packing = _Packing(one)
        pack = packing.pack if batch_size is None else jax.vmap(packing.pack)
        self._first: Stream = jax.jit(pack)(first)
        # The initial values are in the stream by now.
        weights, static = eqx.partition(eqx.nn.delete_init_state(model), eqx.is_array)
        as_arguments = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > LARGE
        self._arguments = weights if as_arguments else None
        shapes = [array.shape for array in self._first]

        def step(arguments, chunk, stream):
            _check_stream(stream, shapes)
            model = eqx.combine(arguments if as_arguments else weights, static)

            def run(chunk, stream):
                y, state = model(chunk, packing.unpack(stream))
                return y, packing.pack(state)

            if batch_size is None:
                return run(chunk, stream)
            _check_batch(chunk, batch_size)
            return jax.vmap(run)(chunk, stream)

        self._step = jax.jit(step, donate_argnums=2)

    def start(self) -> Stream:
        """A stream before its first sample: to start over, without compiling anew."""
        return tuple(map(jnp.copy, self._first))

    def __call__(self, chunk: Array | Timeseries, stream: Stream) -> tuple[Any, Stream]:
        """**Arguments:**

        - `chunk`: what the model takes, an array or a [`discretax.Timeseries`][], of any length; with
            a `batch_size`, that many side by side.
        - `stream`: that of the last call, or of `start`. It is used up, for its memory is used again.
            To go on from it twice, copy it before: `jax.tree.map(jnp.copy, stream)`.

        **Returns:** the model's output, and the stream to go on with.

        **Raises:** `ValueError` for a stream that is used up, or one of another model or batch size, and
        for a chunk of another batch size; `TypeError` for anything but a stream.
        """
        if isinstance(stream, tuple) and any(map(_is_used_up, stream)):
            raise ValueError(
                "`stream` must be the one that the last call gave back; got one that is used up, "
                "since its memory is used again. To go on from a stream twice, copy it before: "
                "`jax.tree.map(jnp.copy, stream)`; to start over, `step.start()`."
            )
        return self._step(self._arguments, chunk, stream)


class _Packing:
    """A tree of arrays as few of them: small ones of a type lie one behind the other.

    Each array that a call is given takes about a microsecond, in which some thousand numbers are
    copied.
    """

    def __init__(self, tree: PyTree[Array], small: int = 4096):
        leaves, self.structure = jax.tree.flatten(tree)
        self.shapes = [leaf.shape for leaf in leaves]
        groups = {}
        for i, leaf in enumerate(leaves):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
            alone = is_key or leaf.size > small or leaf.weak_type
            groups.setdefault(i if alone else leaf.dtype, []).append(i)
        self.groups: list[list[int]] = list(groups.values())

    def pack(self, tree: PyTree[Array]) -> Stream:
        leaves = jax.tree.leaves(tree)
        flat = lambda group: [leaves[i].reshape(-1) for i in group]
        return tuple(
            leaves[group[0]] if len(group) == 1 else jnp.concatenate(flat(group))
            for group in self.groups
        )

    def unpack(self, arrays: Stream) -> PyTree[Array]:
        leaves: list[Any] = [None] * len(self.shapes)
        for group, array in zip(self.groups, arrays, strict=True):
            if len(group) == 1:
                leaves[group[0]] = array
                continue
            end = 0
            for i in group:
                start, end = end, end + math.prod(self.shapes[i])
                leaves[i] = array[start:end].reshape(self.shapes[i])
        return jax.tree.unflatten(self.structure, leaves)


def _row(batched: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: leaf[0], batched)


def _is_used_up(array: Any) -> bool:
    return isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.is_deleted()


def _check_stream(stream: Any, shapes: list[tuple[int, ...]]) -> None:
    if not isinstance(stream, tuple):
        raise TypeError(
            "`stream` must be what the last call gave back, or `step.start()`; got "
            f"{type(stream).__name__}. An `equinox.nn.State` goes with `discretax.streaming_mode`."
        )
    received = [array.shape for array in stream]
    if received != shapes:
        raise ValueError(
            f"`stream` must be one of this step, with arrays of the shapes {shapes}; got {received}. "
            "Take `step.start()`, or, for another batch size, call `discretax.live` again."
        )


def _check_batch(chunk: Array | Timeseries, batch_size: int) -> None:
    for array in jax.tree.leaves(chunk):
        if array.ndim == 0 or array.shape[0] != batch_size:
            raise ValueError(
                f"`chunk` must have a row for each of the batch_size={batch_size} streams; got an "
                f"array of shape {array.shape}. A stream that has received nothing gets the length "
                "0, in a `discretax.Timeseries`."
            )
