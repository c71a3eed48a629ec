"""What a law is."""

import dataclasses
import functools as ft
from collections.abc import Callable, Iterable
from typing import Any

from discretax.testing._compare import LawError, first_line
from discretax.testing._subject import RAISED_BY


@dataclasses.dataclass(frozen=True)
class MixerLaw:
    """One law of one mixer: call it, and it fails where the mixer breaks the law.

    **Attributes:**

    - `name`: words joined by underscores, for the list of tests.
    - `states`: the law in a sentence.
    - `check`: what is called.
    """

    name: str
    states: str
    check: Callable[[], None] = dataclasses.field(repr=False)

    def __call__(self) -> None:
        """**Raises:** `AssertionError` with the law, the numbers, and where they part."""
        try:
            self.check()
        except LawError as broken:
            raise AssertionError(self._report(str(broken))) from broken.__cause__
        except Exception as error:
            found = f"{type(error).__name__}: {first_line(error)}"
            notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(RAISED_BY)]
            raise AssertionError(self._report("\n".join([found, *notes]))) from error

    def _report(self, found: str) -> str:
        lines = (f"    {line}" for line in found.splitlines())
        return "\n".join([f"{self.name}: {self.states}", *lines])


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of all mixers, or of those that it concerns."""

    check: Callable[..., None]
    concerns: Callable[[Any], bool]
    variants: dict[str, tuple[Any, ...]]

    @property
    def name(self) -> str:
        return self.check.__name__

    def of(self, subject: Any) -> list[MixerLaw]:
        """Bound to a `Subject`, a mixer, or to a `Stream`, a model with its state."""
        if not self.concerns(subject):
            return []
        states = (self.check.__doc__ or "").splitlines()[0]
        return [
            MixerLaw(f"{self.name}{variant}", states, ft.partial(self._check, subject, *values))
            for variant, values in self.variants.items()
        ]

    def _check(self, subject: Any, *values: Any) -> None:
        with subject.precision():
            self.check(subject, *values)


def law(
    concerns: Callable[[Any], bool] = lambda subject: True,
    variants: Iterable[Any] | dict[str, tuple[Any, ...]] | None = None,
) -> Callable[[Callable[..., None]], Law]:
    """Makes a law of a function of the subject, whose docstring's first line states it.

    - `concerns`: of which subjects it is a law.
    - `variants`: values of a second argument, each a law of its own, named by it; or all further
        arguments by the variant's name.
    """
    if variants is None:
        return lambda check: Law(check, concerns, {"": ()})
    if not isinstance(variants, dict):
        variants = {str(value): (value,) for value in variants}
    named = {f"-{name}": values for name, values in variants.items()}
    return lambda check: Law(check, concerns, named)


def hold(laws: list[MixerLaw]) -> None:
    """Calls each of them, and fails with a list of the broken ones."""
    broken = []
    for law in laws:
        try:
            law()
        except AssertionError as error:
            broken.append(error)
    if broken:
        report = "\n\n".join(map(str, broken))
        count = f"{len(broken)} of {len(laws)} laws broken"
        raise AssertionError(f"{count}\n\n{report}") from broken[0].__cause__
