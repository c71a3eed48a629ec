"""How the examples read their options: one for every field of their settings, and rules for them."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Config = TypeVar("Config")
Rule = tuple[str, bool, str]
"""An option, whether it holds, and what it must be."""


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    config_type: type[Config],
    rules: Callable[[Config, dict[str, Any]], Iterable[Rule]],
) -> tuple[dict[str, Any], Config]:
    """The options of `parser`, and the settings: an option with a default for each of their fields."""
    fields = dataclasses.fields(config_type)  # pyright: ignore[reportArgumentType]
    for field in fields:
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.type,  # pyright: ignore[reportArgumentType]
            default=field.default,
        )
    options = vars(parser.parse_args(argv))
    config = config_type(**{field.name: options.pop(field.name) for field in fields})
    given = options | dataclasses.asdict(config)  # pyright: ignore[reportArgumentType]
    refuse(parser, given, rules(config, given))
    return options, config


def above_zero(given: dict[str, Any], options: Iterable[str]) -> Iterator[Rule]:
    return ((option, given[option] > 0, "above 0") for option in options)


def refuse(parser: argparse.ArgumentParser, given: dict[str, Any], rules: Iterable[Rule]) -> None:
    """Ends the program at the first rule that does not hold, with what was given instead."""
    for option, holds, rule in rules:
        if not holds:
            name = "--" + option.replace("_", "-")
            parser.error(f"{name} must be {rule}; got {given[option]}. Change or omit it.")
