"""A model with its state: the whole, chunks and steps, padding and resets."""

import contextlib
import functools as ft
import itertools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from discretax._features import check_size
from discretax._sequential import Sequential
from discretax._stateful import AbstractStreamingLayer, found_within
from discretax._timeseries import Timeseries, values_of
from discretax.inference import inference_state, streaming_mode
from discretax.testing._compare import at, same
from discretax.testing._law import Law, hold, law

Samples = Array | Timeseries


class PerSample(NamedTuple):
    output: Any
    caches: dict[str, PyTree]


class SoFar(NamedTuple):
    answers: Any
    caches: dict[str, PyTree]


class Stream:
    """A model in inference mode, its state, and samples to send, in multiples of some."""

    def __init__(self, model: PyTree, state: eqx.nn.State, x: Samples, rtol: float, multiple: int):
        self.model = eqx.nn.inference_mode(model)
        self.live = streaming_mode(self.model)
        self.state = state
        self.rtol = rtol
        self.multiple = multiple
        self.values = np.asarray(values_of(x))
        self.timesteps = None
        if isinstance(x, Timeseries) and x.timesteps is not None:
            self.timesteps = np.asarray(x.timesteps)
        self.time = len(self.values)
        # Pieces are of this length, of one sample, or as few as may be, and of the rest: what is
        # compiled, for each length and each kind of input anew, takes most of the time.
        self.half = (self.time // multiple - 1) // 2 * multiple
        edges = (0, self.half, self.half + multiple, self.time)
        self.spans = list(itertools.pairwise(edges))
        self.resets = np.isin(np.arange(self.time), edges[1:-1])
        self.call = eqx.filter_jit(lambda model, x, state: model(x, state))
        shapes = [
            values_of(eqx.filter_eval_shape(self.model, self.part(0, end), state)[0]).shape
            for end in (self.half, self.time)
        ]
        # A head that pools gives one answer for all samples. What downsamples gives fewer than there
        # are samples, and in proportion.
        self.outputs = math.prod(shapes[1][:1])
        self.per_sample = shapes[0][:1] == (self.half * self.outputs / self.time,)

    def precision(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # that of the model

    def fresh(self, batch_size: int | None = None) -> eqx.nn.State:
        return inference_state(self.model, self.state, batch_size, self.time)

    def outputs_of(self, samples: int) -> int:
        """How many come of so many samples; of windows that are not full, too."""
        return -(-samples * self.outputs // self.time)

    def part(self, start: int, end: int) -> Samples:
        values = jnp.asarray(self.values[start:end])
        return values if self.timesteps is None else Timeseries(values, self.timesteps[start:end])

    def padded(
        self, start: int, end: int, resets: np.ndarray | None = None, values: Any = None
    ) -> Timeseries:
        """As many samples as there are, of which those from `start` to `end` come first."""
        values = self.values if values is None else values
        resets = np.zeros(self.time, bool) if resets is None else resets
        junk = np.nan if jnp.issubdtype(values.dtype, jnp.floating) else 0
        moved = lambda array, fill: np.append(
            array[start:end], np.full_like(array[end - start :], fill), axis=0
        )
        timesteps = None if self.timesteps is None else moved(self.timesteps, 1)
        return Timeseries(moved(values, junk), timesteps, end - start, moved(resets, True))

    def expected(self, *ends: int) -> list[np.ndarray]:
        """What chunks of all samples must give: those that go as far as `ends`, or the parts."""
        if self.per_sample:
            return [self.alone(0, self.time)]
        return [self.alone(0, end) for end in ends or [end for _, end in self.spans]]

    def alone(self, start: int, end: int) -> np.ndarray:
        return self.whole(self.part(start, end))

    def whole(self, x: Samples) -> np.ndarray:
        """What the model, not streaming, gives for a sequence."""
        return self.valid(self.call(self.model, x, self.state)[0], x)

    def send(self, *chunks: Samples) -> tuple[list[np.ndarray], dict[str, PyTree]]:
        """The outputs of the chunks, without padding, and the caches after the last."""
        ys, state = [], self.fresh()
        for chunk in chunks:
            y, state = self.call(self.live, chunk, state)
            ys.append(self.valid(y, chunk))
        return ys, caches(self.live, state)

    def send_with_resets(
        self, values: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], dict[str, PyTree]]:
        """In two chunks: a reset within the first, and one where the second begins."""
        cut = self.half + self.multiple
        spans = (0, cut), (cut, self.time)
        return self.send(*(self.padded(*span, self.resets, values) for span in spans))

    @ft.cached_property
    def caches_of_the_whole(self) -> dict[str, PyTree]:
        return self.send(self.part(0, self.time))[1]

    @ft.cached_property
    def caches_of_the_last(self) -> dict[str, PyTree]:
        return self.send(self.part(*self.spans[-1]))[1]

    def valid(self, y: Samples, x: Samples) -> np.ndarray:
        length = x.length if isinstance(x, Timeseries) and self.per_sample else None
        return np.asarray(values_of(y))[: None if length is None else self.outputs_of(int(length))]

    def same(self, sent: Any, expected: Any, after: dict[str, PyTree], *, of: str, to: str) -> None:
        """`sent`: outputs and caches; `expected`: outputs of as many samples or of as many chunks."""
        outputs, caches_sent = sent
        if self.per_sample:
            flat = lambda y: y.reshape(len(y), math.prod(y.shape[1:]))
            over_time = lambda ys: np.concatenate([flat(y) for y in ys])
            pair = PerSample(over_time(outputs), caches_sent), PerSample(over_time(expected), after)
        else:
            pair = SoFar(np.stack(outputs), caches_sent), SoFar(np.stack(expected), after)
        same(*pair, self.rtol, of=of, to=to)


def caches(model: PyTree, state: eqx.nn.State) -> dict[str, PyTree]:
    """By what leads to the layer."""
    layers = found_within(model, AbstractStreamingLayer)
    return {f"model{path}": state.get(layer.cache_index) for path, layer in layers.items()}


@law()
def chunks_are_the_whole(stream: Stream):
    """Chunks give the outputs of the whole, and leave the caches that it leaves."""
    sent = stream.send(*(stream.part(*span) for span in stream.spans))
    stream.same(sent, stream.expected(), stream.caches_of_the_whole, of="chunks", to="the whole")


@law()
def steps_are_the_whole(stream: Stream):
    """Chunks of one sample do, or of as few as may be."""
    step = stream.multiple
    ys, after = stream.send(*(stream.part(t, t + step) for t in range(0, stream.time, step)))
    if not stream.per_sample:
        ys = [ys[end // step - 1] for _, end in stream.spans]
    expected = stream.expected()
    stream.same((ys, after), expected, stream.caches_of_the_whole, of="steps", to="the whole")


@law()
def padded_chunks_are_the_whole(stream: Stream):
    """Padding, though NaN, changes neither outputs nor caches of a stream."""
    half, end = stream.half, stream.time
    sent = stream.send(*(stream.padded(*span) for span in ((0, half), (half, half), (half, end))))
    expected = stream.expected(half, half, end)
    stream.same(sent, expected, stream.caches_of_the_whole, of="padded chunks", to="the whole")


@law()
def padding_is_without_effect(stream: Stream):
    """Padding, though NaN, changes no output for a whole sequence."""
    y = stream.whole(stream.padded(0, stream.half))
    alone = stream.alone(0, stream.half)
    stream.same(([y], {}), [alone], {}, of="a padded sequence", to="the sequence")


@law()
def resets_are_separate_runs(stream: Stream):
    """Where `resets` is True, a sequence begins that is answered as if it were alone."""
    y = stream.whole(stream.padded(0, stream.time, stream.resets))
    alone = [stream.alone(*span) for span in stream.spans]
    alone = alone if stream.per_sample else alone[-1:]
    stream.same(([y], {}), alone, {}, of="sequences in one", to="each alone")


@law()
def resets_of_a_stream_are_separate_runs(stream: Stream):
    """Resets within a chunk and between two of them leave nothing of what came before."""
    alone = [stream.alone(*span) for span in stream.spans]
    alone = alone if stream.per_sample else alone[1:]
    sent, after = stream.send_with_resets(), stream.caches_of_the_last
    stream.same(sent, alone, after, of="chunks with resets", to="each sequence alone")


@law(lambda stream: jnp.issubdtype(stream.values.dtype, jnp.floating))
def nan_before_a_reset_does_not_leak(stream: Stream):
    """A NaN that has got into the caches ends at a reset."""
    broken = stream.values.copy()
    broken[0] = np.nan
    (y, last), caches = stream.send_with_resets(broken)
    sent = [y[stream.outputs_of(stream.half) :] if stream.per_sample else y, last], caches
    alone = [stream.alone(*span) for span in stream.spans[1:]]
    what = "what follows a NaN and a reset"
    stream.same(sent, alone, stream.caches_of_the_last, of=what, to="it alone")


@law()
def streams_side_by_side_are_streams_alone(stream: Stream):
    """Streams of one batch, each with a state of its own, go on at their own rates."""
    ends = stream.time, stream.half
    rows = [stream.padded(0, end) for end in ends]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    send = eqx.filter_jit(lambda live, x, state: jax.vmap(live)(x, state))
    ys, state = send(stream.live, batch, stream.fresh(batch_size=2))
    batch_caches = caches(stream.live, state)
    for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
        sent = [stream.valid(values_of(ys)[i], row)], at(batch_caches, i)
        alone, after = stream.send(stream.part(0, end))
        stream.same(sent, alone, after, of=f"stream {i} of 2", to="it alone")


@law()
def inference_state_starts_over(stream: Stream):
    """Caches made anew from the state of a used stream are those before the first sample."""
    _, used = stream.call(stream.live, stream.part(0, stream.time), stream.fresh())
    again = inference_state(stream.model, used, max_seqlen=stream.time)
    fresh = caches(stream.live, stream.fresh())
    same(caches(stream.live, again), fresh, 0, of="made anew", to="made at first")


LAWS = [entry for entry in list(globals().values()) if isinstance(entry, Law)]


def check_streaming(
    model: PyTree, state: eqx.nn.State, x: Samples, *, rtol: float = 1e-5, multiple: int = 1
) -> None:
    """Checks that a model that streams answers as one that is given whole sequences.

    Chunks, single samples, padding, resets, and streams side by side are compared with the whole,
    in outputs and in the caches left behind. What a model is made of does not matter: an encoder,
    a backbone, a head, all of them in an `eqx.nn.Sequential`.

    **Arguments:**

    - `model`: `(x, state) -> (y, state)`, from `(time, ...)` to one answer per sample, or per window
        of them, or to one for all of them so far. Inference mode and streaming mode are switched on
        here.
    - `state`: the model's, as for [`discretax.inference_state`][].
    - `x`: samples to try, an array or a [`discretax.Timeseries`][] with timesteps: some ten, for
        most of the time goes into compiling.
    - `rtol`: what may differ, relative to the largest number of each output and cache.
    - `multiple`: of how many samples every chunk must be a multiple, for models that change the rate:
        the product of their strides.

    **Raises:**

    `AssertionError` that lists every broken law, with the numbers and where they part, and says at
    which layer of a sequence of them it begins.
    `ValueError` for fewer than five samples, or five times `multiple`, for another number of them than
    a multiple, and for samples with padding or resets of their own; and what `inference_state` raises.
    """
    multiple = check_size("multiple", multiple)
    if isinstance(x, Timeseries) and (x.length is not None or x.resets is not None):
        raise ValueError(
            "`x` must be whole samples; got a `Timeseries` with a length or resets. Give its values "
            "and timesteps alone: padding and resets are put in here."
        )
    time = values_of(x).shape[0]
    if time < 5 * multiple or time % multiple:
        whole = f", and a multiple of {multiple}" if multiple > 1 else ""
        raise ValueError(f"`x` must be at least {5 * multiple} samples{whole}; got {time}.")
    stream = Stream(model, state, x, rtol, multiple)
    stream.fresh()  # where this fails, no law is to blame
    try:
        hold([bound for law in LAWS for bound in law.of(stream)])
    except AssertionError as broken:
        raise AssertionError(
            f"{broken}\n\n{_advice(model, state, x, rtol, multiple)}"
        ) from broken.__cause__


def _advice(model: PyTree, state: eqx.nn.State, x: Samples, rtol: float, multiple: int) -> str:
    """Which layer is the first to break a law, and what it may lack."""
    layers = model.layers if isinstance(model, Sequential | eqx.nn.Sequential) else (model,)
    parts = [model[: i + 1] for i in range(len(layers) - 1)] if len(layers) > 1 else []
    broken = (i for i, part in enumerate(parts) if not _holds(part, state, x, rtol, multiple))
    i = next(broken, len(parts))
    layer, name = layers[i], f"`{type(layers[i]).__name__}`"
    where = f"{name}, `model[{i}]`, is" if parts else f"{name} is"
    if found_within(layer, AbstractStreamingLayer):
        return (
            f"{where} where it begins. It keeps a cache: see to it that the cache is read and "
            "written in every call, and that padding and resets are honoured."
        )
    return (
        f"{where} where it begins, and it keeps no cache. A layer that looks at other samples than the "
        "one of the moment derives from `discretax.AbstractStreamingLayer`, and reads and writes what "
        'it remembers of them: see "A layer that remembers" in the documentation.'
    )


def _holds(model: PyTree, state: eqx.nn.State, x: Samples, rtol: float, multiple: int) -> bool:
    stream = Stream(model, state, x, rtol, multiple)
    try:
        for law in (chunks_are_the_whole, resets_are_separate_runs, padding_is_without_effect):
            law.check(stream)
    except Exception:
        return False
    return True
