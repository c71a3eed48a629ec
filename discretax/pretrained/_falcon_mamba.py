"""`model_type` "falcon_mamba": Mamba with normalised steps and projections."""

import functools as ft
from collections.abc import Callable
from typing import Any

from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.pretrained._family import Config, Family
from discretax.pretrained._mamba import (
    build_with,
    describe_backbone,
    describe_mixer,
    first_mixer,
    mixer_tensors,
    tensors_with,
)
from discretax.sequence_mixers import MambaSequenceMixer


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    return build_with(config, b_c_dt_rms_eps=config.number("mixer_rms_eps", 1e-6))


def describe(model: LanguageModel) -> dict[str, Any] | None:
    mixer = first_mixer(model)
    if not isinstance(mixer, MambaSequenceMixer) or mixer.b_c_dt_rms_eps is None:
        return None
    eps = {"mixer_rms_eps": mixer.b_c_dt_rms_eps}
    return describe_backbone(model) | describe_mixer(mixer) | eps


FALCON_MAMBA = Family(
    "falcon_mamba",
    "FalconMambaForCausalLM",
    build,
    describe,
    ft.partial(tensors_with, of_mixer=mixer_tensors),
)
