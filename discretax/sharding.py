"""Training on more than one device: where parameters, optimiser state and batches lie.

A mesh names the devices' axes: `"data"`, over which the batch and the stored parameters are split,
`"seq"`, over which time is, and `"model"`, over which wide projections are. JAX's compiler derives
from the places of a step's inputs what each device computes and sends.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from discretax._features import check_size

Rules = Sequence[tuple[str, PartitionSpec]]

# Projections to a wider space are split along their outputs, those back along their inputs: between
# them every device keeps its own part of the wide space, states included. Not those of Mamba: its B
# and C are shared by all features, and have to be summed over "model".
_WIDE = {
    r"\b((gate|up|q|k|v)_proj|linear_[xy]|w[12])\.weight$": 0,
    r"\bB(_re|_im)?$": 0,
    r"\b((down)_proj|linear_out)\.weight$": 1,
    r"\bC(_re|_im)?$": 1,
}
# Read at every sample of a recurrence: split over the data, they would be sent at every sample.
_TRANSITION = r"\b(A_\w+|Lambda\w*|\w+_log|log_\w+)$"


def make_mesh(
    *,
    data: int | None = None,
    seq: int = 1,
    model: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of the axes `"data"`, `"seq"` and `"model"`, whose use the compiler works out.

    Devices that are neighbours in `model` are those that are nearest to each other.

    **Arguments:**

    - `data`: number of parts of the batch; as many as the devices allow if left out.
    - `seq`: number of parts of time.
    - `model`: number of parts of wide projections.
    - `devices`: all there are, of all processes, if left out.

    **Raises:** `ValueError` if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    seq = check_size("seq", seq)
    model = check_size("model", model)
    if data is None:
        data = max(len(devices) // (seq * model), 1)
    data = check_size("data", data)
    if data * seq * model != len(devices):
        raise ValueError(
            "data * seq * model must be the number of devices; got "
            f"{data} * {seq} * {model} = {data * seq * model} for {len(devices)}. Pass "
            "`devices=jax.devices()[:n]` to use some of them."
        )
    names = ("data", "seq", "model")
    return jax.make_mesh(
        (data, seq, model), names, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def parameter_sharding(
    mesh: Mesh, rules: Rules = (), *, min_size: int = 2**14
) -> Callable[[str, jax.ShapeDtypeStruct | Array], NamedSharding]:
    r"""A function of a parameter's path and shape that says how it is split.

    The first rule whose regular expression is found in the path decides, to the letter. A
    parameter without a rule is

    - whole on every device if it has fewer than `min_size` numbers;
    - split over `"model"` if it is one of the library's wide projections and its size divides:
        along the outputs of those that widen, along the inputs of those that narrow again;
    - split over `"data"` along its largest axis that is left and divides: fully sharded data
        parallelism, FSDP.

    [`discretax.pretrained.load`][] takes it as `sharding`, so that each tensor goes straight to its
    place. Paths are then the tensors' names in the file.

    !!! example

        ```python
        rules = [
            (r"embedding\.weight$", PartitionSpec("model", None)),
            (r"\bA_log$", PartitionSpec()),  # whole on every device
        ]
        model, state = pretrained.load(folder, sharding=parameter_sharding(mesh, rules))
        ```

    **Arguments:**

    - `mesh`: with an axis `"data"`, and a `"model"` or not: [`discretax.sharding.make_mesh`][].
    - `rules`: pairs of a regular expression and the split of each of the parameter's axes. Paths
        read as in Python: `.blocks[0].channel_mixer.w1.weight`.
    - `min_size`: parameters with fewer numbers stay whole: to send them costs more than to hold
        them.

    **Raises:** `ValueError` for a rule that names an axis that the mesh lacks; the function raises it
    for a rule that does not fit a parameter.
    """
    for pattern, spec in rules:
        for name in _names(spec):
            if name not in mesh.shape:
                raise ValueError(
                    f"the rule for {pattern!r} splits over {name!r}; the mesh has the axes "
                    f"{', '.join(map(repr, mesh.shape))}."
                )

    def sharding(path: str, leaf: jax.ShapeDtypeStruct | Array) -> NamedSharding:
        for pattern, spec in rules:
            if re.search(pattern, path):
                _check_fit(path, leaf.shape, spec, mesh)
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _default_spec(path, leaf.shape, mesh, min_size))

    return sharding


def shard_model(tree: PyTree, mesh: Mesh, rules: Rules = (), *, min_size: int = 2**14) -> PyTree:
    """Places parameters and optimiser state on the mesh, as [`discretax.sharding.parameter_sharding`][] says.

    An optimiser's moments lie where their parameters do, because the rules see the end of the path
    alone. States, the running statistics of batch norm, are whole on every device. Leaves that are
    no arrays stay as they are.

    Works inside `jax.jit` too: at the end of a training step it keeps everything in its place, and
    around a model's making no device ever holds the whole.

    !!! example

        ```python
        model, state, opt_state = shard_model((model, state, opt_state), mesh)
        ```

    **Arguments:** `tree`: models, states and optimiser states, in any PyTree; `mesh`, `rules` and
    `min_size` as in [`discretax.sharding.parameter_sharding`][].

    **Raises:** `ValueError` as there.
    """
    return _place(tree, mesh, parameter_sharding(mesh, rules, min_size=min_size))


def gather_model(tree: PyTree, mesh: Mesh, rules: Rules = (), *, min_size: int = 2**14) -> PyTree:
    """Inside the loss: parameters as the layers use them, whole over `"data"`, split over `"model"`.

    Each is gathered from all devices, and held until the backward pass has used it. Its gradient is
    summed over all, and each device keeps its part. Without this the compiler may send activations
    around instead.

    !!! example

        ```python
        def loss_fn(model, state):
            model = gather_model(model, mesh)
            ...
        ```

    **Arguments:** as those of [`discretax.sharding.shard_model`][].

    **Raises:** `ValueError` as there.
    """
    stored = parameter_sharding(mesh, rules, min_size=min_size)

    def used(path, leaf):
        kept = [
            tuple(n for n in names if n != "data") for names in _entries(stored(path, leaf).spec)
        ]
        return NamedSharding(mesh, PartitionSpec(*(names or None for names in kept)))

    return _place(tree, mesh, used)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Splits the first axis of every array over `"data"`.

    With several processes, each gives the part of the batch that it has loaded, and the whole is
    those of all processes one after the other.

    **Arguments:** `batch`: arrays with an axis of the batch first, in any PyTree; `mesh`.

    **Raises:** `ValueError` for an array without axes, or a batch that does not divide.
    """
    parts, processes = mesh.shape["data"], jax.process_count()

    def place(path, leaf):
        if not hasattr(leaf, "shape"):
            return leaf
        size = leaf.shape[0] * processes if leaf.shape else 0
        if not leaf.shape or size % parts:
            raise ValueError(
                f"the batch must divide over the mesh's axis 'data' of size {parts}; got shape "
                f"{leaf.shape} at {jax.tree_util.keystr(path) or 'its root'}, from {processes} "
                "process(es). Change the batch size, or make the axis smaller."
            )
        return jax.make_array_from_process_local_data(
            NamedSharding(mesh, PartitionSpec("data")), leaf
        )

    return jax.tree_util.tree_map_with_path(place, batch)


def _place(tree: PyTree, mesh: Mesh, sharding: Callable[[str, Array], NamedSharding]) -> PyTree:
    whole = NamedSharding(mesh, PartitionSpec())
    is_state = lambda node: isinstance(node, eqx.nn.State | eqx.nn.StateIndex)

    def place(path, node):
        if is_state(node):
            return eqx.filter_shard(node, whole)
        if not eqx.is_array(node):
            return node
        return eqx.filter_shard(node, sharding(jax.tree_util.keystr(path), node))

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_state)


def _default_spec(path: str, shape: tuple[int, ...], mesh: Mesh, min_size: int) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) >= min_size:
        wide = [axis for pattern, axis in _WIDE.items() if re.search(pattern, path)]
        largest = sorted(range(len(shape)), key=lambda axis: -shape[axis])
        largest = [] if re.search(_TRANSITION, path) else largest
        for name, candidates in (("model", wide), ("data", largest)):
            parts = mesh.shape.get(name, 1)
            fit = [i for i in candidates if axes[i] is None and shape[i] % parts == 0]
            if fit and parts > 1:
                axes[fit[0]] = name
    return PartitionSpec(*axes)


def _check_fit(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"the rule for {path} splits {len(spec)} axes, {spec}; it has shape {shape}. Put a rule "
            "of its own before it."
        )
    for axis, entry in enumerate(spec):
        names = _names(PartitionSpec(entry))
        parts = math.prod(mesh.shape[name] for name in names)
        if shape[axis] % parts:
            raise ValueError(
                f"axis {axis} of {path}, of size {shape[axis]}, does not divide over "
                f"{' and '.join(map(repr, names))} of size {parts}. Choose another axis, or put a "
                "rule of its own before it."
            )


def _names(spec: PartitionSpec) -> list[str]:
    return [name for names in _entries(spec) for name in names]


def _entries(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """For each axis, the mesh's axes over which it is split."""
    listed = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return [tuple(name for name in names if name is not None) for names in listed]
