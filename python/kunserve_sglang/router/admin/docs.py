"""`/kunserve/openapi.json`, and `/docs`: the same as a page that needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from kunserve_sglang.api.calls import CALLS
from kunserve_sglang.router.admin.access import Keys
from kunserve_sglang.router.admin.openapi import build_document
from kunserve_sglang.router.http.answers import json_answer

Schema = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code { font: .9em/1.4 ui-monospace, monospace; background: var(--soft); padding: .1em .3em }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem }
h3 { margin: 2rem 0 .3rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0 }
th { font-weight: 600 } td { border-top: 1px solid var(--line) }
"""

_HEADERS = {
    # A promise that the browser keeps: nothing is fetched and nothing is run.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


class Docs:
    """What the admin API says of itself; made once, since it never changes while a router runs."""

    def __init__(self, keys: Keys) -> None:
        self._document = build_document(CALLS, keys)
        self._page = render_page(self._document)

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        return json_answer(self._document)

    async def page(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        return HTMLResponse(self._page, headers=_HEADERS)


def render_page(document: Schema) -> str:
    """An OpenAPI document as one HTML page without scripts, links to other hosts or images."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1><p>{_text(info['description'])}</p>",
        '<p>For programs: <a href="/kunserve/openapi.json">/kunserve/openapi.json</a></p>',
        "<h2>Calls</h2>",
        *_calls(document),
        "<h2>Types</h2>",
        *_types(document["components"]["schemas"]),
        "</body></html>",
    ]
    return "\n".join(parts)


def _calls(document: Schema) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name = f"{method.upper()} {path}"
            yield f'<h3 id="{escape(operation["operationId"])}"><code>{escape(name)}</code></h3>'
            yield f"<p>{_text(operation['summary'])}{_needs(operation)}</p>"
            yield _table(_call_rows(operation))


def _needs(operation: Schema) -> str:
    schemes = [name.removesuffix("Key") for need in operation.get("security", ()) for name in need]
    return f" Needs the {' or the '.join(map(escape, schemes))} key." if schemes else ""


def _call_rows(operation: Schema) -> Iterator[tuple[str, str, str]]:
    for parameter in operation.get("parameters", ()):
        about = _text(parameter["description"])
        name = escape(parameter["name"])
        shown = f"{{{name}}}" if parameter["in"] == "path" else f"?{name}="
        yield f"<code>{shown}</code>", _type(parameter["schema"]), about
    if "requestBody" in operation:
        body = operation["requestBody"]
        yield "body", _type(_json_schema(body)), "" if body["required"] else "may be left out"
    for status, answer in operation["responses"].items():
        yield escape(status), _type(_json_schema(answer)), _text(answer["description"])


def _types(schemas: Mapping[str, Schema]) -> Iterator[str]:
    for name, schema in sorted(schemas.items()):
        yield f'<h3 id="type-{escape(name)}">{escape(name)}</h3>'
        yield f"<p>{_text(schema.get('description', ''))}</p>"
        if "properties" not in schema:
            yield f"<p>{_type(schema)}</p>"
            continue
        required = schema.get("required", ())
        yield _table(
            (
                f"<code>{escape(field)}</code>",
                _type(of_field),
                ("" if field in required else "may be missing. ")
                + _text(of_field.get("description", "")),
            )
            for field, of_field in schema["properties"].items()
        )


def _table(rows: Iterator[tuple[str, str, str]]) -> str:
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _json_schema(content: Schema) -> Schema:
    schema: Schema = content["content"]["application/json"]["schema"]
    return schema


def _type(schema: Schema) -> str:
    """A type in a few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#type-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type, schema['prefixItems']))}]"
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    return escape(schema.get("type", "anything")) + _limits(schema)


def _limits(schema: Schema) -> str:
    signs = {
        "minimum": "&ge;",
        "exclusiveMinimum": "&gt;",
        "maximum": "&le;",
        "exclusiveMaximum": "&lt;",
    }
    said = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    if "default" in schema:
        said.append(f"default {escape(str(schema['default']))}")
    return f" ({', '.join(said)})" if said else ""


def _text(words: str) -> str:
    """Prose with `code` in it, as HTML."""
    pieces = escape(words).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(pieces))
