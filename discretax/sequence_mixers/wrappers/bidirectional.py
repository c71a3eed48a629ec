from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, overload

import equinox as eqx
import jax.random as jr
from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import check_key
from discretax._features import check_instance, check_maker, check_size, described, made
from discretax._timeseries import check_length, check_resets, check_timesteps, mirrored
from discretax._types import Length, Resets, Timesteps, Values
from discretax.sequence_mixers.base import AbstractSequenceMixer, refuse_to_stream


class Bidirectional(AbstractSequenceMixer[None]):
    r"""Two mixers, one in each direction: $y = f(x) + \mathrm{reverse}(g(\mathrm{reverse}(x)))$.

    The backward pass begins at the last valid sample, crosses each gap between two samples once,
    and stops at the same boundaries as the forward pass. It needs the future: there is nothing to
    stream, no cache and no step.

    !!! example

        ```python
        forward = functools.partial(LRUSequenceMixer, state_dim=32)
        mixer = Bidirectional(64, forward=forward, key=key)
        y, _ = mixer(x, length=length)  # x, y: (time, 64); there is no cache
        ```
    """

    forward: AbstractSequenceMixer
    backward: AbstractSequenceMixer
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @overload
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        forward: Callable[..., AbstractSequenceMixer],
        backward: Callable[..., AbstractSequenceMixer] | None = None,
    ): ...
    @overload
    def __init__(self, forward: AbstractSequenceMixer, backward: AbstractSequenceMixer): ...
    def __init__(  # pyright: ignore[reportInconsistentOverload]
        self, in_features: Any = None, key: Any = None, *, forward: Any = None, backward: Any = None
    ):
        """`Bidirectional(in_features, forward=LRUSequenceMixer, key=key)`.

        **Arguments:**

        - `in_features`: width of the input.
        - `key`: for the initialisation.
        - `forward`: the class of a mixer, or a function `(in_features, *, key)` that makes one:
            `functools.partial(LRUSequenceMixer, state_dim=64)`.
        - `backward`: another such; `forward` again, with a key of its own, if left out.

        Two mixers of one width that are made, with two keys, may be given instead:
        `Bidirectional(forward, backward)`.

        **Raises:** `ValueError` if their widths differ, or if the two are one; `TypeError` for what
        is no mixer, or makes none.
        """
        if in_features is not None and not hasattr(type(in_features), "__index__"):
            if forward is not None or (key is None) == (backward is None):
                raise TypeError(
                    "`Bidirectional` takes a width and what makes its mixers, "
                    "`Bidirectional(in_features, forward=LRUSequenceMixer, key=key)`, or two mixers "
                    "that are made, `Bidirectional(forward, backward)`; got others beside them, or "
                    f"one alone, of which the first was {described(in_features)}."
                )
            forward, backward = in_features, (backward if key is None else key)
        elif in_features is not None or key is not None:
            in_features = check_size("in_features", in_features)
            check_key(key, "`key` of `Bidirectional`")
            makers = {"forward": forward, "backward": forward if backward is None else backward}
            for argument, maker in makers.items():
                check_maker(argument, maker, AbstractSequenceMixer)
            forward, backward = (
                made(argument, maker, AbstractSequenceMixer, in_features, key=mixer_key)
                for (argument, maker), mixer_key in zip(
                    makers.items(), draw.split(key), strict=True
                )
            )
            if forward.in_features != in_features:
                raise ValueError(
                    f"`forward` must make a mixer of width in_features = {in_features}; got "
                    f"{type(forward).__name__} of width {forward.in_features}."
                )
        check_instance("forward", forward, AbstractSequenceMixer)
        check_instance("backward", backward, AbstractSequenceMixer)
        if forward is backward:
            raise ValueError(
                "`forward` and `backward` must be two mixers; got one for both, whose parameters "
                "training would part. Make two, with two keys."
            )
        if forward.in_features != backward.in_features:
            raise ValueError(
                "`forward` and `backward` must have the same `in_features`; got "
                f"{forward.in_features} and {backward.in_features}."
            )
        self.forward = forward
        self.backward = backward
        self.in_features = forward.in_features

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> NoReturn:
        refuse_to_stream(self)

    def __call__(
        self,
        x: Values,
        cache: None = None,
        *,
        integration_timesteps: Timesteps | None = None,
        length: Length | None = None,
        resets: Resets | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Values, None]:
        if cache is not None:
            refuse_to_stream(self)
        time = x.shape[0]
        check_length(length, time)
        check_timesteps(integration_timesteps, time, length)
        check_resets(resets, time)
        forward_key, backward_key = (None, None) if key is None else jr.split(key)
        y_forward, _ = self.forward(
            x,
            integration_timesteps=integration_timesteps,
            length=length,
            resets=resets,
            key=forward_key,
        )
        mirror, resets, timesteps = mirrored(time, length, resets, integration_timesteps)
        y_backward, _ = self.backward(
            x[mirror],
            integration_timesteps=timesteps,
            length=length,
            resets=resets,
            key=backward_key,
        )
        return y_forward + y_backward[mirror], None

    def step(self, x: Any, cache: Any, *, integration_timestep: Any | None = None) -> NoReturn:
        refuse_to_stream(self)
