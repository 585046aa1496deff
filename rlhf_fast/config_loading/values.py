"""Turns what YAML or a command line gave into the type that a config field declares, or says what was expected."""

from __future__ import annotations

import math
import types
from typing import Any, Literal, Union, get_args, get_origin


class WrongTypeError(Exception):
    """The value is not of the type; `got` is the part of it that is wrong, `expected` in words, `hint` may be empty."""

    def __init__(self, got: Any, expected: str, hint: str = "") -> None:
        super().__init__(f"got {shown(got)}; {expected} was expected.{hint and ' ' + hint}")


def convert(value: Any, hint: Any) -> Any:
    """The value as the type `hint` (from typing.get_type_hints) says. Raises WrongTypeError.

    Nothing is guessed: 3.5 is no int, 1 no bool, 7 no text. But YAML 1.1 reads 1e-5, which lacks a dot, as text, so
    text that is a number counts as a float; and a whole number is a float, too.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, options)
    if origin is Literal:
        for option in options:
            if type(option) is type(value) and option == value:  # True == 1
                return option
        raise WrongTypeError(value, describe(hint))
    if origin is list:
        if not isinstance(value, list):
            raise WrongTypeError(value, describe(hint), "Write [a, b].")
        return [convert(item, options[0]) for item in value]
    if hint is float:
        return _float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str:
        if isinstance(value, str):
            return value
        raise WrongTypeError(value, "text", "Put it in quotes." if value is not None else "")
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise WrongTypeError(value, describe(hint))


def describe(hint: Any) -> str:
    """A type in words: 'a whole number', 'one of a, b', 'a list of text or null'."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in options)
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in options)
    if origin is list:
        return f"a list of {describe(options[0])}"
    if origin is dict:
        return "a mapping"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def takes(hint: Any, kind: type) -> bool:
    """Whether values of a type (str, list, NoneType) are among those of the hint."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(takes(option, kind) for option in options)
    return (origin or hint) is kind


def shown(value: Any) -> str:
    """A value as YAML would have it; of a long one the ends, where paths differ."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:38]} ... {text[-38:]}"


def _convert_union(value: Any, hint: Any, options: tuple[Any, ...]) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    if len(rest) == 1:  # its message says more: which item of a list, for instance
        try:
            return convert(value, rest[0])
        except WrongTypeError as error:
            if get_origin(rest[0]) is list:
                raise
            raise WrongTypeError(value, describe(hint)) from error
    for option in rest:
        try:
            return convert(value, option)
        except WrongTypeError:
            continue
    raise WrongTypeError(value, describe(hint))


def _float(value: Any) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise WrongTypeError(value, "a number") from None
        if not math.isfinite(number):
            raise WrongTypeError(value, "a finite number")
        return number
    raise WrongTypeError(value, "a number")
