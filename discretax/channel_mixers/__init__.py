"""Channel mixers: functions of the features at one time step."""

from discretax.channel_mixers.base import AbstractChannelMixer as AbstractChannelMixer
from discretax.channel_mixers.glu import GLU as GLU
from discretax.channel_mixers.half_glu import HalfGLU as HalfGLU
from discretax.channel_mixers.identity import IdentityChannelMixer as IdentityChannelMixer
from discretax.channel_mixers.mlp import MLPChannelMixer as MLPChannelMixer
from discretax.channel_mixers.swiglu import SwiGLU as SwiGLU
