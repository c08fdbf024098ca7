"""Command-line flags made of the fields of settings, so that each is written down in one place.

A field is a flag if its type is annotated with what it is `about`: then it has a help, and a row in
the tables of the documents. It is called as its field, with hyphens, and its range is that of its
type, by `Meta(ge=...)` and the like. A tuple of strings is a flag that may be given several times.
Descriptions are Markdown; `--help` shows links without their targets.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar, cast

import msgspec
from msgspec import Meta, inspect

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.sizes import parse_size

Value = bool | int | float | str | tuple[str, ...] | None
T = TypeVar("T", bound=msgspec.Struct)

_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_ENVIRONMENT = "KUNSERVE_"
_ABSENT = argparse.SUPPRESS


class Form(StrEnum):
    """How a value is written, where its type does not say."""

    PLAIN = "plain"
    SIZE = "size"
    SECRET = "secret"
    """Also taken from a file or the environment, where no list of processes shows it."""


def about(
    description: str,
    *,
    default: str = "",
    metavar: str = "",
    form: Form = Form.PLAIN,
) -> Meta:
    """What stands beside a field that is a flag; `default` says in words what no value means."""
    extra = {"default": default, "metavar": metavar, "form": form}
    return Meta(description=description, extra=extra)


@dataclass(frozen=True, slots=True)
class Flag:
    """A field of a record as a flag. `kind` is what its values are, apart from None.

    One that may be `repeated` fills a tuple with all that was given.
    """

    field: str
    kind: type[bool] | type[int] | type[float] | type[str]
    default: Value
    required: bool
    description: str
    default_words: str
    metavar: str
    form: Form
    repeated: bool

    @property
    def name(self) -> str:
        return _flag_name(self.field)

    @property
    def choices(self) -> list[str] | None:
        return [c.value for c in self.kind] if issubclass(self.kind, StrEnum) else None

    @property
    def variable(self) -> str:
        """The environment variable that a secret is taken from."""
        return _ENVIRONMENT + self.field.upper()

    @property
    def names(self) -> list[str]:
        """All spellings: a secret has one more, for a file that holds it."""
        return [self.name, f"{self.name}-file"] if self.form is Form.SECRET else [self.name]

    @property
    def default_text(self) -> str:
        """For people; empty if there is none to speak of."""
        if self.default_words or self.default in (None, "", ()):
            return self.default_words
        if self.kind is bool:
            return "on" if self.default else "off"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


@functools.cache
def flags_of(record: type[msgspec.Struct]) -> tuple[Flag, ...]:
    """The flags that fill this record, in the order of its fields."""
    described = cast(inspect.StructType, inspect.type_info(record))
    return tuple(
        _flag(field) for field in described.fields if isinstance(field.type, inspect.Metadata)
    )


def add_flags(
    group: argparse._ArgumentGroup,
    records: Iterable[type[msgspec.Struct]],
    only: Collection[str] = (),
) -> None:
    """All flags of the records, or those of the fields that are named."""
    for flag in (f for r in records for f in flags_of(r) if not only or f.field in only):
        text = _LINK.sub(r"\1", flag.description).replace("`", "").replace("%", "%%")
        if flag.default_text:
            text += f" (default: {flag.default_text})".replace("`", "").replace("%", "%%")
        if flag.kind is bool:
            group.add_argument(flag.name, action="store_true", default=_ABSENT, help=text)
            continue
        if flag.form is Form.SECRET:
            text += f" (or in the environment: {flag.variable})"
        group.add_argument(
            flag.name,
            action="append" if flag.repeated else "store",
            type=str if flag.form is Form.SIZE or flag.choices else flag.kind,
            choices=flag.choices,
            default=_ABSENT,
            required=flag.required,
            metavar=flag.metavar or None,
            help=text,
        )
        if flag.form is Form.SECRET:
            group.add_argument(
                f"{flag.name}-file", metavar="FILE", default=_ABSENT, help="file that holds it"
            )


def read_flags(
    given: argparse.Namespace,
    record: type[T],
    environment: Mapping[str, str] = os.environ,
    only: Collection[str] = (),
) -> T:
    """The record that the flags ask for. Raises `ConfigurationError` for values out of range."""
    values: dict[str, Value] = {}
    for flag in (f for f in flags_of(record) if not only or f.field in only):
        value = getattr(given, flag.field, None)
        if flag.form is Form.SECRET:
            value = _secret(flag, value, getattr(given, f"{flag.field}_file", None), environment)
        if value is None:
            continue
        if flag.repeated:
            values[flag.field] = tuple(value)
            continue
        if flag.form is Form.SIZE:
            value = parse_size(value)
        values[flag.field] = flag.kind(value)
    return record(**values)


def check_ranges(settings: msgspec.Struct) -> None:
    """Raises `ConfigurationError`, with the name of the flag, for a value out of its range."""
    described = cast(inspect.StructType, inspect.type_info(type(settings)))
    for field in described.fields:
        value, bounds = getattr(settings, field.name), _number(field.type)
        if bounds is None or not isinstance(value, int | float):
            continue
        inside = (
            (bounds.gt is None or value > bounds.gt)
            and (bounds.ge is None or value >= bounds.ge)
            and (bounds.le is None or value <= bounds.le)
        )
        if not inside:
            raise ConfigurationError(f"{_flag_name(field.name)} must {_in_words(bounds)}")


def flag_table(records: Iterable[type[msgspec.Struct]]) -> str:
    """The flags of the records as a table in Markdown."""
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for flag in (f for record in records for f in flags_of(record)):
        names = ", ".join(f"`{name}`" for name in flag.names)
        default = flag.default_text
        if default and not flag.default_words:
            default = f"`{default}`" if flag.choices else default
        if flag.form is Form.SECRET:
            default = f"`{flag.variable}`"
        rows.append(
            f"| {names} | {default or ('' if flag.required else 'none')} | {flag.description} |"
        )
    return "\n".join(rows)


def secret_values(given: argparse.Namespace, records: Iterable[type[msgspec.Struct]]) -> list[str]:
    """The secrets that stand on the command line itself."""
    flags = (f for record in records for f in flags_of(record) if f.form is Form.SECRET)
    return [value for flag in flags if (value := getattr(given, flag.field, None))]


def _flag(field: inspect.Field) -> Flag:
    described = cast(inspect.Metadata, field.type)
    extra = described.extra or {}
    default = None if field.default is msgspec.NODEFAULT else field.default
    return Flag(
        field=field.name,
        kind=_kind(described.type),
        default=cast(Value, default),
        required=field.required,
        description=(described.extra_json_schema or {})["description"],
        default_words=extra["default"],
        metavar=extra["metavar"],
        form=extra["form"],
        repeated=isinstance(described.type, inspect.VarTupleType),
    )


def _kind(described: inspect.Type) -> type[bool] | type[int] | type[float] | type[str]:
    match described:
        case inspect.UnionType(types=types):
            return _kind(next(t for t in types if not isinstance(t, inspect.NoneType)))
        case inspect.EnumType(cls=kind):
            return cast(type[str], kind)
        case inspect.BoolType():
            return bool
        case inspect.IntType():
            return int
        case inspect.FloatType():
            return float
    return str


def _number(described: inspect.Type) -> inspect.IntType | inspect.FloatType | None:
    """The range of a field that holds numbers."""
    match described:
        case inspect.Metadata(type=inner):
            return _number(inner)
        case inspect.UnionType(types=types):
            return next((n for t in types if (n := _number(t)) is not None), None)
        case inspect.IntType() | inspect.FloatType():
            return described
    return None


def _in_words(bounds: inspect.IntType | inspect.FloatType) -> str:
    words = []
    if bounds.gt is not None:
        words.append(f"above {bounds.gt:g}")
    if bounds.ge is not None:
        words.append(f"at least {bounds.ge:g}")
    if bounds.le is not None:
        words.append(f"at most {bounds.le:g}")
    text = f"be {' and '.join(words)}"
    return "not be negative" if text == "be at least 0" else text


def _flag_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _secret(
    flag: Flag, given: str | None, file: str | None, environment: Mapping[str, str]
) -> str | None:
    """From the command line, a file, or the environment, in this order."""
    if given is not None and file is not None:
        raise ConfigurationError(f"give {flag.name} or {flag.name}-file, not both")
    if file is None:
        return given or environment.get(flag.variable) or None
    try:
        text = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no text"
        raise ConfigurationError(f"{flag.name}-file {file}: {reason}") from None
    if not text:
        raise ConfigurationError(f"{flag.name}-file {file}: there is no key in it")
    return text
