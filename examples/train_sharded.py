"""Trains on one device or many, with the same losses: the script does not change, the mesh does.

    python examples/train_sharded.py                                # all devices there are
    python examples/train_sharded.py --devices 8 --model 2          # the CPU as 4 x 2 devices
    python examples/train_sharded.py --mixer mamba --devices 8 --seq 4     # sequences in four parts
    python examples/train_sharded.py --devices 8 --save runs/sharded --kill 25
    python examples/train_sharded.py --devices 2 --save runs/sharded    # goes on, on another mesh
    python examples/train_sharded.py --devices 8 --model 2 --out runs/mesh  # draws what lies where

On several machines every one runs the script, with its own number; on one machine, as a trial:

    python examples/train_sharded.py --devices 2 --processes 2 --process 0 &
    python examples/train_sharded.py --devices 2 --processes 2 --process 1

The model learns that a sequence repeats itself. Batches come from the number of the step, so that a
run that goes on sees what it would have seen.
"""

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import drawing
import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import discretax
from discretax.architectures import LanguageModel
from discretax.channel_mixers import SwiGLU
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    GriffinSequenceMixer,
    LRUSequenceMixer,
    MambaSequenceMixer,
    sequence_parallel,
)
from discretax.sharding import gather_model, make_mesh, shard_model

recurrent = partial(GriffinSequenceMixer, num_heads=2)
attention = partial(AttentionSequenceMixer, num_heads=2, window=32)
PATTERNS = {
    "griffin": (recurrent, recurrent, attention),
    "lru": (partial(LRUSequenceMixer, r_min=0.9, r_max=0.999),),
    "mamba": (MambaSequenceMixer,),
}
SPLIT_IN_TIME = ("lru", "mamba")


@dataclasses.dataclass(frozen=True)
class Config:
    hidden_dim: int = 64
    num_blocks: int = 3
    steps: int = 100
    batch_size: int = 16
    period: int = 12
    vocabulary: int = 32
    learning_rate: float = 3e-3
    min_size: int = 2**10  # this model is small: 2**14, the default, would leave most of it whole


def make_batch(config: Config, step: int) -> np.ndarray:
    """Three times what is drawn for each sequence, (batch, time)."""
    rng = np.random.default_rng(step)
    once = rng.integers(config.vocabulary, size=(config.batch_size, config.period))
    return np.tile(once, 3)


def place_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """Each device takes its own part: of the sequences, and of their time."""
    place = NamedSharding(mesh, PartitionSpec("data", "seq"))
    return jax.make_array_from_callback(batch.shape, place, lambda part: batch[part])


@eqx.nn.make_with_state
def make_model(name: str, config: Config, key: jax.Array):
    mlp = partial(SwiGLU, intermediate_dim=2 * config.hidden_dim)
    return LanguageModel(
        key,
        vocab_size=config.vocabulary,
        hidden_dim=config.hidden_dim,
        num_blocks=config.num_blocks,
        pattern=PATTERNS[name],
        channel_mixer=None if name == "mamba" else mlp,
    )


def make_optimiser(config: Config) -> optax.GradientTransformation:
    return discretax.optim.adamw_cosine(config.learning_rate, config.steps)


@eqx.filter_jit
def initialise(name: str, config: Config, mesh: Mesh, key: jax.Array):
    """Model, state and optimiser state, made in their places: no device holds the whole."""
    model, state = make_model(name, config, key)
    opt_state = make_optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    return shard_model((model, state, opt_state), mesh, min_size=config.min_size)


@eqx.filter_jit(donate="all-except-first")
def train_step(inputs: tuple[jax.Array, Config, Mesh], trained):
    tokens, config, mesh = inputs
    model, state, opt_state = trained

    def loss_fn(model, state):
        model = gather_model(model, mesh, min_size=config.min_size)
        if mesh.shape["seq"] > 1:
            model = sequence_parallel(model, mesh)
        losses, state = discretax.batched(model.loss)(tokens, state)
        return losses.total.sum() / losses.count.sum(), state

    (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = make_optimiser(config).update(grads, opt_state, params)
    trained = (eqx.apply_updates(model, updates), state, opt_state)
    return shard_model(trained, mesh, min_size=config.min_size), loss


def named_arrays(trained) -> dict[str, jax.Array]:
    leaves, _ = jax.tree.flatten_with_path(eqx.filter(trained, eqx.is_array))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def restore(manager: ocp.CheckpointManager, trained) -> tuple[Any, int]:
    """What was saved last, in the places where `trained` lies, and the number of steps done."""
    step = manager.latest_step()
    if step is None:
        return trained, 0
    arrays, static = eqx.partition(trained, eqx.is_array)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in named_arrays(trained).items()
    }
    saved = manager.restore(step, args=ocp.args.StandardRestore(like))
    arrays = jax.tree.unflatten(jax.tree.structure(arrays), [saved[name] for name in like])
    return eqx.combine(arrays, static), step


def train(options: dict, config: Config, mesh: Mesh) -> dict[int, float]:
    """The loss of every step that this run makes."""
    trained, done, losses = initialise(options["mixer"], config, mesh, jr.key(0)), 0, {}
    params = jax.tree.leaves(eqx.filter(trained[0], eqx.is_inexact_array))
    held = sum(leaf.addressable_shards[0].data.size for leaf in params)
    axes = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
    print(f"{axes}: {sum(leaf.size for leaf in params)} parameters, {held} on each device")
    manager = None
    if options["save"] is not None:
        each = ocp.CheckpointManagerOptions(save_interval_steps=options["every"], max_to_keep=2)
        manager = ocp.CheckpointManager(options["save"].resolve(), options=each)
        trained, done = restore(manager, trained)
    for step in range(done + 1, config.steps + 1):
        tokens = place_batch(make_batch(config, step), mesh)
        trained, loss = train_step((tokens, config, mesh), trained)
        losses[step] = float(loss)
        print(f"step {step} loss {losses[step]:.7f}", flush=True)
        if manager is not None:
            manager.save(step, args=ocp.args.StandardSave(named_arrays(trained)))
        if step == options["kill"]:
            os._exit(1)
    if manager is not None:
        manager.close()
    return losses


def draw(path: Path, mesh: Mesh, options: dict, config: Config, losses, alone) -> None:
    """Which devices hold which part of an array; the losses, and those of one device."""
    model, *_ = initialise(options["mixer"], config, mesh, jr.key(0))
    arrays = {"a batch": place_batch(make_batch(config, 0), mesh)}
    for name, leaf in reversed(named_arrays(model).items()):
        same = (leaf.sharding.is_equivalent_to(a.sharding, leaf.ndim) for a in arrays.values())
        if leaf.ndim < 3 and not any(same):
            arrays[".".join(name.split(".")[-2:])] = leaf
    arrays = dict(list(arrays.items())[:4])
    figure = Figure(figsize=(drawing.WIDTH, 4.6))
    top, bottom = figure.subfigures(2, 1, squeeze=False, hspace=0.05).flat
    top.suptitle("the numbers of the devices that hold each part")
    panels = top.subplots(1, len(arrays), squeeze=False).flat
    for axes, (name, array) in zip(panels, arrays.items(), strict=True):
        draw_parts(axes, array)
        axes.set_title(f"{name}\n{' x '.join(map(str, array.shape))}", size="small")
    axes = bottom.subplots()
    sizes = " x ".join(f"{size} {name}" for name, size in mesh.shape.items() if size > 1)
    steps = list(losses)
    split, whole = (np.array([run[step] for step in steps]) for run in (losses, alone))
    apart = np.abs(split - whole).max()
    axes.plot(steps, whole, color=drawing.COLORS[1], linewidth=5, alpha=0.4, label="one device")
    axes.plot(steps, split, color=drawing.COLORS[0], label=f"{mesh.size} devices: {sizes}")
    axes.set(title=f"losses, at most {apart:.1e} apart", xlabel="step")
    axes.legend(frameon=False)
    drawing.save(figure, path)


def draw_parts(axes: Axes, array: jax.Array) -> None:
    holders: dict[tuple, list[int]] = {}
    height, width = (1, *array.shape)[-2:]
    for device, part in array.sharding.devices_indices_map(array.shape).items():
        down, across = (slice(None), *part)[-2:]
        corners = (*down.indices(height)[:2], *across.indices(width)[:2])
        holders.setdefault(corners, []).append(device.id)
    for (upper, lower, left, right), devices in holders.items():
        color = drawing.COLORS[devices[0] % len(drawing.COLORS)]
        size = right - left, lower - upper
        axes.add_patch(Rectangle((left, upper), *size, color=color, alpha=0.25, linewidth=0))
        middle = (left + right) / 2, (upper + lower) / 2
        axes.text(*middle, "\n".join(map(str, devices)), ha="center", va="center", size="small")
    axes.set(xlim=(0, width), ylim=(height, 0), box_aspect=1)
    axes.axis("off")


def rules(config: Config, given: dict):
    counts = ("seq", "model", "every", "processes")
    yield from arguments.above_zero(given, (*dataclasses.asdict(config), *counts))
    split, mixer, time = given["seq"] > 1, given["mixer"], 3 * config.period
    able = " and ".join(SPLIT_IN_TIME)
    rule = f"1 for {mixer}: attention cannot be split in time yet, {able} can"
    yield "seq", not split or mixer in SPLIT_IN_TIME, rule
    rule = f"a divisor of the {time} samples of a sequence"
    yield "seq", not split or time % given["seq"] == 0, rule
    one = given["out"] is None or given["processes"] == 1
    yield "processes", one, "1 with --out, whose figure compares with one device"
    own = 0 <= given["process"] < given["processes"]
    yield "process", own, f"below --processes, {given['processes']}"


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--mixer", choices=tuple(PATTERNS), default="griffin")
    add("--devices", type=int, help="make so many of the CPU, in each process")
    add("--seq", type=int, default=1, help="how many devices share a sequence")
    add("--model", type=int, default=1, help="how many devices share a projection")
    add("--save", type=Path, help="folder for checkpoints; a run that finds one there goes on")
    add("--every", type=int, default=10, help="steps between two checkpoints")
    add("--kill", type=int, help="end the process after this step, as a power cut would")
    add("--out", type=Path, help="folder for a figure; trains on one device too, to compare")
    add("--processes", type=int, default=1)
    add("--process", type=int, default=0, help="number of this process")
    add("--coordinator", default="127.0.0.1:9911", help="address of process 0")
    return arguments.parse(parser, argv, Config, rules)


def main(argv: list[str] | None = None) -> dict[int, float]:
    options, config = parse(argv)
    if options["devices"] is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options["devices"])
    if options["processes"] > 1:
        jax.distributed.initialize(options["coordinator"], options["processes"], options["process"])
    mesh = make_mesh(seq=options["seq"], model=options["model"])
    losses = train(options, config, mesh)
    if options["out"] is not None:
        figure = options["out"] / "mesh.png"
        unsaved = options | {"save": None, "kill": None}
        alone = train(unsaved, config, make_mesh(devices=jax.devices()[:1]))
        draw(figure, mesh, options, config, losses, alone)
        print(f"figure {figure}")
    return losses


if __name__ == "__main__":
    main()
