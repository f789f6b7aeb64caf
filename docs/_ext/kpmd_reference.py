"""Directives that make parts of the reference from what the code says, so that they cannot differ.

``kpmd-api``: the calls of one tag of openapi.yaml; ``kpmd-shapes``: the bodies and answers;
``kpmd-errors``: the errors of kpmd/errors.py with what clients make of them; ``kpmd-metrics``: the
numbers of kpmd/api/metric_table.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kpmd import errors
from kpmd.api.metric_table import METRICS
from kpmd.client import errors as raised
from kpmd.kpmctl import failures

CONTRACT = Path(__file__).parents[2] / "openapi.yaml"
METHODS = ("get", "post", "put", "delete")


class Generated(SphinxDirective):
    """A directive whose content is Markdown that is made when the page is read."""

    def lines(self) -> Iterator[str]:
        """Lines of MyST."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Parse them, headings too."""
        source = str(CONTRACT)
        self.env.note_dependency(source)
        return self.parse_text_to_nodes("\n".join(self.lines()), allow_section_headings=True)


class Api(Generated):
    """``{kpmd-api} TAG``: the calls that have the tag."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        """The calls, in the order of the document."""
        for path, methods in contract()["paths"].items():
            for method in METHODS:
                call = methods.get(method)
                if call and self.arguments[0] in call["tags"]:
                    yield from _call(method.upper(), path, call)


class Shapes(Generated):
    """``{kpmd-shapes}``: the bodies and answers that the calls name, each with its members."""

    def lines(self) -> Iterator[str]:
        """A table for each."""
        for name, schema in contract()["components"]["schemas"].items():
            yield from ("", f"({_target(name)})=", f"## {name}", "", schema.get("description", ""))
            yield ""
            members = schema.get("properties", {})
            if members:
                yield from ("| member | type | |", "|---|---|---|")
            for member, what in members.items():
                given = member in schema.get("required", ())
                if name.endswith(("Body", "Lifetime")):
                    must = "required" if given else _default(what)
                else:
                    must = "" if given else "may be missing"
                told = what.get("description", "")
                yield _row(f"`{member}`", _type(what), ". ".join(filter(None, (must, told))))


class Errors(Generated):
    """``{kpmd-errors}``: a row for each kind."""

    def lines(self) -> Iterator[str]:
        """By status."""
        yield from ("| kind | status | when | `kpmctl` | `kpmd.client` |", "|---|---|---|---|---|")
        kinds = {each.kind: each for each in _subclasses(errors.KpmdError)}
        for kind, each in sorted(kinds.items(), key=lambda item: (item[1].status, item[0])):
            when = (each.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
            caught = raised.ApiError(kind, each.status, "", {})
            yield _row(
                f"`{kind}`",
                str(each.status),
                " ".join(when.replace("``", "`").split()),
                str(failures.status(caught)),
                f"`{_exception(kind)}`",
            )


class Metrics(Generated):
    """``{kpmd-metrics}``: a row for each number that ``GET /metrics`` tells."""

    def lines(self) -> Iterator[str]:
        """In the order in which they are told."""
        yield from ("| name | type | labels | |", "|---|---|---|---|")
        for each in METRICS:
            labels = ", ".join(f"`{label}`" for label in each.labels)
            yield _row(f"`{each.name}`", each.kind, labels, each.help)


def _exception(kind: str) -> str:
    return type(raised.ApiError.from_problem(500, {"kind": kind})).__name__


def _subclasses(base: type[errors.KpmdError]) -> Iterator[type[errors.KpmdError]]:
    for each in base.__subclasses__():
        yield each
        yield from _subclasses(each)


def contract() -> Any:
    """The OpenAPI document."""
    return yaml.safe_load(CONTRACT.read_text(encoding="utf-8"))


def _call(method: str, path: str, call: dict[str, Any]) -> Iterator[str]:
    yield from ("", f"## `{method} {path}`", "", f"{call['summary']}.", "")
    yield call.get("description", "")
    yield ""
    parameters = call.get("parameters", [])
    if parameters:
        yield from ("| parameter | in | type | |", "|---|---|---|---|")
    for each in parameters:
        schema = each["schema"]
        must = "required" if each.get("required") else _default(schema)
        told = ". ".join(filter(None, (must, each.get("description", ""))))
        yield _row(f"`{each['name']}`", each["in"], _type(schema), told)
    yield ""
    if "requestBody" in call:
        yield f"Body: {_content(call['requestBody'])}."
    answers, refusals = [], []
    for status, answer in call["responses"].items():
        if int(status) < 300:
            told = _content(answer) or "nothing"
            if answer["description"] != call["summary"]:
                told = f"{told}. {answer['description'].rstrip('.')}"
            answers.append(f"{told} ({status})")
        else:
            refusals.append(f"{answer['description']} ({status})")
    yield from ("", f"Answer: {'; or '.join(answers)}.")
    if refusals:
        yield from ("", f"[Errors](errors.md): {', '.join(refusals)}.")


def _content(body: dict[str, Any]) -> str:
    shown = []
    for media, what in body.get("content", {}).items():
        kind = _type(what["schema"]) if what.get("schema") else ""
        shown.append(kind if media == "application/json" and kind else f"`{media}` {kind}".strip())
    return " or ".join(shown)


def _target(schema: str) -> str:
    return f"shape-{schema.lower()}"


def _type(schema: dict[str, Any]) -> str:
    """A type in words; shapes are links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{_target(name)})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            given = [each for each in schema[several] if each.get("type") != "null"]
            return " or ".join(dict.fromkeys(map(_type, given)))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        kind = f"list of {_type(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"object of {_type(schema['additionalProperties'])}"
    bounds = [f"{word} {schema[name]}" for name, word in _BOUNDS.items() if name in schema]
    return f"{kind} ({', '.join(bounds)})" if bounds else kind


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "minLength": "length at least",
    "maxLength": "length at most",
    "minItems": "at least, items:",
    "maxItems": "at most, items:",
    "maxProperties": "at most, members:",
}


def _default(schema: dict[str, Any]) -> str:
    default = schema.get("default")
    return "" if default in (None, [], {}) else f"default `{json.dumps(default)}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(each.split()).replace('|', '&#124;') for each in cells)} |"


def setup(app: Sphinx) -> dict[str, Any]:
    """Make them known to Sphinx."""
    app.add_directive("kpmd-api", Api)
    app.add_directive("kpmd-shapes", Shapes)
    app.add_directive("kpmd-errors", Errors)
    app.add_directive("kpmd-metrics", Metrics)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
