"""Writes a trained model as one file, which streams wherever there is JAX, without this library.

    python examples/export_stream.py                # trains for a minute; then 28 rows of each digit
    python examples/export_stream.py --checkpoint runs/mnist/checkpoint.eqx   # of train_mnist.py

The file is written by `jax.export`: StableHLO for CPU, CUDA and TPU, with the weights, for any
number of streams and any length of chunks. `run_exported.py` reads it, in a process of its own that
imports JAX alone, and compares its answers with those recorded here. Printed are the size of the
file, and what a call takes beside `discretax.live`; a figure shows that for chunks of many lengths.

It needs `pip install -e ".[examples,export]"`. With `--resume`, an interrupted training goes on.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import arguments
import drawing
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import run_exported
import train_mnist
from jax import export, lax
from matplotlib.figure import Figure

import discretax


# --8<-- [start:exported]
def name_of(model, state) -> str:
    """Another one for other weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(eqx.filter((model, state), eqx.is_array)):
        digest.update(np.asarray(leaf).tobytes())
    return f"model {digest.hexdigest()[:12]}"


def exported(model, state, sample, max_seqlen: int | None = None) -> export.Exported:
    """`answers, state = run(samples, state)`: samples (batch, time, ...) of the kind of `sample`, and
    the answers after each of them.

    The state is one dictionary of one list of arrays, under the name of the model. Zeros are a stream
    before its first sample. A cache that grows with time, as that of attention without a window, has
    room for `max_seqlen` samples; the answers past them are NaN.
    """
    live = discretax.discretized(discretax.streaming_mode(eqx.nn.inference_mode(model)))
    room = lambda n: discretax.inference_state(model, state, max_seqlen=n)
    shapes = lambda n: [leaf.shape for leaf in jax.tree.leaves(room(n))]
    if max_seqlen is None and shapes(1) != shapes(2):
        raise ValueError(
            "the model keeps every sample of a stream, so that its file needs to know of how many; got "
            "none. Give the length of the longest stream, `exported(..., max_seqlen=1000)`."
        )
    first, structure = jax.tree.flatten(room(1 if max_seqlen is None else max_seqlen))
    name = name_of(model, state)

    def read(arrays, sample):
        answer, stream = live(sample[None], jax.tree.unflatten(structure, arrays))
        return jax.tree.leaves(stream), answer.reshape(-1)

    def stream(samples, state):
        begun, *arrays = state
        arrays = [jnp.where(begun, *each) for each in zip(arrays, first, strict=True)]
        arrays, answers = lax.scan(read, arrays, samples)
        return answers, [jnp.ones_like(begun), *arrays]

    def run(samples, state):
        answers, arrays = jax.vmap(stream)(samples, state[name])
        return answers, {name: arrays}

    batch, time = export.symbolic_shape("batch, time")
    shape = lambda array, *axes: jax.ShapeDtypeStruct((*axes, *array.shape), array.dtype)
    arrays = [shape(array, batch) for array in (jnp.zeros((), bool), *first)]
    export_for = export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])
    return export_for(shape(sample, batch, time), {name: arrays})


# --8<-- [end:exported]


def record(model, state, x: jax.Array) -> np.ndarray:
    """The answers of `discretax.live` after each sample, all streams side by side."""
    step, stream = discretax.live(model, state, batch_size=len(x))
    answers = []
    for t in range(x.shape[1]):
        answer, stream = step(x[:, t : t + 1], stream)
        answers.append(answer)
    return np.stack(answers, axis=1)


BATCHES = 1, 64
CHUNKS = 1, 4, 16, 64


def latencies(model, state, file: run_exported.StreamFile, calls: int) -> dict:
    """Microseconds of a call, of the file and of `discretax.live`, by batch size and length of chunks."""
    table = {}
    for batch_size in BATCHES:
        step, _ = discretax.live(model, state, batch_size=batch_size)
        for time in CHUNKS:
            chunk = np.zeros((batch_size, time, *file.features), np.float32)
            table[batch_size, time] = {
                "file": run_exported.microseconds(file, chunk, file.start(batch_size), calls),
                "live": run_exported.microseconds(step, chunk, step.start(), calls),
            }
    return table


def draw(path: Path, table: dict) -> None:
    figure = Figure(figsize=(drawing.WIDTH, 3.2))
    panels = figure.subplots(1, len(BATCHES), sharey=True, squeeze=False)[0]
    names = {"file": "the file", "live": "discretax.live"}
    panels[0].set(yscale="log", ylabel="microseconds a call")
    for axes, batch_size in zip(panels, BATCHES, strict=True):
        for name, color in zip(names, drawing.COLORS, strict=False):
            y = [table[batch_size, time][name] for time in CHUNKS]
            axes.plot(CHUNKS, y, marker="o", color=color)
        axes.set(xscale="log", xlabel="samples in a chunk")
        axes.set_xticks(CHUNKS, [str(time) for time in CHUNKS])
        axes.minorticks_off()
        axes.set_title("one stream" if batch_size == 1 else f"{batch_size} streams")
    for axes, batch_size in zip(panels, BATCHES, strict=True):
        last = table[batch_size, CHUNKS[-1]]
        lines = [
            (names[name], last[name], color)
            for name, color in zip(names, drawing.COLORS, strict=False)
        ]
        drawing.name_lines(axes, lines)
    drawing.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="of train_mnist.py; without it, a model is trained")
    add("--epochs", type=int, help="of the training; 6 by default")
    add("--seed", type=int, help="of the training; 0 by default")
    add("--calls", type=int, default=100, help="to measure with")
    add("--out", type=Path, default=Path("runs/export"), help="folder for what is written")
    add("--resume", action="store_true", default=None, help="go on with an interrupted training")
    options = parser.parse_args(argv)
    given, trains = vars(options), options.checkpoint is None
    rules = [("calls", options.calls > 0, "above 0")]
    for name in ("epochs", "seed", "resume"):
        rule = "left out beside --checkpoint, which has been trained with settings of its own"
        rules.append((name, trains or given[name] is None, rule))
    arguments.refuse(parser, given, rules)
    return options


def config_of(checkpoint: Path) -> train_mnist.Config:
    try:
        with open(checkpoint, "rb") as file:
            return train_mnist.Config(**json.loads(file.readline())["config"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(
            f"--checkpoint must be a file that train_mnist.py has written; got {checkpoint}: {error}."
        ) from None


def trained(options: argparse.Namespace):
    """Model, state and the digits to test with."""
    if options.checkpoint is None:
        given = {"epochs": options.epochs, "seed": options.seed}
        settings = [f"--{name}={value}" for name, value in given.items() if value is not None]
        config, *_ = train_mnist.parse(["--rows", *settings])
        checkpoint, resume = options.out / "checkpoint.eqx", bool(options.resume)
    else:
        config = config_of(options.checkpoint)
        checkpoint, resume = options.checkpoint, True
    data = train_mnist.load_mnist(config)
    model, state, _ = train_mnist.train(config, data, checkpoint, resume)
    images, labels = data[1]
    return model, state, train_mnist.to_sequences(images, config), labels


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    model, state, x, labels = trained(options)
    path, recorded = options.out / "digits.stablehlo", options.out / "recorded.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(exported(model, state, x[0, 0]).serialize())
    some = x[::50]  # two of each digit
    np.savez(recorded, samples=some, answers=record(model, state, some))

    file = run_exported.StreamFile(path)
    answers, _ = file(x, file.start(len(x)))
    accuracy = float(np.mean(answers[:, -1].argmax(-1) == labels))
    table = latencies(model, state, file, options.calls)
    draw(options.out / "latency.png", table)

    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {accuracy:.1%} of the test digits right")
    print("streams  chunk  file, us  discretax.live, us")
    for (batch_size, time), row in table.items():
        print(f"{batch_size:7}  {time:5}  {row['file']:8.0f}  {row['live']:18.0f}")
    print("in a process of its own, without this library:", flush=True)
    reader = [sys.executable, run_exported.__file__, path, "--recorded", recorded]
    subprocess.run(reader, check=True)
    return {"accuracy": accuracy, "latencies": table, "size": path.stat().st_size}


if __name__ == "__main__":
    main()
