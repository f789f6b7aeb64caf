"""Errors as messages on stderr and as exit statuses."""

from __future__ import annotations

import click

from kpmd.client.errors import ApiError, ClientError, ConnectionFailed
from kpmd.kpmctl.output import clean

OTHER = 1
UNREACHABLE = 3
FORBIDDEN = 4
NOT_FOUND = 5
NOT_SUPPORTED = 6
INVALID = 7
REFUSED = 8

_STATUS = {
    "shutting-down": UNREACHABLE,
    "forbidden": FORBIDDEN,
    "not-found": NOT_FOUND,
    "not-supported": NOT_SUPPORTED,
    **dict.fromkeys(
        (
            "invalid",
            "malformed",
            "symbol-not-found",
            "address-not-traceable",
            "bad-object",
            "wrong-attach-type",
            "verifier-rejected",
        ),
        INVALID,
    ),
    **dict.fromkeys(("conflict", "gone", "quota", "too-large"), REFUSED),
}

#: Lines of the verifier's log that are shown: it says what is wrong at its end.
_LOG_LINES = 20

#: Names of functions that are shown where many are refused.
_NAMES = 10

#: What to do where the kernel lacks a feature, by a word of the daemon's message.
_ALTERNATIVES = {
    "kprobe_session": "instead, load it with --attach kprobe_multi and attach it twice: "
    "with --kind kprobe and with --kind kretprobe",
    "kprobe_multi": "older kernels have only single kprobes, which kpmd does not make",
}


def status(error: ClientError) -> int:
    """The exit status for an error."""
    if isinstance(error, ConnectionFailed):
        return FORBIDDEN if error.reason == "permission" else UNREACHABLE
    if isinstance(error, ApiError):
        return _STATUS.get(error.kind, OTHER)
    return OTHER


def report(error: Exception) -> int | None:
    """Say on stderr what went wrong. Returns the exit status; None for what nobody expected."""
    if not isinstance(error, ClientError):
        return None
    lines = [str(error)]
    if isinstance(error, ApiError):
        lines += _more(error)
    text = "\n".join(f"kpmctl: {line}" if not i else f"  {line}" for i, line in enumerate(lines))
    click.echo(clean(text, keep="\n"), err=True)
    return status(error)


def _more(error: ApiError) -> list[str]:
    """What the problem document has beside its one sentence."""
    lines = _errors(error)
    lines += [text for text in _strings(error.problem.get("addresses")) if text not in error.detail]
    for member in ("errno", "needs", "rule", "request"):
        value = error.problem.get(member)
        if isinstance(value, str) and value and value not in error.detail:
            lines.append(f"{member}: {value}")
    if error.kind == "forbidden":
        lines += _forbidden(error)
    if error.kind == "quota":
        lines += _quota(error)
    if error.kind == "not-supported":
        told = f"{error.detail} {error.problem.get('needs')}"
        lines += [text for word, text in _ALTERNATIVES.items() if word in told][:1]
    log = error.problem.get("verifier_log")
    if isinstance(log, str) and log:
        lines += _log_end(log, error.problem.get("verifier_log_truncated") is True)
    return lines


def _errors(error: ApiError) -> list[str]:
    found = error.problem.get("errors")
    items = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    if error.kind == "symbol-not-found":
        lines = [str(each.get("msg")) for each in items]
        total = error.problem.get("symbols_total")
        if isinstance(total, int) and total > len(lines) > 0:
            lines.append(f"… and {total - len(lines)} more")
        return lines
    if len(items) < 2:  # one is what the sentence says
        return []
    return [
        f"{'.'.join(str(part) for part in each.get('loc') or ())}: {each.get('msg')}"
        for each in items
    ]


def _forbidden(error: ApiError) -> list[str]:
    """What was refused, as far as there is more of it than the sentence names; and what to do."""
    refused = _strings(error.problem.get("refused"))
    lines = [f"refused: {', '.join(refused)}"] if len(refused) > 1 else []
    names = _strings(error.problem.get("symbols"))[:_NAMES]
    total = error.problem.get("symbols_total")
    if len(names) > 1:
        more = total - len(names) if isinstance(total, int) else 0
        lines.append(f"refused: {', '.join(names)}{f' and {more} more' if more > 0 else ''}")
    if "rule" in error.problem:
        lines.append("`kpmctl policy show` tells what the policy lets you do")
    return lines


def _quota(error: ApiError) -> list[str]:
    limit, used, most = (error.problem.get(each) for each in ("limit", "used", "most"))
    if not isinstance(limit, str):
        return []
    told = [] if limit in error.detail else [f"{limit}: {used} used of {most}"]
    return [*told, "`kpmctl policy show` tells how much you may have, and what of it is used"]


def _log_end(log: str, truncated: bool) -> list[str]:
    lines = log.expandtabs().splitlines()
    shown = lines[-_LOG_LINES:]
    cut = truncated or len(shown) < len(lines)
    return ["the end of the verifier's log:" if cut else "the verifier's log:"] + [
        f"  {line}" for line in shown
    ]


def _strings(found: object) -> list[str]:
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
