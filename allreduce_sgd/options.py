"""How an option is declared: a dataclass field whose metadata carry its help text and what values it allows.

Option dataclasses stand beside the code that they configure and import no torch, so that `--help` is quick;
`config.py` composes them, makes the command line and the TOML form from the same fields, and checks values.
"""

import dataclasses
from typing import Any

__all__ = ["option"]


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare one option of a frozen dataclass.

    The field's annotation gives its type: `str`, `int`, `float`, `bool`, or one of them `| None`, where None means
    "not set" or "off". `choices` lists the allowed words (compared case-insensitively), `minimum` and `maximum` are
    inclusive bounds, `above` an exclusive lower bound.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "minimum": minimum,
            "above": above,
            "maximum": maximum,
            "metavar": metavar,
        },
    )
