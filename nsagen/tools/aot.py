"""Kernels ahead of time: compiled for a chip that need not be here, with what the compiler says of them.

What a parameter is follows from the plan: X_ptr holds the buffer that the launch binds to the operand X, X_sb, X_st
and X_sh are that operand's strides. What is left are scalars of the launch, never specialised, and int32 indices that
the host makes of cu_seqlens and block lists.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from nsagen.errors import CompileError
from nsagen.ir.plan import Kernel, Launch, Operand, Plan, TileConfig

ARCHES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
DTYPES = {"bf16": ("bf16", 16), "fp16": ("fp16", 16), "fp32": ("fp32", 32)}  # name -> Triton's, operand bits
CALLERS = ("q", "k", "v")  # operands whose strides are the caller's
ALIASES = {"do": "d_out", "score": "scores"}  # short names in kernels
INDICES = ("list", "first", "items")  # int32, made by the host from block lists (runtime/lists.py)
LENGTH = 65536  # tokens, where a compile-time size depends on them


@dataclass(frozen=True)
class Job:
    """One kernel in one tile configuration for one architecture and dtype."""

    kernel: Kernel
    launch: Launch
    arch: str
    dtype: str
    tile: TileConfig


@dataclass(frozen=True)
class Report:
    """What the compilers made of a job; `error` where they made nothing."""

    job: Job
    registers: int = 0
    stack: int = 0  # bytes of local memory a thread
    spill_stores: int = 0  # bytes
    spill_loads: int = 0
    smem: int = 0  # bytes a block
    wgmma: int = 0
    mma: int = 0
    warnings: tuple[str, ...] = ()  # ptxas C75xx: a pipeline of wgmma that it serialises
    error: str | None = None

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads)

    @property
    def failed(self) -> bool:
        return self.error is not None or self.spills


@dataclass
class Signature:
    """Triton's view of a kernel's arguments; the indices are the parameters'."""

    types: dict[str, str] = field(default_factory=dict)
    constants: dict[tuple[int, ...], Any] = field(default_factory=dict)
    attributes: dict[tuple[int, ...], Any] = field(default_factory=dict)


def jobs_of(plan: Plan, arch: str, dtype: str, all_candidates: bool = False) -> list[Job]:
    """The first choice (or every surviving candidate) of every kernel."""
    bits = DTYPES[dtype][1]
    jobs: list[Job] = []
    for kernel in plan.kernels:
        table = next(t for t in kernel.tiles if (t.arch, t.bits) == (arch, bits))
        kept = [c for c in table.configs if c.dropped is None]
        launch = launch_of(plan, kernel)
        jobs += [Job(kernel, launch, arch, dtype, c) for c in (kept if all_candidates else kept[:1])]
    return jobs


def launch_of(plan: Plan, kernel: Kernel) -> Launch:
    """The launch that asks most of the kernel: the one with most operands bound, gates and all."""
    launches = [x for op in plan.ops for x in op.launches if x.kernel == kernel.name]
    if not launches:
        raise CompileError(f"kernel {kernel.name}: no operator launches it")
    return max(launches, key=lambda x: (len(x.binds), x.accumulate))


def signature_of(function: Any, job: Job, plan: Plan) -> Signature:
    """Types, constants and alignment of the kernel's arguments, from the plan's operands and buffers."""
    signature, constants = Signature(), _constants(job)
    for index, parameter in enumerate(function.params):
        name: str = parameter.name
        if parameter.is_constexpr:
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


def _constants(job: Job) -> dict[str, Any]:
    """float32 dots in full precision, torch's default; a selection among the blocks of LENGTH tokens."""
    tile, launch, select = job.tile, job.launch, job.kernel.select
    constants = {
        "BM": tile.bm,
        "BN": tile.bn,
        "PRECISION": "ieee",
        "GATE": launch.gate,
        "ACCUMULATE": launch.accumulate,
    }
    return constants | ({"CANDIDATES": _power_of_two(-(-LENGTH // select.size))} if select else {})


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _argument(name: str, job: Job, plan: Plan) -> tuple[str, bool]:
    """(type, whether 16 divides it) of an argument at run time; an absent one is the constant None."""
    stem, _, what = name.rpartition("_")
    if what == "ptr":
        return _pointer(stem, job, plan)
    if what in ("sb", "st", "sh"):
        operand = _operand(stem, job.kernel)
        return "i32", operand is not None and operand.role in CALLERS and _stride(operand, what, plan) % 16 == 0
    return ("fp32" if name == "scale" else "i32"), False


def _pointer(stem: str, job: Job, plan: Plan) -> tuple[str, bool]:
    if stem == "cu":
        return "constexpr", False  # None: one sequence a batch entry
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


def _operand(stem: str, kernel: Kernel) -> Operand | None:
    """The operand that a parameter's stem means; a kernel numbers its terms and deltas even where there is one."""
    operands = {o.name: o for o in kernel.operands}
    return next((operands[x] for x in (stem, ALIASES.get(stem, ""), stem.removesuffix("0")) if x in operands), None)


def _stride(operand: Operand, what: str, plan: Plan) -> int:
    """Of a contiguous [B, rows, heads, dim] whose row count is anything."""
    h = plan.heads
    dim = h.v_dim if operand.role == "v" else h.qk_dim
    return dim if what == "sh" else dim * (h.query if operand.role == "q" else h.kv)


def compile_job(module: ModuleType, job: Job, plan: Plan) -> Report:
    """Compile one kernel of an imported module; a compiler's refusal is a report too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(module, job.kernel.name)
    s = signature_of(function, job, plan)
    source = ASTSource(function, s.types, s.constants, s.attributes)
    options = {"num_warps": job.tile.warps, "num_stages": job.tile.stages}
    try:
        built = triton.compile(source, target=GPUTarget("cuda", ARCHES[job.arch], 32), options=options)
    except Exception as error:  # MLIR, LLVM and ptxas each raise their own
        return Report(job, error=_brief(error))
    ptx = built.asm["ptx"]
    log = _ptxas(ptx, ARCHES[job.arch])
    return Report(
        job,
        registers=_number(r"Used (\d+) registers", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        smem=built.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"(?<!wg)mma\.sync|tcgen05\.mma", ptx)),
        warnings=tuple(dict.fromkeys(re.findall(r"\(C75\d\d\)[^\n]*", log))),
    )


def _ptxas(ptx: str, capability: int) -> str:
    """The log of the ptxas that Triton uses, which Triton itself throws away."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory(prefix="nsagen-ptxas-") as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _number(pattern: str, log: str) -> int:
    """The largest: a log speaks of every function in the file."""
    return max(map(int, re.findall(pattern, log)), default=0)


def _brief(error: Exception) -> str:
    """The lines that say what is wrong, out of a compiler's pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fatal|exceed|out of", line, re.IGNORECASE)]
    return f"{type(error).__name__}: {' | '.join((telling or lines)[:3])}"
