"""A kernel's arguments as Triton's compiler wants them: types, constants and alignment, from the plan.

What a parameter is follows from the plan: X_ptr holds the buffer that the launch binds to the operand X, X_sb, X_st,
X_sh and X_sp (of parts) are that operand's strides, X_map0 and X_map1 its tensor maps. What is left are scalars of the
launch, never specialised, and int32 indices that the host makes of cu_seqlens and block lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nsagen.errors import CompileError
from nsagen.ir.graph import Select
from nsagen.ir.plan import BY_KEYS, Kernel, Launch, Operand, Plan, TileConfig
from nsagen.passes.machine import ARCHES
from nsagen.passes.specialise import GROUP_ROWS
from nsagen.tools.aot_chips import candidates

DTYPES = {"bf16": ("bf16", 16), "fp16": ("fp16", 16), "fp32": ("fp32", 32)}  # name -> Triton's, operand bits
CALLERS = ("q", "k", "v")  # operands whose strides are the caller's
ALIASES = {"do": "d_out", "score": "scores", "combined": "out"}  # short names in kernels
ABSENT = ("cu", "table", "rows", "starts")  # one sequence a batch entry, its keys in a row, in q's dtype; φ a mean
PARTS_OF_PHI = {"closing": "*fp32", "arrived": "*i32"}
CLOSING = "closing"  # the operand of a kernel in which φ is an MLP
INDICES = ("list", "first", "items", "past", "lengths", "entries", "counts")  # int32: of block lists, or of a cache
EARLY = ("sm_90", "sm_100")  # where a step's launches may overlap
MAPS = tuple(a.name for a in ARCHES if a.maps)
LENGTH = 65536  # tokens, where a compile-time size depends on them


@dataclass(frozen=True)
class Job:
    """One kernel in one tile configuration for one architecture and dtype."""

    kernel: Kernel
    launch: Launch
    arch: str
    dtype: str
    tile: TileConfig


@dataclass
class Signature:
    """Triton's view of a kernel's arguments; the indices are the parameters'."""

    types: dict[str, str] = field(default_factory=dict)
    constants: dict[tuple[int, ...], Any] = field(default_factory=dict)
    attributes: dict[tuple[int, ...], Any] = field(default_factory=dict)


def signature_of(function: Any, job: Job, plan: Plan) -> Signature:
    """Types, constants and alignment of the kernel's arguments, from the plan's operands and buffers."""
    signature, constants = Signature(), _constants(job, plan)
    for index, parameter in enumerate(function.params):
        name: str = parameter.name
        if parameter.has_default:  # of a launch that does more
            kind, aligned = "constexpr", False
            constants[name] = parameter.default
        elif parameter.is_constexpr:
            if name not in constants:
                raise CompileError(f"kernel {job.kernel.name}: nothing sets its parameter {name}")
            kind, aligned = "constexpr", False
        else:
            kind, aligned = _argument(name, job, plan)
        signature.types[name] = kind
        if kind == "constexpr":
            signature.constants[(index,)] = constants.get(name)
        elif aligned and not parameter.do_not_specialize:
            signature.attributes[(index,)] = [["tt.divisibility", 16]]
    return signature


def _constants(job: Job, plan: Plan) -> dict[str, Any]:
    """float32 dots in full precision, torch's default; a selection among the blocks of LENGTH tokens."""
    from nsagen.runtime import split

    tile, launch, select, group = job.tile, job.launch, job.kernel.select, plan.heads.group
    constants = {
        "BM": tile.bm,
        "BN": tile.bn,
        "STAGES": tile.stages,
        "PRECISION": "ieee",
        "ACCUMULATE": launch.accumulate,
        "LEAVES": launch.leaves,
        "APART": True,
        "PAGE": 1,
        "EARLY": job.arch in EARLY,
        "TILES": 1,  # of a listed block
        "PIECES": 1,  # of an item
        "TOKENS": 1,  # of a step
        "K_HIDDEN": 2 * plan.heads.qk_dim if _closes(job) else 0,
        "V_HIDDEN": 2 * plan.heads.v_dim if _closes(job) else 0,
        "ROWS": split.merged_rows(split.MOST_RUNS),
        **dict.fromkeys(_splits(job.kernel), split.MOST_RUNS),
    }
    if select is None:
        return constants
    count, tile = _candidates(select), _scored_tile(job, select, plan)
    if job.kernel.body == "split_select":
        count = 2 * split.MOST_RIDING  # of fewer none is launched
    of = split.shares(False, count, group, select.count, warps_of(job), tile)
    sizes = {"CANDIDATES": count, "TOGETHER": of.together, "TILE": tile}
    return constants | sizes | {"SCORED": of.launched, "HEATS": of.heats}


def _scored_tile(job: Job, select: Select, plan: Plan) -> int:
    """Groups of a key tile of the decoding kernel that scores, in its first choice; 1 where sums are of single keys."""
    if select.grouped == 1 or not job.kernel.body.startswith("split_"):
        return 1
    if job.kernel.body == "split_whole":
        return job.tile.bn // select.grouped
    scores = next(k for k in plan.kernels if k.body == "split_attend" and k.select)
    return candidates(scores, job.arch, DTYPES[job.dtype][1])[0].bn // select.grouped


def _splits(kernel: Kernel) -> list[str]:
    """Constants that say how many parts there are at most: of the launch before, of each lane of a merge."""
    return ["SPLITS", *(o.name.replace("parts", "SPLITS", 1) for o in kernel.operands if o.role == "parts")]


def _candidates(select: Select) -> int:
    from nsagen.runtime.launch import power_of_two

    return power_of_two(-(-LENGTH // select.size))


def warps_of(job: Job) -> int:
    """The tile's warps; a selection takes as many as its candidates need, as the launch does."""
    from nsagen.runtime import launch, split

    select = job.kernel.select
    if select and job.kernel.body == "select_blocks":
        return launch.warps_for(_candidates(select))
    if select and job.kernel.body == "split_select":
        return split.SELECT_WARPS
    return split.MERGE_WARPS if job.kernel.body == "split_merge" else job.tile.warps


def _argument(name: str, job: Job, plan: Plan) -> tuple[str, bool]:
    """(type, whether 16 divides it) of an argument at run time; an absent one is the constant None."""
    stem, _, what = name.rpartition("_")
    if what == "ptr":
        return _pointer(stem, job, plan)
    if what.startswith("map"):
        return _map(stem, int(what[3:]), job, plan), False
    if what in ("sb", "st", "sh", "sp"):
        return "i32", _aligned(_operand(stem, job.kernel), what, plan)
    return ("fp32" if name == "scale" else "i32"), name == "groups"


def _map(stem: str, part: int, job: Job, plan: Plan) -> str:
    group, keys = plan.heads.group, job.kernel.body in BY_KEYS
    if stem in ("q", "do"):
        tokens = GROUP_ROWS // group if keys or job.kernel.body == "select_scores" else 1
        return _boxes(DTYPES[job.dtype][0], [1, tokens, group, 64])
    operand = _operand(stem, job.kernel)
    known = job.arch in MAPS and DTYPES[job.dtype][1] == 16
    width = (job.kernel.v_parts if stem.startswith("v") else job.kernel.qk_parts)[part]
    if job.tile.specialised:
        return _boxes(DTYPES[job.dtype][0], [1, GROUP_ROWS if keys else job.tile.bn, 1, width])
    if not known or operand is None or not job.kernel.mapped(operand.source, job.tile.bn):
        return "constexpr"  # None
    return f"tensordesc<{DTYPES[job.dtype][0]}[1, {job.tile.bn}, 1, {width}]>"


def _boxes(dtype: str, box: list[int]) -> str:
    """A tensor map in Gluon, which says how its boxes lie in shared memory."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout.get_default_for(box, gl.float16 if dtype == "fp16" else gl.bfloat16)
    return f"tensordesc<{dtype}{box},{layout!r}>"


def _pointer(stem: str, job: Job, plan: Plan) -> tuple[str, bool]:
    if stem in ABSENT or stem.endswith("_scales") or stem.startswith("staged_"):
        return "constexpr", False  # None
    if stem in PARTS_OF_PHI or stem.startswith("phi_"):
        return (PARTS_OF_PHI.get(stem, "*" + DTYPES[job.dtype][0]), True) if _closes(job) else ("constexpr", False)
    if stem == "lost":
        return "*i1", True
    operand = _operand(stem, job.kernel)
    if stem in INDICES:
        return "*i32", True
    if operand is None:
        raise CompileError(f"kernel {job.kernel.name}: no operand of the plan is behind its parameter {stem}_ptr")
    bound = dict(job.launch.binds)
    if operand.name not in bound:
        return "constexpr", False  # an optional operand left out is None
    kept = {"float32": "fp32", "int32": "i32"}  # the rest, gates too, is in the inputs' dtype here
    return "*" + kept.get(plan.buffer(bound[operand.name]).dtype, DTYPES[job.dtype][0]), True


def _closes(job: Job) -> bool:
    return any(o.name == CLOSING for o in job.kernel.operands)


def _operand(stem: str, kernel: Kernel) -> Operand | None:
    """The operand that a parameter's stem means; a kernel numbers its terms and deltas even where there is one."""
    operands = {o.name: o for o in kernel.operands}
    return next((operands[x] for x in (stem, ALIASES.get(stem, ""), stem.removesuffix("0")) if x in operands), None)


def _aligned(operand: Operand | None, what: str, plan: Plan) -> bool:
    """Whether 16 divides an operand's stride: of scores, whose rows the host pads, always."""
    if operand is None or operand.role == "scores":
        return operand is not None
    return operand.role in CALLERS and _stride(operand, what, plan) % 16 == 0


def _stride(operand: Operand, what: str, plan: Plan) -> int:
    """Of a contiguous [B, rows, heads, dim] whose row count is anything."""
    h = plan.heads
    dim = h.v_dim if operand.role == "v" else h.qk_dim
    return dim if what == "sh" else dim * (h.query if operand.role == "q" else h.kv)
