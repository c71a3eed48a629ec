import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Sharding

from discretax._features import check_name
from discretax.architectures import LanguageModel
from discretax.pretrained._differences import differences
from discretax.pretrained._families import FAMILIES, family_of
from discretax.pretrained._family import Family, Layout
from discretax.pretrained._files import (
    CONFIG,
    WEIGHTS,
    Tensors,
    locate,
    open_tensors,
    parsed,
    read_config,
    write,
)
from discretax.pretrained._rwkv7 import IN_EVERY_MODEL
from discretax.pretrained._stored import Stored, cut_as_stored, gathered, leaves

HEAD = "lm_head.weight"


def load(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
    ignore_entries: Sequence[str] = (),
) -> tuple[LanguageModel, eqx.nn.State]:
    """A language model from a folder in Hugging Face's layout, or from a name on its hub.

    The folder holds `config.json` and `model.safetensors`, or shards of it with
    `model.safetensors.index.json`. Of `config.json`, `model_type` must be `"mamba"`, `"mamba2"`,
    `"falcon_mamba"`, `"recurrent_gemma"`, `"falcon_h1"`, `"granitemoehybrid"` (without experts),
    `"bamba"`, `"jamba"` and `"nemotron_h"` (without experts), `"lfm2"`, `"lfm3"`, `"qwen3_5_text"`,
    `"qwen3_5"`, `"olmo_hybrid"`, `"xlstm"` or `"rwkv7"`, and every other entry must be known: one
    that might change what the model computes is never passed over. Of `"qwen3_5"` the text part is
    loaded: skipped are tensors whose names begin with `model.visual.` (images and videos) or `mtp.`
    (heads that predict several tokens), the latter of `"qwen3_5_text"`, too.

    Without a `model_type`, but with `d_model` and `n_layer`, the folder is in the layout of mamba_ssm,
    of a Mamba or Mamba-2 such as `"state-spaces/mamba2-130m"`; where the tensors are those of an
    RWKV-7 by its authors' names, `config.json` may be missing.

    Sizes are compared to the tensors before anything is built from them. Tensors are read one by one,
    each straight to its place, after all names and shapes have been found right: memory holds about
    one copy. Pickled weights are not opened.

    Numbers differ from transformers' by rounding alone. RecurrentGemma's embeddings are multiplied
    by the root of the width rounded to bfloat16, as they are there.

    !!! example

        ```python
        model, state = discretax.pretrained.load("state-spaces/mamba-130m-hf", dtype=jnp.float32)
        logits, state = model(tokens, state)
        ```

    **Arguments:**

    - `source`: a folder; or a name such as `"state-spaces/mamba-130m-hf"`, of which configuration
        and safetensors are downloaded (`pip install 'discretax-zoo[pretrained]'`).
    - `dtype`: of the parameters, and with it of the activations; each as it was stored if left out.
        Beside activations of 16 bits the residual stream is of float32 where `residual_in_fp32` of the
        configuration says so.
    - `sharding`: for every tensor; or a function of a tensor's name in the file and the
        `jax.ShapeDtypeStruct` of the parameter that it becomes, of which it is the last where
        several make one. JAX's default device if left out.
    - `ignore_entries`: names of entries that are not known here and that you know to change nothing
        in what the model computes, in objects within the configuration too: `("checkpoint_date",)`.
        Those that the file has not do no harm.

    **Returns:** the model and its state, as from `eqx.nn.make_with_state`.

    **Raises:**

    - `FileNotFoundError` for a folder or file that is missing.
    - `ValueError` for files cut off or corrupt, another `model_type`, entries of the configuration
        that are unknown or have a value that is not supported, tensors that are missing, left over
        or of another shape or type, weights that were saved with another configuration, for a
        `dtype` that is not floating, and for `ignore_entries` that are known.
    - `TypeError` for `ignore_entries` that are no sequence of names.
    - `ImportError` if a package for reading is missing.
    """
    dtype = None if dtype is None else _floating(jnp.dtype(dtype), "`dtype`")
    if isinstance(ignore_entries, str) or not all(isinstance(n, str) for n in ignore_entries):
        raise TypeError(
            f"`ignore_entries` must be a sequence of names, such as `('checkpoint_date',)`; got "
            f"{ignore_entries!r}."
        )
    folder = locate(source)
    with open_tensors(folder) as tensors:
        text = read_config(folder, is_needed=IN_EVERY_MODEL not in tensors.shapes)
        kind = lambda name: dtype or tensors.dtype(name)
        entries, where = parsed(text, folder / CONFIG), str(folder / CONFIG)
        family, make = family_of(entries, where, tensors.shapes, kind, ignore_entries)
        tensors.rename(family.names(tensors.shapes))
        model, state = eqx.filter_eval_shape(eqx.nn.make_with_state(make), jr.key(0))
        _check_pair(text, model, tensors, folder)
        stored = cut_as_stored(family.stored(model), tensors.shapes)
        _check_names(stored, tensors, family, model.tie_embeddings)
        place = sharding if callable(sharding) else lambda *_: sharding
        dtypes = {name: kind(name) for name in stored}
        places = [
            place(tensors.names[name], jax.ShapeDtypeStruct(leaf.shape, dtypes[name]))
            for name, leaf in _ends(stored, dtypes)
        ]
        arrays = [
            jax.device_put(array, where)
            for array, where in zip(gathered(stored, tensors.read, dtypes), places, strict=True)
        ]
    return eqx.tree_at(lambda m: leaves(family.stored(m)), model, arrays), state


def save(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    entries: Mapping[str, Any] | None = None,
    layout: Layout = "huggingface",
) -> None:
    """Writes `config.json` and `model.safetensors`, for [`discretax.pretrained.load`][] and transformers.

    Every tensor is written as it is, bit by bit and in its own type. A model need not have been
    loaded: one that was built here can be saved if it is what one of the families would build.

    Whenever it is interrupted, the folder holds the old model or the new one, or two files that
    [`discretax.pretrained.load`][] does not take for a pair. Of several processes that save into one
    folder at once, one waits for the other, and the last one's model stays.

    **Arguments:**

    - `model`: a [`discretax.architectures.LanguageModel`][].
    - `folder`: made if missing; the two files in it are replaced.
    - `entries`: more of `config.json`, which do not change what the model computes:
        `{"eos_token_id": 2}`.
    - `layout`: `"huggingface"`, or `"mamba_ssm"` for that package, of a Mamba or Mamba-2, or
        `"rwkv_lm"` for the code of RWKV's authors, of an RWKV-7. The model does not remember which
        one it was loaded from.

    **Raises:** `TypeError` for another kind of model, and for `entries` that JSON cannot hold;
    `ValueError` for a model that belongs to no family of the layout, with the fields in which it
    differs, for `entries` that are not of that kind, and for an unknown `layout`.
    """
    check_name("layout", layout, Layout)
    if not isinstance(model, LanguageModel):
        raise TypeError(
            "`save` takes a `discretax.architectures.LanguageModel`; got "
            f"{type(model).__name__}. For others there is `eqx.tree_serialise_leaves`."
        )
    families = [family for family in FAMILIES.values() if family.layout == layout]
    for family in families:
        description = family.describe(model)
        if description is not None:
            break
    else:
        mixers = sorted({type(block.sequence_mixer).__name__ for block in model.backbone.blocks})
        raise ValueError(
            f"`save` writes models of the families {', '.join(f.model_type for f in families)}; this "
            f"one, with {', '.join(mixers)} and {type(model.norm).__name__}, is of none. "
            f"`eqx.tree_serialise_leaves` saves any model.{_other_layout(model, layout)}"
        )
    header = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": str(model.encoder.embedding.weight.dtype),
    }
    config = (header if layout == "huggingface" else {}) | description
    clash = sorted((set(config) & set(entries or {})) - {"pad_token_id"})
    if clash:
        raise ValueError(
            f"`entries` may not hold {', '.join(clash)}: the model says what they are."
        )
    text = json.dumps(config | dict(entries or {}), indent=2, default=_plain) + "\n"
    like = eqx.filter_eval_shape(family_of(json.loads(text), "`save`")[1], jr.key(0))
    found = [
        f"{name}: {ours!r}, where the family has {theirs!r}"
        for name, ours, theirs in differences(model, like)
    ]
    if found:
        raise ValueError(
            f"`save` takes this model for one of the family {family.model_type}, but then the "
            "files would not hold all that it is:\n"
            + "\n".join(found)
            + _other_layout(model, layout)
        )
    tensors = {name: stored.tensor() for name, stored in family.stored(model).items()}
    if layout == "mamba_ssm" and model.tie_embeddings:
        tensors[HEAD] = next(iter(tensors.values()))
    write(pathlib.Path(folder).expanduser(), text, tensors)


def _other_layout(model: LanguageModel, layout: Layout) -> str:
    """What to try instead, if there is something."""
    others = [
        name
        for name in get_args(Layout)
        if name != layout
        and any(f.layout == name and f.describe(model) is not None for f in FAMILIES.values())
    ]
    return f"\n`layout={others[0]!r}` may hold it." if others else ""


def _check_pair(text: str, model: LanguageModel, tensors: Tensors, folder: pathlib.Path) -> None:
    """The weights say with which configuration they were saved, if they were saved here."""
    if tensors.config in (None, text):
        return
    where = f"the metadata of {folder / WEIGHTS}"
    _, make = family_of(parsed(tensors.config, where), where, tensors.shapes)
    saved = eqx.filter_eval_shape(make, jr.key(0))
    found = [
        f"{name}: {ours!r} by {CONFIG}, {theirs!r} when the weights were saved"
        for name, ours, theirs in differences(model, saved)
    ]
    if found:
        raise ValueError(
            f"{folder / CONFIG} is not the configuration that {WEIGHTS} was saved with, as when a "
            "save was cut short, or it was changed since:\n" + "\n".join(found) + "\nSave the "
            "model again, or undo the change."
        )


def _ends(
    tensors: Mapping[str, Stored], dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, Any]]:
    """Each of the leaves, of which all tensors must be of one type, with the tensor that ends it."""
    types: dict[int, tuple[str, np.dtype]] = {}
    for name, tensor in tensors.items():
        _floating(dtypes[name], f"tensor {name!r}")
        for rows in tensor.rows:
            first, dtype = types.setdefault(id(rows.leaf), (name, dtypes[name]))
            if dtype != dtypes[name]:
                raise ValueError(
                    f"tensors {first!r} and {name!r} are of types {dtype} and {dtypes[name]}, but "
                    "make one parameter. Give `dtype=`, which makes all parameters of one type."
                )
            if rows.is_last:
                yield name, rows.leaf


def _check_names(
    expected: dict[str, Stored], tensors: Tensors, family: Family, is_tied: bool
) -> None:
    """All that does not fit, together."""
    stored = set(tensors.shapes)
    twice = is_tied and HEAD in stored
    if twice:
        stored.remove(HEAD)
    found = [f"missing: {name}" for name in sorted(set(expected) - stored)]
    found += [f"left over: {tensors.names[name]}" for name in sorted(stored - set(expected))]
    for name in sorted(set(expected) & stored):
        shape = expected[name].shape
        if tensors.shapes[name] != shape:
            found.append(
                f"{tensors.names[name]}: got shape {tensors.shapes[name]}, expected {shape}"
            )
    if found:
        raise ValueError(
            f"the tensors are not those of a {family.architecture} with this configuration:\n"
            + "\n".join(found)
        )
    embedding = next(iter(expected))
    if twice and not np.array_equal(tensors.read(HEAD), tensors.read(embedding)):
        raise ValueError(
            f"the configuration ties the logits' weight to the embedding, but {HEAD!r} differs from "
            f"{embedding!r}. Set tie_word_embeddings, or mamba_ssm's tie_embeddings, to false if both "
            "are meant."
        )


def _floating(dtype: np.dtype, what: str) -> np.dtype:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{what} must be of a floating type; got {dtype}.")
    if dtype == np.float64 and jnp.result_type(float) != dtype:
        raise ValueError(
            f"{what} is float64, which JAX has only with `jax.config.update('jax_enable_x64', "
            "True)`. Or give `dtype=jnp.float32`."
        )
    return dtype


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"`entries` must hold what JSON can; got {value!r}.")
