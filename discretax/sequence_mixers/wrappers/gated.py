import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import sample_by_sample
from discretax._constructors import keyed
from discretax._features import (
    check_function,
    check_samples,
    check_size,
    divided,
    linear,
    made,
    out_features,
)
from discretax._timeseries import check_length, zero_padding
from discretax._types import Length, Resets, Sample, Timesteps, Values
from discretax.sequence_mixers.base import AbstractSequenceMixer, check_sample


def exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class GatedSequenceMixer(AbstractSequenceMixer[Any]):
    r"""A mixer in a narrower space, a gate beside it, or both: the block options of S4 and GSS.

    $$y = W_y\, \phi(\mathrm{mixer}(W_u x + b_u)) + b_y, \qquad v = \psi(W_v x + b_v), \qquad
    \text{output } y \odot v$$

    with $\phi$ the `activation` and $\psi$ the `gate_activation`. Without `bottleneck` the mixer
    sees $x$ itself; without `gate` there is neither $v$ nor $W_y$. Where the mixer's output is as
    wide as the gate, $W_y$ is left out too, as in the original code.

    All maps but the mixer's own are of one sample at a time: cache, timesteps, length and resets
    are the mixer's, and this one streams if that one does. In a [`discretax.blocks.StandardBlock`][]
    give `activation=None` to the block, whose activation comes after the product
    (`mult_act` of the original), and a channel mixer such as `GLU` leads back to the block's width.

    In the original code's latest version these options stop with an error: the widths of a
    bottleneck's maps do not fit, and a gate asks for the inner layer before it is made. The order
    of operations is the one written there, the widths are those of the paper.

    !!! example

        ```python
        small = functools.partial(S4DSequenceMixer, state_dim=32)
        mixer = GatedSequenceMixer(64, sequence_mixer=small, bottleneck=4, gate=2, key=key)
        y, cache = mixer(x)  # x: (time, 64), y: (time, 128)
        ```

    ??? cite

        Mehta, Gupta, Cutkosky and Neyshabur, Long Range Language Modeling via Gated State Spaces,
        ICLR 2023 (arXiv:2206.13947).
    """

    sequence_mixer: AbstractSequenceMixer
    input_linear: eqx.nn.Linear | None
    input_gate: eqx.nn.Linear | None
    output_gate: eqx.nn.Linear | None
    in_features: int = eqx.field(static=True)
    activation: Callable[[Array], Array] | None = eqx.field(static=True)
    gate_activation: Callable[[Array], Array] | None = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        sequence_mixer: AbstractSequenceMixer | Callable[..., AbstractSequenceMixer],
        bottleneck: int | None = None,
        gate: int | None = None,
        activation: Callable[[Array], Array] | None = exact_gelu,
        gate_activation: Callable[[Array], Array] | None = None,
    ):
        """**Arguments:**

        - `in_features`: width of the input.
        - `key`: for the initialisation.
        - `sequence_mixer`: a mixer of width `in_features // bottleneck`, or a function
            `(in_features, *, key)` that makes one: `functools.partial(S4SequenceMixer, state_dim=8)`.
        - `bottleneck`: how many times narrower than the input the mixer is; None for no map to it.
        - `gate`: how many times wider than the input gate and output are; None for no gate.
        - `activation`: what the mixer's output goes through, exact GELU unless given; None for none.
        - `gate_activation`: what the gate goes through; None for none.

        **Raises:**

        `ValueError` if neither `bottleneck` nor `gate` is given, if one of them is below 1,
        if `bottleneck` does not divide `in_features`, or for a mixer of another width;
        `TypeError` for an activation that is no function.
        """
        in_features = check_size("in_features", in_features)
        if bottleneck is None and gate is None:
            raise ValueError(
                "`GatedSequenceMixer` takes `bottleneck`, `gate` or both; got neither. Use the "
                "sequence mixer itself."
            )
        bottleneck = None if bottleneck is None else check_size("bottleneck", bottleneck)
        gate = None if gate is None else check_size("gate", gate)
        check_function("activation", activation)
        check_function("gate_activation", gate_activation)
        width = divided("in_features", in_features, "bottleneck", bottleneck or 1)
        mixer_key, input_key, gate_key, output_key = draw.split(key, 4)
        sequence_mixer = made(
            "sequence_mixer", sequence_mixer, AbstractSequenceMixer, width, key=mixer_key
        )
        if sequence_mixer.in_features != width:
            raise ValueError(
                f"`sequence_mixer` must be of width in_features // bottleneck = {width}; got "
                f"{type(sequence_mixer).__name__} of width {sequence_mixer.in_features}."
            )
        self.sequence_mixer = sequence_mixer
        self.input_linear = self.input_gate = self.output_gate = None
        if bottleneck is not None:
            self.input_linear = draw.linear(in_features, width, key=input_key)
        if gate is not None:
            gated = gate * in_features
            mixed = out_features(sequence_mixer, width, key=mixer_key)
            self.input_gate = draw.linear(in_features, gated, key=gate_key)
            if mixed != gated:
                self.output_gate = draw.linear(mixed, gated, key=output_key)
        self.in_features = in_features
        self.activation = activation
        self.gate_activation = gate_activation

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Any:
        return self.sequence_mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)

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
        check_samples(self, x, self.in_features)
        check_length(length, x.shape[0])
        x = zero_padding(x, length)
        y, cache = self.sequence_mixer(
            self._narrowed(x),
            cache,
            integration_timesteps=integration_timesteps,
            length=length,
            resets=resets,
            key=key,
        )
        return self._gated(y, x), cache

    def step(
        self, x: Sample, cache: Any, *, integration_timestep: Any | None = None
    ) -> tuple[Sample, Any]:
        check_sample(self, x)
        y, cache = self.sequence_mixer.step(
            self._narrowed(x), cache, integration_timestep=integration_timestep
        )
        return self._gated(y, x), cache

    def _narrowed(self, x: Float[Array, "... features"]) -> Float[Array, "... inner"]:
        if self.input_linear is None:
            return x
        return sample_by_sample(ft.partial(linear, self.input_linear), x)

    def _gated(
        self, y: Float[Array, "... mixed"], x: Float[Array, "... features"]
    ) -> Float[Array, "... out"]:
        return sample_by_sample(self._gated_samples, y, x)

    def _gated_samples(self, y, x):
        if self.activation is not None:
            y = self.activation(y)
        if self.input_gate is None:
            return y
        if self.output_gate is not None:
            y = linear(self.output_gate, y)
        v = linear(self.input_gate, x)
        return y * (v if self.gate_activation is None else self.gate_activation(v))
