"""What a family of checkpoints is, and how its configuration is read: entry by entry, or not at all."""

import functools as ft
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.pretrained._stored import Stored, stored

# Of every family: about training, tokens, caches and the files' history.
NO_EFFECT = (
    "_attn_implementation_autoset",
    "_name_or_path",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
REQUIRED = object()
# What 32 bits hold: positions and counts of samples have no more.
LARGEST_SIZE = 2**31 - 1
LEAST, LARGEST = (float(value) for value in (np.finfo("f4").tiny, np.finfo("f4").max))


class Config:
    """The entries of a config.json, each to be asked for by name. What nobody asked for is refused.

    Sizes are compared to the `shapes` of the tensors as they are read, where these are given: what
    is built from them is then no larger than the files.
    """

    def __init__(
        self,
        entries: dict[str, Any],
        where: str = "config.json",
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        dtypes: Callable[[str], np.dtype] | None = None,
        ignored: Iterable[str] = (),
    ):
        self.entries = entries
        self.where = where
        self.shapes = shapes
        self.dtypes = dtypes
        self.ignored = frozenset(ignored)
        self.unasked = dict.fromkeys(entries)

    @property
    def context(self) -> tuple[Any, ...]:
        return self.shapes, self.dtypes, self.ignored

    def with_entries(self, **entries: Any) -> "Config":
        """The same file with some entries in place of its own, which count as asked for there."""
        for name in entries:
            self.unasked.pop(name, None)
        other = Config(self.entries | entries, self.where, *self.context)
        other.unasked = self.unasked
        return other

    def with_defaults(self, entries: Mapping[str, Any]) -> "Config":
        """The same file with those that it has not."""
        missing = {k: v for k, v in entries.items() if k not in self.entries}
        return self.with_entries(**missing) if missing else self

    def entry(self, name: str, default: Any = REQUIRED) -> Any:
        self.unasked.pop(name, None)
        value = self.entries.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"{self.where} has no entry {name!r}, which says what the model is.")
        return value

    def part(self, name: str, default: Any = REQUIRED) -> "Config":
        """The entries of an entry."""
        entries = self.entry(name, default)
        if not isinstance(entries, dict):
            raise self.refused(name, entries, "an object")
        return Config(entries, f"{self.where}, {name}", *self.context)

    def size(self, name: str, default: Any = REQUIRED, *, of: tuple[str, int] | None = None) -> int:
        """A whole number, and if it is one `of` a tensor, by name and axis, the tensor's own."""
        value = self.entry(name, default)
        is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if is_whole and of is not None:
            self.fits(*of, value, **{name: value})
        if not is_whole or value > LARGEST_SIZE:
            raise self.refused(name, value, f"a whole number from 1 to {LARGEST_SIZE}")
        return value

    def fits(self, tensor: str, axis: int, size: int, **entries: Any) -> None:
        """Refuses entries by which the first tensor that is called so would be of another size."""
        if self.shapes is None:
            return
        found = self.first(tensor)
        shape = None if found is None else self.shapes[found]
        if shape is None or shape[axis : axis + 1] != (size,):
            has = ", ".join(f"{name!r}: {reprlib.repr(value)}" for name, value in entries.items())
            raise ValueError(
                f"{self.where} has {has}, so that the tensor {found or tensor!r} must be of size "
                f"{reprlib.repr(size)} along axis {axis}; got {'none' if shape is None else shape}."
            )

    def first(self, tensor: str) -> str | None:
        """The name of the first tensor that is called so, if there is one."""
        return next((name for name in self.shapes or () if name.endswith(tensor)), None)

    def layers(self, name: str, prefix: str) -> int:
        """How many there are, which the tensors' names tell as well."""
        if self.shapes is not None:
            numbered = re.compile(rf"{re.escape(prefix)}(\d+)\.")
            count = len({match[1] for match in map(numbered.match, self.shapes) if match})
            value = self.entry(name)
            if value != count or isinstance(value, bool):
                raise self.refused(name, value, f"{count}, the number of layers of the tensors")
        return self.size(name)

    def kinds_fit(
        self,
        name: str,
        kinds: Sequence[str],
        tensors: Mapping[str, str],
        prefix: str = "model.layers.",
    ) -> None:
        """Refuses the entry by which a layer is of a kind whose tensors, by what they begin with, the
        file has not."""
        for i, kind in enumerate(kinds):
            start = f"{prefix}{i}.{tensors[kind]}"
            if self.shapes is not None and not any(n.startswith(start) for n in self.shapes):
                rule = f"as the tensors are, of which none begins with {start!r}"
                raise self.refused(name, self.entries.get(name), rule)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        value = self.entry(name, default)
        if not is_number(value) or not LEAST <= value <= LARGEST:
            raise self.refused(name, value, "a positive number within the range of float32")
        return float(value)

    def numbers(self, name: str, count: int, default: Any = REQUIRED) -> tuple[float, ...]:
        values = self.entry(name, default)
        fit = isinstance(values, list) and len(values) == count and all(map(is_number, values))
        if not fit or not all(LEAST <= value <= LARGEST for value in values):
            raise self.refused(name, values, f"a list of {count} positive numbers")
        return tuple(float(value) for value in values)

    def flag(self, name: str, default: Any = REQUIRED, *, of: str | None = None) -> bool:
        """True or false; if it says whether there is a tensor, as the tensors are."""
        value = self.entry(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, value, "true or false")
        if of is not None and self.shapes is not None:
            there = any(tensor.endswith(of) for tensor in self.shapes)
            if value != there:
                rule = f"{there}, as there is {'a' if there else 'no'} tensor {of!r}"
                raise self.refused(name, value, rule)
        return value

    def fixed(self, **only: Any) -> None:
        """Entries that may be missing, and have one value that is supported."""
        for name, value in only.items():
            received = self.entry(name, value)
            if received != value or isinstance(received, bool) != isinstance(value, bool):
                raise self.refused(name, received, repr(value), " Nothing else is supported.")

    def done(self, no_effect: Iterable[str] = ()) -> None:
        unknown = set(self.unasked) - {*NO_EFFECT, *no_effect}
        known = sorted(self.ignored & set(self.entries) - unknown)
        if known:
            raise ValueError(
                f"`ignore_entries` is for names that are not known here; {self.where} has "
                f"{', '.join(known)}, which {'is' if len(known) == 1 else 'are'}. Leave out what is "
                "known, or change it in the file."
            )
        unknown = sorted(unknown - self.ignored)
        if unknown:
            entries = ", ".join(f"{name}={reprlib.repr(self.entries[name])}" for name in unknown)
            raise ValueError(
                f"{self.where} has entries that are not known here: {entries}. They may change what "
                "the model computes. Delete those that do not, or name them in `ignore_entries` of "
                "`load`."
            )

    def refused(self, name: str, value: Any, rule: str, why: str = "") -> ValueError:
        received = reprlib.repr(value)  # of whatever length and depth
        return ValueError(f"{self.where}: {name!r} must be {rule}; got {received}.{why}")


def residual_stream(config: Config, embedding: str, default: bool = True) -> dict[str, Any]:
    """Of `LanguageModel`: the types of activations and residual stream, if `residual_in_fp32` makes
    them two. Activations have that of the `embedding`, by what its name ends in."""
    in_fp32, name = config.flag("residual_in_fp32", default), config.first(embedding)
    if not in_fp32 or name is None or config.dtypes is None:
        return {}
    dtype = config.dtypes(name)
    return {"dtype": dtype, "residual_dtype": jnp.float32} if dtype.itemsize < 4 else {}


def describe_residual_stream(model: LanguageModel, default: bool = True) -> dict[str, Any]:
    """Beside activations of 32 bits it makes no difference, and is the `default`."""
    activations = jnp.dtype(model.dtype or model.encoder.embedding.weight.dtype)
    stream = jnp.dtype(model.residual_dtype or activations)
    return {"residual_in_fp32": default if activations.itemsize >= 4 else stream.itemsize >= 4}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def told(value: float, made: Callable[[float], float], about: float) -> float:
    """The number `about` which `value` was made, in as few digits as give it again, bit by bit."""
    near = (round(about, 12), about, *(math.nextafter(about, to) for to in (0.0, math.inf)))
    return next((number for number in near if made(number) == value), about)


def renamed(names: Iterable[str], new: Callable[[str], str]) -> dict[str, str]:
    """Each by its `new` name."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(new(name), name)
        if other != name:
            raise ValueError(f"the tensors {other!r} and {name!r} are one and the same, twice.")
    return found


def rms_norm(eps: float) -> Callable[[int], eqx.nn.RMSNorm]:
    return ft.partial(eqx.nn.RMSNorm, eps=eps, use_bias=False)


def describe_sizes(model: LanguageModel) -> dict[str, Any]:
    vocab_size, hidden_size = model.encoder.embedding.weight.shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(model.backbone.blocks),
        "tie_word_embeddings": model.tie_embeddings,
    }


Layout = Literal["huggingface", "mamba_ssm", "rwkv_lm"]
TensorsOf = Callable[[LanguageModel], Mapping[str, Array | Stored | None]]


class Family(NamedTuple):
    """One `model_type`: between configuration and model, and between tensors' names and leaves."""

    model_type: str
    architecture: str
    build: Callable[[Config], Callable[[PRNGKeyArray], LanguageModel]]
    """How to make the model that a configuration describes."""
    describe: Callable[[LanguageModel], dict[str, Any] | None]
    """The configuration that describes a model; None if it is of another kind."""
    tensors: TensorsOf
    """The model's leaves, or its gradient's, by their names in the files, the embedding first; None
    for no such tensor."""
    names: Callable[[Iterable[str]], Mapping[str, str]] = lambda names: {
        name: name for name in names
    }
    """Of the names in a file, each by that which `tensors` has for it; without those to be skipped."""
    layout: Layout = "huggingface"
    """The others have neither the `model_type` nor the architecture in their files; mamba_ssm's has the
    weight of the logits also if it is the embedding."""
    variant: Callable[[Config], TensorsOf | None] = lambda config: None
    """`tensors` of files in which they lie otherwise than they are saved; None for the usual ones."""

    def stored(self, model: LanguageModel) -> dict[str, Stored]:
        return stored(self.tensors(model))
