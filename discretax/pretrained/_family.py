"""What a family of checkpoints is, and how its configuration is read: entry by entry, or not at all."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, PRNGKeyArray

from discretax.architectures import LanguageModel

# Of every family: about training, tokens, caches and the files' history.
NO_EFFECT = (
    "_attn_implementation_autoset",
    "_name_or_path",
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


class Config:
    """The entries of a config.json, each to be asked for by name. What nobody asked for is refused."""

    def __init__(self, entries: Mapping[str, Any], where: str = "config.json"):
        self.entries = entries
        self.where = where
        self.unasked = dict.fromkeys(entries)

    def entry(self, name: str, default: Any = REQUIRED) -> Any:
        self.unasked.pop(name, None)
        value = self.entries.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"{self.where} has no entry {name!r}, which says what the model is.")
        return value

    def size(self, name: str, default: Any = REQUIRED) -> int:
        value = self.entry(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(name, value, "a whole number of at least 1")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        value = self.entry(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.refused(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        value = self.entry(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, value, "true or false")
        return value

    def fixed(self, **only: Any) -> None:
        """Entries that may be missing, and have one value that is supported."""
        for name, value in only.items():
            received = self.entry(name, value)
            if received != value:
                raise self.refused(name, received, repr(value), " Nothing else is supported.")

    def done(self, no_effect: Iterable[str] = ()) -> None:
        unknown = sorted(set(self.unasked) - {*NO_EFFECT, *no_effect})
        if unknown:
            entries = ", ".join(f"{name}={self.entries[name]!r}" for name in unknown)
            raise ValueError(
                f"{self.where} has entries that are not known here: {entries}. They may change what "
                "the model computes. Delete those that do not."
            )

    def refused(self, name: str, value: Any, rule: str, why: str = "") -> ValueError:
        return ValueError(f"{self.where}: {name!r} must be {rule}; got {value!r}.{why}")


class Family(NamedTuple):
    """One `model_type`: between configuration and model, and between tensors' names and leaves."""

    model_type: str
    architecture: str
    build: Callable[[Config], Callable[[PRNGKeyArray], LanguageModel]]
    """How to make the model that a configuration describes."""
    describe: Callable[[LanguageModel], dict[str, Any] | None]
    """The configuration that describes a model; None if it is of another kind."""
    tensors: Callable[[LanguageModel], dict[str, Array | None]]
    """The model's leaves, or its gradient's, by their names in the files, the embedding first; None
    for no such tensor."""

    def leaves(self, model: LanguageModel) -> dict[str, Array]:
        return {name: leaf for name, leaf in self.tensors(model).items() if leaf is not None}


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a leaf's tensor: short convolutions have an axis of one there, for their input channels."""
    is_convolution = name.endswith(("conv1d.weight", "conv_1d.weight"))
    return (shape[0], 1, shape[1]) if is_convolution else shape
