"""Layer 3: YAML with its places kept -> checked spec -> forward graph; the registry of branch kinds."""

from nsagen.spec.check import load_spec, parse_spec, spec_from_dict
from nsagen.spec.model import Heads, Spec
from nsagen.spec.registry import BranchKind, Options, kind, kinds, register, unregister
from nsagen.spec.schema import json_schema

__all__ = [
    "BranchKind", "Heads", "Options", "Spec", "json_schema", "kind", "kinds", "load_spec", "parse_spec", "register",
    "spec_from_dict", "unregister",
]  # fmt: skip
