"""Structured log lines: one JSON object a line, on the standard library's logging.

Nothing that a client sends can split or forge a line. structlog would do this too, but importing it
costs the daemon 7 MB that it keeps.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any


class Log:
    """A logger whose methods take an event and its fields."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def _log(self, level: int, event: str, error: BaseException | None, fields: Any) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields}, exc_info=error)

    def debug(self, event: str, **fields: Any) -> None:
        """For developers."""
        self._log(logging.DEBUG, event, None, fields)

    def info(self, event: str, **fields: Any) -> None:
        """What happens in the ordinary course of things."""
        self._log(logging.INFO, event, None, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """What an administrator may have to look at."""
        self._log(logging.WARNING, event, None, fields)

    def error(self, event: str, error: BaseException | None = None, **fields: Any) -> None:
        """What must not happen; with the traceback of ``error``."""
        self._log(logging.ERROR, event, error, fields)


class JsonLines(logging.Formatter):
    """A record as one line of JSON, its fields beside event, level and timestamp."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Write JSON lines of ``level`` and above to standard error; those of libraries too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
