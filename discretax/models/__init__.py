"""Models: stacks of blocks, to be put between an encoder and a head by `eqx.nn.Sequential`."""

from discretax.models._backbone import AbstractBackbone as AbstractBackbone, Backbone as Backbone
from discretax.models.lru import LRU as LRU
from discretax.models.s5 import S5 as S5
