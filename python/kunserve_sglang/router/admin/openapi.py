"""The admin API as an OpenAPI 3.1 document, made from the call table and the types in it."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from kunserve_sglang import __version__
from kunserve_sglang.api.calls import Call
from kunserve_sglang.api.types import ErrorAnswer
from kunserve_sglang.router.admin.access import Holder, Keys

_REFERENCE = "#/components/schemas/{name}"

_SUCCESSES = {200: "Done.", 201: "Added.", 202: "Begun."}

_ABOUT = (
    "What a KunServe cluster does, and doing it by hand. Every other path is SGLang's own, "
    "described by the instances at /openapi.json."
)


def build_document(calls: Sequence[Call], keys: Keys) -> dict[str, Any]:
    """The document, as JSON types; what it says of keys is true for a router with these."""
    types = _types(calls)
    bodies = {c.body for c in calls if c.body is not None}
    asked, schemas = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    schema_of = dict(zip(types, asked, strict=True))
    for name in schemas.keys() - {body.__name__ for body in bodies}:
        _require_what_is_always_there(schemas[name])
    paths: dict[str, dict[str, Any]] = {}
    for call in calls:
        operation = _operation(call, schema_of, keys)
        paths.setdefault(call.path, {})[call.method.lower()] = operation
    holders = sorted({h for call in calls for h in keys.needed(call.access)})
    return {
        "openapi": "3.1.0",
        "info": {"title": "KunServe", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {_scheme(h): {"type": "http", "scheme": "bearer"} for h in holders},
        },
    }


def _types(calls: Sequence[Call]) -> list[Any]:
    """All types that the calls use, each once."""
    used: dict[Any, None] = {ErrorAnswer: None}
    for call in calls:
        of_call = [call.body, *call.answers.values(), *(p.type for p in call.parameters)]
        used.update((kind, None) for kind in of_call if kind is not None)
    return list(used)


def _require_what_is_always_there(schema: dict[str, Any]) -> None:
    """A default means "may be left out" in a body; in an answer the field is always written."""
    properties = schema.get("properties", {})
    always = set(schema.get("required", ()))
    always |= {name for name, field in properties.items() if "default" in field}
    if always:
        schema["required"] = [name for name in properties if name in always]
    for field in properties.values():
        field.pop("default", None)


def _operation(call: Call, schema_of: dict[Any, Any], keys: Keys) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": call.name,
        "summary": call.about,
        "responses": {
            **{str(s): _content(_SUCCESSES[s], schema_of[t]) for s, t in call.answers.items()},
            **{
                str(s): _content(f"{HTTPStatus(s).phrase}.", schema_of[ErrorAnswer])
                for s in _errors(call, keys)
            },
        },
    }
    if call.parameters:
        operation["parameters"] = [
            {
                "name": p.name,
                "in": "path" if p.in_path else "query",
                "required": p.in_path,
                "description": p.about,
                "schema": schema_of[p.type],
            }
            for p in call.parameters
        ]
    if call.body is not None:
        # Without a body a call means the same as with `{}`.
        operation["requestBody"] = {
            "required": any(f.required for f in msgspec.structs.fields(call.body)),
            "content": {"application/json": {"schema": schema_of[call.body]}},
        }
    if needed := keys.needed(call.access):
        operation["security"] = [{_scheme(holder): []} for holder in needed]
    return operation


def _errors(call: Call, keys: Keys) -> list[int]:
    found = set(call.errors)
    if keys.needed(call.access):
        found.add(401)
    if call.body is not None:
        found |= {400, 422}
    if call.parameters:
        found.add(422)
    return sorted(found)


def _content(about: str, schema: Any) -> dict[str, Any]:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _scheme(holder: Holder) -> str:
    return f"{holder}Key"
