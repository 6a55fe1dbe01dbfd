"""JSON schema of a spec, for editors."""

from __future__ import annotations

from typing import Any

from nsagen.spec.model import Spec
from nsagen.spec.registry import kinds


def json_schema() -> dict[str, Any]:
    """The schema of the YAML, every registered branch kind with its options."""
    schema = Spec.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    definitions.pop("Options", None)
    properties: dict[str, Any] = {}
    for name, kind in kinds().items():
        options = kind.options.model_json_schema(by_alias=True)
        definitions |= options.pop("$defs", {})
        properties[name] = {**options, "title": name, "description": kind.doc}
    schema["properties"]["branches"] = {
        "type": "object", "properties": properties, "additionalProperties": False, "minProperties": 1,
        "description": "one or more, in the order of the gates",
    }  # fmt: skip
    schema["required"] = ["name", "heads", "branches"]
    definitions["Heads"]["required"] = ["query", "kv", "qk_dim"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "nsagen spec", **schema}
