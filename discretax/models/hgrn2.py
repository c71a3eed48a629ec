from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._constructors import keyed
from discretax._features import size_of_head
from discretax.blocks import AbstractBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.blocks.base import Samples
from discretax.models._backbone import (
    AbstractBackbone,
    BlockStack,
    directed,
    residual_blocks,
    swiglu,
)
from discretax.models._deep import DeepBackbone
from discretax.sequence_mixers import Bidirectional, HGRN2SequenceMixer


class HGRN2(eqx.nn.StatefulLayer):
    r"""Blocks of HGRN2 and a gated MLP, each forgetting less than the one before (arXiv:2404.07904).

    Of $L$ blocks, the $l$-th has forget gates of at least

    $$b_l = \sum_{j=2}^{l} \mathrm{softmax}(\Gamma)_j, \qquad \Gamma \in \mathbb{R}^{L \times
    \mathrm{heads} \times \mathrm{key}},$$

    the softmax being over the blocks: nothing in the first, $(l - 1) / L$ in the $l$-th to begin
    with, as $\Gamma$, the `lower_bounds`, starts at zero and is trained.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(HGRN2)(
            hidden_dim=64, num_heads=2, key=key
        )
        y, state = eqx.nn.inference_mode(model)(x, state)  # x, y: (time, 64)
        ```
    """

    backbone: AbstractBackbone | DeepBackbone
    lower_bounds: Float[Array, "num_blocks heads key"]

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("lower_bounds",)

    @keyed
    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        hidden_dim: int,
        num_blocks: int = 4,
        num_heads: int = 4,
        head_dim: int | None = None,
        value_dim: int | None = None,
        norm_eps: float = 1e-5,
        hidden_ratio: float = 4.0,
        intermediate_dim: int | None = None,
        use_bias: bool = False,
        drop_rate: float = 0.0,
        prenorm: bool = True,
        norm: Norm = "rms",
        channel_mixer: ChannelMixerMaker | None = None,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `num_heads`, `head_dim`, `value_dim`, `norm_eps`: as in
            [`discretax.sequence_mixers.HGRN2SequenceMixer`][].
        - `hidden_ratio`, `use_bias`: of the gated MLP, a [`discretax.channel_mixers.SwiGLU`][].
        - `intermediate_dim`: the width of the MLP, instead of that which `hidden_ratio` gives.
        - `drop_rate`, `prenorm`, `norm`: as in [`discretax.blocks.ResidualBlock`][].
        - `channel_mixer`, `bidirectional`: as in [`discretax.models.Backbone`][]; the MLP if left out.
        """
        mixer = directed(
            bidirectional,
            HGRN2SequenceMixer,
            num_heads=num_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            norm_eps=norm_eps,
        )
        mlp = swiglu(type(self), channel_mixer, hidden_ratio, intermediate_dim, use_bias)
        blocks = residual_blocks(
            key, hidden_dim, num_blocks, (mixer,), mlp, drop_rate, prenorm, norm
        )
        key_dim = size_of_head("head_dim", head_dim, hidden_dim, num_heads)
        self.backbone = BlockStack(blocks)
        self.lower_bounds = jnp.zeros((len(blocks), num_heads, key_dim))

    @property
    def blocks(self) -> tuple[AbstractBlock, ...]:
        return self.backbone.blocks

    def __call__(
        self, x: Samples, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        """As [`discretax.models.AbstractBackbone`][] has it."""
        backbone = eqx.tree_at(
            lambda backbone: [
                mixer.lower_bound for block in backbone.blocks for mixer in _of_each_way(block)
            ],
            self.backbone,
            [
                bound
                for block, bound in zip(self.blocks, self.bounds(), strict=True)
                for _ in _of_each_way(block)
            ],
        )
        return backbone(x, state, key)

    def bounds(self) -> Float[Array, "num_blocks heads key"]:
        """The least that the forget gates of each block leave: $b$."""
        shares = jax.nn.softmax(self.lower_bounds, axis=0).at[0].set(0)
        return jnp.cumsum(shares, axis=0)


def _of_each_way(block: AbstractBlock) -> tuple[Any, ...]:
    mixer = block.sequence_mixer
    return (mixer.forward, mixer.backward) if isinstance(mixer, Bidirectional) else (mixer,)
