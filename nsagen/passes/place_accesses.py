"""place_accesses: base rows, guards and index widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nsagen.errors import Refused
from nsagen.ir.graph import START
from nsagen.ir.plan import WALK_QUERIES, Access, Choice, Kernel, Operand, Plan
from nsagen.sym import Expr

CALLERS = ("q", "k", "v")  # operands whose strides are the caller's: anything up to 2⁶³
ROWS = 256  # more than any tile has
MAPS = Choice(
    "tensor_maps", "a listed block is boxes of rows: copied by one thread each, while a few warps compute (TMA)"
)


@dataclass(frozen=True)
class PlaceAccesses:
    """Give every operand its base row in the packed layout, its guard, and the width of its offsets in a tile.

    32 bits iff rows · Hq · dim < 2³¹ for every tile, and the strides are ours; a base is always 64-bit. A tile
    held throughout is guarded whole; a walked one only on segments that carry the extent's mask: the rest is proved.
    Keys that a query finds by a list come by tensor maps.
    before  operand k
    after   access k = %k_cmp: rows from start // 16, guard segment, 64-bit
    """

    name = "place_accesses"

    def run(self, plan: Plan) -> Plan:
        if ROWS * plan.heads.query * max(plan.heads.qk_dim, plan.heads.v_dim) >= 2**31:
            raise Refused("a tile's rows pass 2³¹ elements")
        bound: dict[tuple[str, str], list[str]] = {}
        for launch in (launch for op in plan.ops for launch in op.launches):
            for operand, buffer in launch.binds:
                bound.setdefault((launch.kernel, operand), []).append(buffer)
        return replace(plan, kernels=tuple(_placed(k, bound) for k in plan.kernels))


def _placed(kernel: Kernel, bound: dict[tuple[str, str], list[str]]) -> Kernel:
    accesses = tuple(_access(kernel, o, bound) for o in kernel.operands)
    choices = (*kernel.choices, MAPS) if any(a.map for a in accesses) else kernel.choices
    return replace(kernel, accesses=accesses, choices=choices)


def _access(kernel: Kernel, operand: Operand, bound: dict[tuple[str, str], list[str]]) -> Access:
    buffers = tuple(dict.fromkeys(bound.get((kernel.name, operand.name), ())))
    bits = 64 if operand.role in CALLERS else 32
    return Access(
        operand.name, buffers, _base(kernel, operand), _guard(kernel, operand), bits, _mapped(kernel, operand)
    )


def _mapped(kernel: Kernel, operand: Operand) -> bool:
    """A cache's rows may lie in pages, and what a key tile walks is gathered: neither is a box."""
    return operand.role in ("k", "v") and kernel.mapped(operand.source)


def _guard(kernel: Kernel, operand: Operand) -> Literal["tile", "segment"]:
    """The walked side of a kernel: keys of a query tile, queries of a key tile."""
    walked = "query" if kernel.body in WALK_QUERIES else "key"
    if not kernel.walks or operand.rows != walked or operand.mode != "load":
        return "tile"
    return "segment"


def _base(kernel: Kernel, operand: Operand) -> Expr:
    if operand.rows == "query" or not kernel.walks:
        return START
    return next(w.axis for w in kernel.walks if w.source == operand.source).base()
