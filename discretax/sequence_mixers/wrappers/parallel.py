from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from discretax._features import check_instance
from discretax._types import Length, Resets, Sample, Timesteps, Values
from discretax.ops._running.split_time import split_time
from discretax.sequence_mixers.base import AbstractSequenceMixer, check_call

Model = TypeVar("Model", bound=PyTree)


def sequence_parallel(model: Model, mesh: Mesh, *, axis_name: str = "seq") -> Model:
    """The model with its sequence mixers running on sequences split along time over devices.

    Parameters, state, outputs and gradients are those of the model itself, to rounding. Give it
    whole arrays, as ever, inside `jax.jit`; each device then computes its part of the samples.
    Wrap where the model is called, so that what is trained and saved stays the model.

    !!! example

        ```python
        @eqx.filter_jit
        @eqx.filter_value_and_grad
        def loss(model, x, targets):
            split = sequence_parallel(model, mesh)
            y, _ = jax.vmap(split, in_axes=(0, None), out_axes=(0, None))(x, state)
            return jnp.mean((y - targets) ** 2)
        ```

    **Arguments:**

    - `model`: any PyTree of models.
    - `mesh`: of devices, one of its axes for time.
    - `axis_name`: the name of that axis.

    **Raises:** `ValueError` if there is no sequence mixer in the model, for one that cannot run part
    by part, and for a mesh without the axis.
    """
    is_mixer = lambda node: isinstance(node, AbstractSequenceMixer)
    if not any(map(is_mixer, jax.tree.leaves(model, is_leaf=is_mixer))):
        raise ValueError(
            "There is nothing to split: expected a model with a sequence mixer in it; got "
            f"{type(model).__name__}."
        )
    split = lambda node: SequenceParallel(node, mesh, axis_name) if is_mixer(node) else node
    return jax.tree.map(split, model, is_leaf=is_mixer)


class SequenceParallel(AbstractSequenceMixer[Any]):
    """A mixer whose sequences are split along time over the devices of one axis of a mesh.

    Usually made for a whole model at once, by [`discretax.sequence_mixers.sequence_parallel`][].
    Each device mixes its part of the samples from the state that the parts before it leave. What
    devices send each other are states, and the rows that short convolutions see: its amount does
    not depend on the number of samples.

    The other axes of the mesh are left to the compiler. A step is the mixer's own.

    !!! example

        ```python
        mesh = discretax.sharding.make_mesh(seq=jax.device_count())
        mixer = SequenceParallel(LRUSequenceMixer(64, key=key), mesh)
        y, cache = eqx.filter_jit(mixer)(x)  # x, y: (time, 64), of which each device holds a part
        ```
    """

    mixer: AbstractSequenceMixer
    mesh: Mesh = eqx.field(static=True)
    axis_name: str = eqx.field(static=True)
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, mixer: AbstractSequenceMixer, mesh: Mesh, axis_name: str = "seq"):
        """**Arguments:** `mixer`, causal and made of the operations of [`discretax.ops`][]; `mesh`,
        whose axes are of `AxisType.Auto`; `axis_name`, the axis of the mesh that time is split over.

        **Raises:** `ValueError` for a mixer that needs the future, or a mesh that does not fit;
        `TypeError` for what is no mixer.
        """
        check_instance("mixer", mixer, AbstractSequenceMixer)
        if axis_name not in mesh.shape or set(mesh.axis_types) != {AxisType.Auto}:
            raise ValueError(
                f"`mesh` must have an axis {axis_name!r}, and all of type Auto; got {mesh}. Make it "
                "with `discretax.sharding.make_mesh(seq=...)`."
            )
        try:
            mixer.allocate_inference_cache()
        except ValueError as error:
            raise ValueError(
                f"`{type(mixer).__name__}` cannot be split along time: it has no state to hand from "
                "one part to the next. Split the batch alone, or take a causal mixer."
            ) from error
        self.mixer = mixer
        self.mesh = mesh
        self.axis_name = axis_name
        self.in_features = mixer.in_features

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def __call__(
        self,
        x: Values,
        cache: Any = None,
        *,
        integration_timesteps: Timesteps | None = None,
        length: Length | None = None,
        resets: Resets | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Values, Any]:
        """As the mixer's own call; its `key` is the same on every device.

        **Raises:** `ValueError` if the number of samples is not a multiple of that of the devices,
        or if the mixer keeps more than its operations hand from one device to the next.
        """
        if cache is None:
            cache = self.allocate_inference_cache(max_seqlen=max(1, x.shape[0]))
        # Whether the cache fits, and how long it may be, is for the mixer to say.
        x, cache, timesteps = check_call(
            self.mixer, x, cache, cache, integration_timesteps, length, resets
        )
        parts = self.mesh.shape[self.axis_name]
        part_size, rest = divmod(x.shape[0], parts)
        if rest:
            raise ValueError(
                f"the number of samples must be a multiple of the {parts} devices of the axis "
                f"{self.axis_name!r}; got {x.shape[0]}. Pad the sequence and give its `length`."
            )
        if part_size == 0:
            return x, cache
        last_part = parts - 1
        if length is not None:
            length = jnp.asarray(length).astype(int)
            last_part = jnp.clip((length - 1) // part_size, 0, parts - 1)

        with jax.disable_jit(False):
            y, after = _in_parts(
                self, jnp.arange(parts), (x, timesteps, resets), cache, length, key
            )
        return y, jax.tree.map(lambda array: array[last_part], after)

    def step(
        self, x: Sample, cache: Any, *, integration_timestep: Any | None = None
    ) -> tuple[Sample, Any]:
        return self.mixer.step(x, cache, integration_timestep=integration_timestep)


# Uncompiled, JAX leaves no axis of a mesh to the compiler.
@eqx.filter_jit
def _in_parts(parallel: SequenceParallel, indices, samples, cache, length, key):
    arrays, static = eqx.partition(parallel.mixer, eqx.is_array)
    parts, axis_name = indices.shape[0], parallel.axis_name
    part_size = samples[0].shape[0] // parts

    def mix_part(index, samples, whole):
        x, timesteps, resets = samples
        arrays, cache, length, key = whole
        index = index[0]
        if length is not None:
            length = jnp.clip(length - index * part_size, 0, part_size)
        mixer = eqx.combine(arrays, static)
        with split_time(axis_name, index, parts) as split:
            y, after = mixer(
                x, cache, integration_timesteps=timesteps, length=length, resets=resets, key=key
            )
        carried = sum(array.size > 0 for array in jax.tree.leaves(cache))
        if split.handed_over < carried:
            raise ValueError(
                f"`{type(mixer).__name__}` cannot be split along time: of the "
                f"{carried} arrays of its cache, {split.handed_over} are "
                "handed from device to device. Mixers of recurrences do that by the operations "
                "of `discretax.ops`."
            )
        return y, jax.tree.map(lambda array: array[None], after)

    over_time, everywhere = PartitionSpec(axis_name), PartitionSpec()
    return jax.shard_map(
        mix_part,
        mesh=parallel.mesh,
        in_specs=(over_time, over_time, everywhere),
        out_specs=over_time,
        axis_names={axis_name},
        check_vma=False,
    )(indices, samples, (arrays, cache, length, key))
