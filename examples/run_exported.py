"""Streams through a file of `export_stream.py`, with JAX and without the library that trained it.

    python run_exported.py digits.stablehlo                           # what it takes, and how long
    python run_exported.py digits.stablehlo --recorded recorded.npz   # are the answers the same here?

Copy this script and the file to where the model is to run: `pip install jax flatbuffers` is all that
they need there. In a program of your own:

    step = StreamFile("digits.stablehlo")
    state = step.start(batch_size=8)
    answers, state = step(samples, state)  # (batch, time, ...): one sample of each stream, or more
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

State = dict[str, list[jax.Array]]


class StreamFile:
    """`answers, state = step(samples, state)`, compiled once for each batch size and chunk length.

    What it is called with is checked while it is compiled, which costs later calls nothing. A state
    bears the name of its model, so that none is taken for that of another one.
    """

    def __init__(self, path: str | Path):
        """**Raises:** `FileNotFoundError`; `ValueError` for a file that this version of JAX cannot
        run, and for one that holds another kind of function."""
        self.path = Path(path)
        self.exported = exported = _read(self.path)
        try:
            (self.samples, state), _ = exported.in_tree.unflatten(exported.in_avals)
            ((self.name, self.arrays),) = state.items()
        except (AttributeError, TypeError, ValueError):
            raise ValueError(
                f"{self.path} must hold a function `(samples, {{name: state}})`, as "
                f"export_stream.py writes it; got `{exported.fun_name}` of {exported.in_tree}."
            ) from None
        self._step = jax.jit(self._checked)
        try:
            self._step.lower(jnp.zeros((1, 1, *self.features), self.samples.dtype), self.start())
        except Exception as error:
            raise _of_another_version(self.path, error) from error

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return self.samples.shape[2:]

    def start(self, batch_size: int = 1) -> State:
        """Streams before their first sample, which are zeros."""
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
        zeros = lambda array: jnp.zeros((batch_size, *array.shape[1:]), array.dtype)
        return {self.name: list(map(zeros, self.arrays))}

    def restarted(self, state: State, streams: Any) -> State:
        """Where the `streams` start over and all others go on: a number, several of them, or a mask.

        **Raises:** `ValueError` for the state of another model; `TypeError` for what is no index, and
        `IndexError` for one that there is not.
        """
        self._check_state(state)
        begun, *arrays = state[self.name]
        streams = np.asarray(streams)
        if streams.dtype != bool and not np.issubdtype(streams.dtype, np.integer):
            raise TypeError(f"`streams` must be whole numbers or a mask; got {streams.dtype}.")
        size = len(begun)
        is_there = (-size <= streams) & (streams < size)
        if streams.shape != (size,) if streams.dtype == bool else not is_there.all():
            raise IndexError(f"`streams` must be among the {size} of the state; got {streams}.")
        return {self.name: [begun.at[streams].set(False), *arrays]}

    def __call__(self, samples: Any, state: State) -> tuple[jax.Array, State]:
        """The answers after each sample, `(batch, time, ...)`, and the state to go on with.

        **Raises:** `ValueError` for samples that the model does not take, of another number of
        streams than the state, or of none; for the state of another model.
        """
        return self._step(samples, state)

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, dict) or list(state) != [self.name]:
            received = f"that of {list(state)}" if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"`state` must be that of this model, {[self.name]}, from `start` or from the last "
                f"call; got {received}. The state of another model means nothing to this one."
            )
        arrays = state[self.name]
        shapes = [array.shape[1:] for array in self.arrays]
        received = [array.shape[1:] for array in arrays]
        if received != shapes:
            raise ValueError(
                f"`state` must have arrays of the shapes {shapes} for each stream; got {received}. "
                "Take what `start` or the last call gave."
            )

    def _checked(self, samples: Any, state: Any) -> tuple[jax.Array, State]:
        self._check_state(state)
        arrays = state[self.name]
        dtype, takes = self.samples.dtype, ", ".join(["batch", "time", *map(str, self.features)])
        if samples.ndim < 2 or samples.shape[2:] != self.features or samples.dtype != dtype:
            raise ValueError(
                f"`samples` must be ({takes}) in {dtype}; got {samples.dtype}{samples.shape}. A "
                "sample of one stream is a batch of one, and a chunk of one: `sample[None, None]`."
            )
        if samples.shape[1] == 0 or samples.shape[0] != len(arrays[0]):
            raise ValueError(
                f"`samples` must be at least one for each of the {len(arrays[0])} streams of the "
                f"state, ({takes}); got {samples.shape}. For another number of streams make another "
                "state, `start(batch_size)`; where nothing has come, do not call."
            )
        answers, state = self.exported.call(samples, state)
        return answers, state


def _read(path: Path) -> export.Exported:
    if not path.is_file():
        raise FileNotFoundError(
            f"found no file at {path}. `python examples/export_stream.py` writes one."
        )
    data = path.read_bytes()
    if not re.search(rb"StableHLO_v[\d.]+", data):
        raise ValueError(f"{path} must be a file of `jax.export`; found no StableHLO in it.")
    try:
        exported = export.deserialize(bytearray(data))
    except ImportError:  # which says what to install
        raise
    except Exception as error:
        raise _of_another_version(path, error) from error
    version = exported.calling_convention_version
    least = export.minimum_supported_calling_convention_version
    most = export.maximum_supported_calling_convention_version
    if not least <= version <= most:
        reason = f"its calling convention is {version}, and those from {least} to {most} are known"
        raise _of_another_version(path, reason)
    return exported


def _of_another_version(path: Path, reason: Any) -> ValueError:
    return ValueError(
        f"{path} cannot be run by jax {jax.__version__}: {reason}. Files run in the version that has "
        "written them and, for some time, in later ones: install such a version here, or export the "
        "saved model again with this one."
    )


def microseconds(step: Any, samples: Any, state: Any, calls: int = 200) -> float:
    """Of a call, the answer waited for and the state carried on: the fastest, to which other programs
    on the machine only add."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        answers, state = step(samples, state)
        jax.block_until_ready(answers)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def furthest(step: StreamFile, samples: np.ndarray, answers: np.ndarray) -> float:
    """How far what `step` answers is from the `answers`, in parts of the largest of them: all streams
    side by side, the first sample by itself, then the rest."""
    first, state = step(samples[:, :1], step.start(len(samples)))
    rest, _ = step(samples[:, 1:], state)
    error = np.abs(np.concatenate([first, rest], axis=1) - answers).max()
    return float(error / np.abs(answers).max())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--recorded", type=Path, help="samples and answers to compare with")
    options = parser.parse_args(argv)
    try:
        step = StreamFile(options.file)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    size = sum(np.prod(array.shape[1:], dtype=int) for array in step.arrays)
    sample = np.zeros((1, 1, *step.features), step.samples.dtype)
    print(
        f"{options.file}: {options.file.stat().st_size / 1e3:.0f} kB for "
        f"{', '.join(step.exported.platforms)}, the state of a stream {size} numbers\n"
        f"one sample of {step.features}: {microseconds(step, sample, step.start()):.0f} us a call"
    )
    library = {"discretax", "equinox"} & set(sys.modules)
    print(f"imported besides jax: {', '.join(library) or 'neither discretax nor equinox'}")
    if options.recorded is not None:
        with np.load(options.recorded) as recorded:
            error = furthest(step, recorded["samples"], recorded["answers"])
        print(f"the answers are the recorded ones, to {error:.1e} of the largest")
        if not error <= 1e-5:  # so that NaN does not pass
            raise SystemExit("that is more than rounding")


if __name__ == "__main__":
    main()
