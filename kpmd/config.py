"""The configuration file, and the defaults where it is silent."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    ValidationError,
)

from kpmd.core.deny import DenyList

DEFAULT_SOCKET = Path("/run/kpmd.sock")
DEFAULT_CONFIG = Path("/etc/kpmd/kpmd.toml")

_OCTAL = 'must be permission bits in octal, as for chmod: "0660"'

LOG_LEVELS = ("debug", "info", "warning", "error")


class ConfigError(ValueError):
    """The configuration cannot be used; the message says where and why."""


def parse_mode(value: object) -> object:
    """Permission bits written in octal, as for chmod(1): ``"0660"``."""
    if isinstance(value, str):
        try:
            return int(value, 8)
        except ValueError:
            raise ValueError(_OCTAL) from None
    if isinstance(value, bool):
        raise ValueError(_OCTAL)
    return value


class Limits(BaseModel):
    """Bounds on what one request can cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 30)] = 32 << 20
    object_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 28)] = 16 << 20
    targets_per_link: Annotated[int, Field(ge=1, le=1 << 20)] = 1 << 20
    load_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    load_memory_bytes: Annotated[int, Field(ge=64 << 20)] = 512 << 20
    shutdown_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0


def check_absolute(path: Path) -> Path:
    """Not where the daemon happens to be started."""
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


class Audit(BaseModel):
    """Where the audit trail goes: the journal, else standard error; and a file if there is one.

    ``journal``: whether it goes there; None: if that is where standard error goes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[Path, AfterValidator(check_absolute)] | None = None
    journal: bool | None = None


#: What traces take, of the extra ``tracing``.
_TRACING_NEEDS = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


def check_no_password(url: HttpUrl) -> HttpUrl:
    """Everybody may read the configuration, and the log."""
    if url.username is not None or url.password is not None:
        raise ValueError("must have no password in it: put it into OTEL_EXPORTER_OTLP_HEADERS")
    return url


class Tracing(BaseModel):
    """Traces of requests, by OpenTelemetry. What is None is as ``OTEL_*`` in the environment says.

    ``endpoint``: where they go, OTLP over HTTP. ``sample_ratio``: of how many of the requests.
    ``parent``: whether a request is part of the trace that its client names in ``traceparent``.
    ``timeout_seconds``: how long an export may take. ``queue_spans``: how many wait for that at the
    most; further ones are lost.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: Annotated[HttpUrl, AfterValidator(check_no_password)] | None = None
    sample_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    parent: Literal["ignore", "honour"] = "ignore"
    service_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    resource: dict[str, str] = {}
    timeout_seconds: Annotated[float, Field(gt=0, le=60)] | None = None
    queue_spans: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    def told(self) -> str:
        """Where traces go, and of what, for people."""
        where = self.endpoint or "the endpoint of OTEL_EXPORTER_OTLP_ENDPOINT"
        what = "requests" if self.sample_ratio is None else f"{self.sample_ratio:.4g} of requests"
        return f"{what} to {where}; clients' traceparent: {self.parent}"


class Config(BaseModel):
    """Everything that the configuration file may set. Arguments of the command win over it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    socket: Path = DEFAULT_SOCKET
    group: str | None = None
    mode: Annotated[int, BeforeValidator(parse_mode), Field(ge=0, le=0o777)] = 0o660
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    deny_file: Path | None = None
    policy: Path | None = None
    limits: Limits = Limits()
    audit: Audit = Audit()
    #: None: requests are not traced, and nothing of OpenTelemetry is imported.
    tracing: Tracing | None = None


def load_deny_list(path: Path | None) -> DenyList:
    """The deny list of the file at ``path``; None: the one that ships with kpmd.

    Raises ConfigError.
    """
    try:
        if path is None:
            return DenyList.parse(files("kpmd").joinpath("deny.txt").read_text("utf-8"))
        return DenyList.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path or 'deny.txt'}: {error}") from error


def load(path: Path | None, **arguments: object) -> Config:
    """The configuration of the file at ``path`` and of the arguments that are not None.

    ``path`` None: ``/etc/kpmd/kpmd.toml``, or the defaults where it is not there.
    Raises ConfigError.
    """
    data: dict[str, object] = {}
    if path is None and DEFAULT_CONFIG.exists():
        path = DEFAULT_CONFIG
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
    data.update({name: value for name, value in arguments.items() if value is not None})
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}"
            for each in error.errors(include_url=False)
        ]
        raise ConfigError(f"{path or 'arguments'}: " + "; ".join(lines)) from error
    if config.tracing is not None and not all(map(_is_installed, _TRACING_NEEDS)):
        raise ConfigError(
            f"{path}: [tracing] needs the OpenTelemetry SDK, which is not installed: "
            "pip install 'kpmd[tracing]', or take the section out"
        )
    return config


def _is_installed(module: str) -> bool:
    """Whether it could be imported; it is not."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
