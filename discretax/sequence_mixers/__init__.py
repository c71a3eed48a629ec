"""Sequence mixers: pure functions of a sequence and a cache."""

from discretax.sequence_mixers import rotary_scaling as rotary_scaling
from discretax.sequence_mixers.attention import AttentionSequenceMixer as AttentionSequenceMixer
from discretax.sequence_mixers.base import (
    AbstractContinuousMixer as AbstractContinuousMixer,
    AbstractLTIMixer as AbstractLTIMixer,
    AbstractRecurrentMixer as AbstractRecurrentMixer,
    AbstractSequenceMixer as AbstractSequenceMixer,
    refuse_timesteps as refuse_timesteps,
    refuse_to_stream as refuse_to_stream,
    zero_cache as zero_cache,
)
from discretax.sequence_mixers.identity import IdentitySequenceMixer as IdentitySequenceMixer
from discretax.sequence_mixers.lti._depthwise_system import DepthwiseSystem as DepthwiseSystem
from discretax.sequence_mixers.lti._diagonal_system import DiagonalSystem as DiagonalSystem
from discretax.sequence_mixers.lti._oscillator_system import OscillatorSystem as OscillatorSystem
from discretax.sequence_mixers.lti.centaurus import (
    Centaurus as Centaurus,
    CentaurusDWS as CentaurusDWS,
    CentaurusFull as CentaurusFull,
    CentaurusNeck as CentaurusNeck,
    CentaurusPWNeck as CentaurusPWNeck,
)
from discretax.sequence_mixers.lti.linoss import LinOSSSequenceMixer as LinOSSSequenceMixer
from discretax.sequence_mixers.lti.lru import LRUSequenceMixer as LRUSequenceMixer
from discretax.sequence_mixers.lti.s4 import S4SequenceMixer as S4SequenceMixer
from discretax.sequence_mixers.lti.s4d import S4DSequenceMixer as S4DSequenceMixer
from discretax.sequence_mixers.lti.s5 import (
    BidirectionalS5 as BidirectionalS5,
    S5SequenceMixer as S5SequenceMixer,
)
from discretax.sequence_mixers.ltv.comba import (
    CombaSequenceMixer as CombaSequenceMixer,
)
from discretax.sequence_mixers.ltv.delta_net import (
    DeltaNetSequenceMixer as DeltaNetSequenceMixer,
)
from discretax.sequence_mixers.ltv.gated_delta_net import (
    GatedDeltaNetSequenceMixer as GatedDeltaNetSequenceMixer,
)
from discretax.sequence_mixers.ltv.gated_delta_net2 import (
    GatedDeltaNet2SequenceMixer as GatedDeltaNet2SequenceMixer,
)
from discretax.sequence_mixers.ltv.gated_delta_product import (
    GatedDeltaProductSequenceMixer as GatedDeltaProductSequenceMixer,
)
from discretax.sequence_mixers.ltv.gla import GLASequenceMixer as GLASequenceMixer
from discretax.sequence_mixers.ltv.hgrn2 import HGRN2SequenceMixer as HGRN2SequenceMixer
from discretax.sequence_mixers.ltv.hydra import HydraSequenceMixer as HydraSequenceMixer
from discretax.sequence_mixers.ltv.kimi_delta_attention import (
    KimiDeltaAttentionSequenceMixer as KimiDeltaAttentionSequenceMixer,
)
from discretax.sequence_mixers.ltv.mamba import MambaSequenceMixer as MambaSequenceMixer
from discretax.sequence_mixers.ltv.mamba2 import Mamba2SequenceMixer as Mamba2SequenceMixer
from discretax.sequence_mixers.ltv.mamba3 import Mamba3SequenceMixer as Mamba3SequenceMixer
from discretax.sequence_mixers.ltv.min_gru import MinGRUSequenceMixer as MinGRUSequenceMixer
from discretax.sequence_mixers.ltv.min_lstm import MinLSTMSequenceMixer as MinLSTMSequenceMixer
from discretax.sequence_mixers.ltv.mlstm import MLSTMSequenceMixer as MLSTMSequenceMixer
from discretax.sequence_mixers.ltv.retention import (
    RetentionSequenceMixer as RetentionSequenceMixer,
)
from discretax.sequence_mixers.ltv.rglru import (
    GriffinSequenceMixer as GriffinSequenceMixer,
    RGLRUSequenceMixer as RGLRUSequenceMixer,
)
from discretax.sequence_mixers.ltv.rwkv7 import (
    RWKV7ChannelMixer as RWKV7ChannelMixer,
    RWKV7SequenceMixer as RWKV7SequenceMixer,
)
from discretax.sequence_mixers.ltv.s7 import S7SequenceMixer as S7SequenceMixer
from discretax.sequence_mixers.packed import states_at_resets as states_at_resets
from discretax.sequence_mixers.short_convolution import (
    ShortConvSequenceMixer as ShortConvSequenceMixer,
)
from discretax.sequence_mixers.wrappers.bidirectional import Bidirectional as Bidirectional
from discretax.sequence_mixers.wrappers.discretized import Discretized as Discretized
from discretax.sequence_mixers.wrappers.gated import GatedSequenceMixer as GatedSequenceMixer
from discretax.sequence_mixers.wrappers.parallel import (
    SequenceParallel as SequenceParallel,
    sequence_parallel as sequence_parallel,
)
from discretax.sequence_mixers.wrappers.sum import SumSequenceMixer as SumSequenceMixer
