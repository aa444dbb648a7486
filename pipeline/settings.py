"""Settings as JSON and back: what a run was made with is the input of the next one.

Settings are frozen dataclasses. A key that no dataclass has is an error, because a misspelt one
would otherwise leave its default in force without a word.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, Union

from pipeline.program import InputError

T = TypeVar("T")


def to_plain(settings: Any) -> Any:
    """Settings as dicts, lists, strings, numbers and None, fit for JSON."""
    if dataclasses.is_dataclass(settings):
        return {f.name: to_plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, Path):
        return str(settings)
    if isinstance(settings, tuple):
        return [to_plain(item) for item in settings]
    return settings


def from_plain(kind: type[T], plain: Any, where: str) -> T:
    """The settings of class ``kind`` that ``to_plain`` wrote.

    Args:
        kind: a dataclass.
        plain: what was read from JSON.
        where: file and place in it, for messages.

    Raises:
        InputError: for an unknown key (the known ones are listed) or a value of the wrong type.
    """
    if not isinstance(plain, dict):
        raise InputError(f"{where} must be an object with settings, not {plain!r}")
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in plain:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"{where} has no setting {key!r}{hint} Known: {', '.join(sorted(fields))}"
            )
    hints = typing.get_type_hints(kind)
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in plain.items()}
    missing = [
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}: add it")
    try:
        return kind(**values)
    except InputError:
        raise
    except ValueError as error:  # a value that its own class refuses
        raise InputError(f"{where}: {error}") from error


def _value(hint: Any, plain: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), plain, where)
    if origin in (Union, types.UnionType):
        if plain is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _value(inner, plain, where)
    if origin is typing.Literal:
        fits, value = plain in arguments, plain
    elif origin is tuple:
        items = plain if isinstance(plain, list) else []
        kinds = arguments[:1] * len(items) if arguments[1:] == (Ellipsis,) else arguments
        fits = isinstance(plain, list) and len(items) == len(kinds)
        value = tuple(_value(k, item, where) for k, item in zip(kinds, items, strict=False))
    elif hint is Path:
        fits, value = isinstance(plain, str), plain
        value = Path(plain) if fits else plain
    elif hint is float:
        fits, value = isinstance(plain, int | float) and not isinstance(plain, bool), plain
    else:
        fits, value = type(plain) is hint, plain
    if not fits:
        choices = ", ".join(map(repr, arguments)) if origin is typing.Literal else ""
        allowed = choices or (str(hint) if arguments else hint.__name__)
        raise InputError(f"{where} is {plain!r}, allowed: {allowed}")
    return value


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain settings with dotted names."""
    result: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result
