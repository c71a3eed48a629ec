"""Models: stacks of blocks, to be put between an encoder and a head by `discretax.Sequential`."""

from discretax.models._backbone import (
    AbstractBackbone as AbstractBackbone,
    Backbone as Backbone,
    BlockStack as BlockStack,
)
from discretax.models._deep import (
    DeepBackbone as DeepBackbone,
    remat_blocks as remat_blocks,
    scan_blocks as scan_blocks,
)
from discretax.models.centaurus import Centaurus as Centaurus
from discretax.models.delta_net import DeltaNet as DeltaNet
from discretax.models.gated_delta_net import GatedDeltaNet as GatedDeltaNet
from discretax.models.gla import GLA as GLA
from discretax.models.griffin import Griffin as Griffin
from discretax.models.hgrn2 import HGRN2 as HGRN2
from discretax.models.kimi_delta_attention import KimiDeltaAttention as KimiDeltaAttention
from discretax.models.linoss import LinOSS as LinOSS
from discretax.models.lru import LRU as LRU
from discretax.models.mamba import Mamba as Mamba
from discretax.models.mamba2 import Mamba2 as Mamba2
from discretax.models.mamba3 import Mamba3 as Mamba3
from discretax.models.retnet import RetNet as RetNet
from discretax.models.rglru import RGLRU as RGLRU
from discretax.models.rwkv7 import RWKV7 as RWKV7
from discretax.models.s4 import S4 as S4
from discretax.models.s4d import S4D as S4D
from discretax.models.s5 import S5 as S5
from discretax.models.s7 import S7 as S7
from discretax.models.xlstm import XLSTM as XLSTM
