from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_size
from discretax.blocks import RWKV7Block
from discretax.models._backbone import AbstractBackbone


class RWKV7(AbstractBackbone):
    """RWKV-7 "Goose", with the initial values of its authors' code (arXiv:2503.14456).

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(RWKV7)(
            hidden_dim=64, head_dim=32, key=key
        )
        y, state = eqx.nn.inference_mode(model)(x, state)  # x, y: (time, 64)
        ```
    """

    blocks: tuple[RWKV7Block, ...]

    @keyed
    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        hidden_dim: int,
        num_blocks: int = 4,
        head_dim: int = 64,
        decay_rank: int | None = None,
        strength_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        intermediate_dim: int | None = None,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        head_norm_eps: float = 64e-5,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `head_dim`, `decay_rank`, `strength_rank`, `value_rank`, `gate_rank`,
            `intermediate_dim`, `drop_rate`, `norm_eps`, `head_norm_eps`: as in
            [`discretax.blocks.RWKV7Block`][].
        """
        num_blocks = check_size("num_blocks", num_blocks)
        self.blocks = tuple(
            RWKV7Block(
                hidden_dim,
                block_key,
                layer=layer,
                num_layers=num_blocks,
                head_dim=head_dim,
                decay_rank=decay_rank,
                strength_rank=strength_rank,
                value_rank=value_rank,
                gate_rank=gate_rank,
                intermediate_dim=intermediate_dim,
                drop_rate=drop_rate,
                norm_eps=norm_eps,
                head_norm_eps=head_norm_eps,
            )
            for layer, block_key in enumerate(draw.split(key, num_blocks))
        )
