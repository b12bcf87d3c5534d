"""What every noun that is also a file shares: frozen, validated once, JSON and TOML, whole writes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from spanwise.core.errors import InputError, ResourceError, SpanwiseError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - exercised on Python 3.10 only
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

N = TypeVar("N", bound="Noun")


class Noun(BaseModel):
    """A frozen value. Data from outside comes in by ``parse`` and its kin, which raise ``InputError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)

    @classmethod
    def parse(cls: type[N], data: object, where: str = "") -> N:
        """Validates plain data (dicts, lists, strings) and raises ``InputError`` in one line."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(_one_line(cls.__name__, where, error)) from None
        except SpanwiseError as error:  # a rule of ours; it does not know which file it was broken in
            if not where:
                raise
            raise type(error)(f"{where}: {error}") from None

    @classmethod
    def from_json(cls: type[N], text: str, where: str = "") -> N:
        """Reads what ``to_json`` wrote."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where or cls.__name__}: not JSON (line {error.lineno}: {error.msg})"
            ) from None
        return cls.parse(data, where)

    @classmethod
    def from_toml(cls: type[N], text: str, where: str = "") -> N:
        """Reads TOML, as people write it or as ``to_toml`` wrote it."""
        return cls.parse(parse_toml(text, where or cls.__name__), where)

    @classmethod
    def load(cls: type[N], path: Path) -> N:
        """Reads a ``.json`` or ``.toml`` file."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise InputError(f"{path}: cannot be read ({reason})") from None
        read = cls.from_json if path.suffix == ".json" else cls.from_toml
        return read(text, str(path))

    def to_data(self) -> dict[str, Any]:
        """Plain data; absent options are left out, as TOML has no null."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> str:
        """Stable, diffable JSON."""
        return json.dumps(self.to_data(), indent=1, sort_keys=False) + "\n"

    def to_toml(self) -> str:
        """TOML with the same content as ``to_json``."""
        return tomli_w.dumps(self.to_data())

    def save(self, path: Path) -> None:
        """Writes ``.json`` or ``.toml`` whole or not at all."""
        write_whole(path, self.to_json() if path.suffix == ".json" else self.to_toml())

    def model_copy(self: N, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> N:
        """A changed copy; what was derived from the old content is derived anew, nothing is validated."""
        copied = super().model_copy(update=update, deep=deep)
        held = vars(copied)
        for name in held.keys() - type(self).model_fields.keys():
            held.pop(name)  # a cached property of the original
        return copied

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Worked out once: planners look plans up again and again."""
        held = vars(self)
        return hash(tuple(held[name] for name in type(self).model_fields))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, 16 hex digits: equal values have equal digests."""
        text = json.dumps(self.to_data(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Plain data of TOML text; ``InputError`` in one line if it is not TOML."""
    toml: Any = tomllib  # one of two modules, of which a type checker finds only one
    try:
        return toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise InputError(f"{where}: not TOML ({error})") from None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes to a temporary neighbour, syncs and renames: a reader never sees half a file."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            os.fchmod(handle, 0o666 & ~_umask())
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}); choose another folder or free space"
        ) from None


def _one_line(noun: str, where: str, error: ValidationError) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    field = ".".join(str(part) for part in first["loc"])
    rule = str(cause) if isinstance(cause, (SpanwiseError, ValueError)) else first["msg"]
    place = ": ".join(part for part in (where or noun.lower(), field) if part)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {rule}{more}"
