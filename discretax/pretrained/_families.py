"""Which families there are, and of which a configuration is."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from discretax.architectures import LanguageModel
from discretax.pretrained._falcon_h1 import FALCON_H1
from discretax.pretrained._falcon_mamba import FALCON_MAMBA
from discretax.pretrained._family import Config, Family
from discretax.pretrained._granite import BAMBA, GRANITE
from discretax.pretrained._jamba import JAMBA
from discretax.pretrained._lfm2 import LFM2, LFM3
from discretax.pretrained._mamba import MAMBA
from discretax.pretrained._mamba2 import MAMBA2
from discretax.pretrained._mamba_ssm import MAMBA_SSM
from discretax.pretrained._nemotron_h import NEMOTRON_H
from discretax.pretrained._olmo_hybrid import OLMO_HYBRID
from discretax.pretrained._qwen3_5 import QWEN3_5, QWEN3_5_TEXT
from discretax.pretrained._recurrent_gemma import RECURRENT_GEMMA
from discretax.pretrained._rwkv7 import IN_EVERY_MODEL, RWKV7, RWKV7_NATIVE
from discretax.pretrained._xlstm import XLSTM

# A model is saved as the first that describes it: Nemotron-H, too, may begin with a Mamba-2.
FAMILIES = {
    family.model_type: family
    for family in (
        MAMBA,
        NEMOTRON_H,
        MAMBA2,
        FALCON_MAMBA,
        MAMBA_SSM,
        RECURRENT_GEMMA,
        FALCON_H1,
        GRANITE,
        BAMBA,
        JAMBA,
        LFM2,
        LFM3,
        QWEN3_5_TEXT,
        QWEN3_5,
        OLMO_HYBRID,
        XLSTM,
        RWKV7,
        RWKV7_NATIVE,
    )
}


def family_of(
    entries: dict[str, Any],
    where: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtypes: Callable[[str], np.dtype] | None = None,
    ignored: Iterable[str] = (),
) -> tuple[Family, Callable[..., LanguageModel]]:
    """The family of a config.json, and how to make its model."""
    config = Config(entries, where, shapes, dtypes, ignored)
    if "model_type" not in entries:
        if {"d_model", "n_layer"} <= entries.keys():
            return MAMBA_SSM, MAMBA_SSM.build(config)
        if IN_EVERY_MODEL in (shapes or ()) or {"n_embd", "n_layer"} <= entries.keys():
            return RWKV7_NATIVE, RWKV7_NATIVE.build(config)
    model_type = config.entry("model_type")
    known = {name: f for name, f in FAMILIES.items() if f.layout == "huggingface"}
    if not isinstance(model_type, str) or model_type not in known:
        why = " Mixtures of experts are not supported." if "moe" in str(model_type) else ""
        raise config.refused("model_type", model_type, f"one of {', '.join(known)}", why)
    family = known[model_type]
    if shapes is not None:
        names = family.names(shapes)
        config.shapes = {name: shapes[there] for name, there in names.items()}
        config.dtypes = None if dtypes is None else lambda name: dtypes(names[name])
    config.fixed(architectures=[family.architecture])
    tensors = family.variant(config) or family.tensors
    return family._replace(tensors=tensors), family.build(config)
