"""Settings: command line > environment (`SPLITINFER_*`) > `splitinfer.toml` > default.

Every setting is a field of `Settings`, read by one reader whichever place it comes from, so that a wrong
value gets the same sentence with the name of the place in front. `splitinfer.toml` is searched in the current
folder, then in `$XDG_CONFIG_HOME/splitinfer` (`~/.config/splitinfer`); the first one found counts. Its keys
are the field names; file names in it are relative to it. The token is a secret: it comes from the file that
`token_file` names or from `SPLITINFER_TOKEN`, never from the command line, which other users of a machine
can read.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from splitinfer.errors import ConfigError, UsageError

__all__ = ["FILE_NAME", "PREFIX", "Settings", "find_file", "load_settings"]

FILE_NAME = "splitinfer.toml"
PREFIX = "SPLITINFER_"
WEIGHT_FORMATS = ("float32", "bfloat16", "int8", "int4")
MAX_FILE_BYTES = 1 << 20  # a settings file larger than this is some other file

T = TypeVar("T")


def _text(raw: object) -> str:
    """some text"""
    if isinstance(raw, str) and raw.strip():
        return raw.strip()
    raise ValueError


def _texts(raw: object) -> tuple[str, ...]:
    """a list of names, or names separated by commas"""
    parts = raw if isinstance(raw, (list, tuple)) else [raw]
    names: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            raise ValueError
        names += [name.strip() for name in part.split(",") if name.strip()]
    if parts and not names:
        raise ValueError  # "," is a slip of the pen: it must not quietly mean none
    return tuple(names)


def _whole(low: int, high: int) -> Callable[[object], int]:
    def read(raw: object) -> int:
        if isinstance(raw, str):
            raw = int(raw)
        if isinstance(raw, bool) or not isinstance(raw, int) or not low <= raw <= high:
            raise ValueError
        return raw

    read.__doc__ = f"a whole number from {low} to {high}"
    return read


def _seconds(raw: object) -> float:
    """a number of seconds above 0"""
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise ValueError
    value = float(raw)
    if not math.isfinite(value) or value <= 0:
        raise ValueError
    return value


def _depth(raw: object) -> int | str:
    """auto, or a whole number from 1 to 15"""
    return "auto" if raw == "auto" else _whole(1, 15)(raw)


def _device(raw: object) -> str:
    """cpu, cuda, cuda:N or mps"""
    if not isinstance(raw, str) or not re.fullmatch(r"cpu|cuda(:\d{1,3})?|mps", raw):
        raise ValueError
    return raw


def _switch(raw: object) -> bool:
    """true or false"""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if isinstance(raw, str) and raw.lower() in words:
        return words[raw.lower()]
    if isinstance(raw, bool):
        return raw
    raise ValueError


def _choice(*choices: str) -> Callable[[object], str]:
    def read(raw: object) -> str:
        if raw not in choices:
            raise ValueError
        return str(raw)

    read.__doc__ = f"one of {', '.join(choices)}"
    return read


def _setting(default: T, read: Callable[[object], Any], *, is_path: bool = False) -> T:
    """A field with its reader; `read.__doc__` completes the sentence "KEY must be ..."."""
    made: T = field(default=default, metadata={"read": read, "is_path": is_path})
    return made


@dataclass(frozen=True)
class Settings:
    """Everything that the commands share. None, or "" for the model, means: the program chooses.

    `model` is a folder, a file or a hub id ("": the built-in demo model); `nodes` are addresses of expert
    nodes (none: experts on this machine); `experts` and `layers` are what a node holds, as ranges
    ("0-31,64-95"), `slice` the part of each expert; `timeout` is in seconds and bounds every call to a node;
    `context` is in tokens. `quant` is the experts' weight format, `quant_*` that of the other parts (None: as
    stored, but int8 for the others where `quant` is int8 or int4). `local_layers`, `local_memory`, `exact`,
    `kv_cache`, `trace`, `draft` and `draft_depth` are those of `EngineConfig`. `wire_dtype` rounds rows on
    the wire (None: never). `simulate_*` put an emulated link before every node ("20ms", "100mbit"). `tls_ca`
    is a file, or "system" for the authorities of this machine's system; `insecure` lets a node listen beyond
    this machine without token and TLS.
    """

    model: str = _setting("", _text, is_path=True)
    nodes: tuple[str, ...] = _setting((), _texts)
    device: str = _setting("cpu", _device)
    dtype: str | None = _setting(None, _choice("float32", "bfloat16"))
    threads: int | None = _setting(None, _whole(1, 1024))
    quant: str | None = _setting(None, _choice(*WEIGHT_FORMATS))
    quant_attention: str | None = _setting(None, _choice(*WEIGHT_FORMATS))
    quant_dense: str | None = _setting(None, _choice(*WEIGHT_FORMATS))
    quant_embeddings: str | None = _setting(None, _choice(*WEIGHT_FORMATS))
    quant_lm_head: str | None = _setting(None, _choice(*WEIGHT_FORMATS))
    context: int | None = _setting(None, _whole(1, 1 << 24))
    timeout: float = _setting(60.0, _seconds)
    local_layers: str | None = _setting(None, _text)
    local_memory: str | None = _setting(None, _text)
    kv_cache: Literal["int8"] | None = _setting(None, _choice("int8"))
    exact: bool = _setting(False, _switch)
    trace: str | None = _setting(None, _text, is_path=True)
    draft: str = _setting("auto", _text)
    draft_depth: int | str = _setting("auto", _depth)
    wire_dtype: Literal["bfloat16", "float8_e4m3fn", "int8"] | None = _setting(
        None, _choice("bfloat16", "float8_e4m3fn", "int8")
    )
    compression: Literal["auto", "on", "off"] = _setting("auto", _choice("auto", "on", "off"))
    simulate_rtt: str | None = _setting(None, _text)
    simulate_jitter: str | None = _setting(None, _text)
    simulate_bandwidth: str | None = _setting(None, _text)
    token_file: str | None = _setting(None, _text, is_path=True)
    tls_fingerprint: tuple[str, ...] = _setting((), _texts)
    tls_ca: str | None = _setting(None, _text, is_path=True)
    tls_cert: str | None = _setting(None, _text, is_path=True)
    tls_key: str | None = _setting(None, _text, is_path=True)
    insecure: bool = _setting(False, _switch)
    experts: str | None = _setting(None, _text)
    layers: str | None = _setting(None, _text)
    slice: str | None = _setting(None, _text)
    host: str = _setting("127.0.0.1", _text)
    port: int = _setting(7077, _whole(0, 65535))


def find_file(directory: Path, environ: Mapping[str, str]) -> Path | None:
    """The settings file that counts, or None where there is none."""
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".config")
    for candidate in (directory / FILE_NAME, Path(home) / "splitinfer" / FILE_NAME):
        if candidate.is_file():
            return candidate
    return None


def load_settings(
    given: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Settings:
    """Merge the four places into one `Settings`.

    `given` has the command line's values by field name, None where a flag was not given. Raises `UsageError`
    naming the flag, or `ConfigError` naming the environment variable or the file and key.
    """
    environ = os.environ if environ is None else environ
    file = find_file(Path.cwd() if directory is None else directory, environ)
    merged = {} if file is None else _read_file(file)
    for name, read in _readers().items():
        variable = PREFIX + name.upper()
        if environ.get(variable, "").strip():
            merged[name] = _read(f"environment variable {variable}", read, environ[variable], ConfigError)
        value = (given or {}).get(name)
        if value is not None and value != []:
            merged[name] = _read(f"--{name.replace('_', '-')}", read, value, UsageError)
    return Settings(**merged)


def _readers() -> dict[str, Callable[[object], Any]]:
    return {f.name: f.metadata["read"] for f in fields(Settings)}


def _read(
    place: str, read: Callable[[object], Any], raw: object, error: type[UsageError], remedy: str = ""
) -> Any:
    try:
        return read(raw)
    except ValueError:
        raise error(
            f"{place} must be {read.__doc__}, not {raw!r}", remedy=remedy or "Correct it, or leave it out."
        ) from None


def _read_file(file: Path) -> dict[str, Any]:
    """The file's settings, checked. Raises `ConfigError` naming file and key."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file} is larger than {MAX_FILE_BYTES} bytes", remedy="Move this file away.")
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", remedy="Make it readable.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}", remedy="Correct that line.") from error
    readers = _readers()
    values: dict[str, Any] = {}
    for key, raw in table.items():
        if key not in readers:
            near = get_close_matches(key, readers, n=1, cutoff=0.5)
            raise ConfigError(
                f"{file}: there is no setting {key!r}",
                remedy=f"Did you mean {near[0]!r}?" if near else f"The settings are {', '.join(readers)}.",
            )
        values[key] = _read(f"{file}: {key}", readers[key], raw, ConfigError)
    for item in fields(Settings):
        if item.metadata["is_path"] and item.name in values:
            values[item.name] = _beside(file, values[item.name])
    return values


def _beside(file: Path, value: str) -> str:
    """A path as the settings file means it. What does not exist there may be a hub id: left as written."""
    path = file.parent / Path(value).expanduser()
    return str(path) if path.exists() else value
