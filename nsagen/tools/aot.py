"""Kernels ahead of time: compiled for a chip that need not be here, with what the compiler says of them.

A kernel's parameters follow one frame (the templates' contract with the plan): a pointer for each operand, in the
plan's order; over tiles also cu_ptr, T, tiles, sequences, scale, three strides for each operand that the caller
lays out, and key_rows for a key tile; over flat rows only `rows`; then the compile-time ones by name.
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
STRIDED = ("q", "k", "v")  # operands whose strides are the caller's


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
    signature = Signature()
    compile_time = _compile_time(job)
    runtime = _runtime(job, plan)
    names: list[str] = [p.name for p in function.params if not p.is_constexpr]
    if len(names) != len(runtime):
        frame = f"{len(runtime)} by the plan, but {len(names)} in the module: {', '.join(names)}"
        raise CompileError(f"kernel {job.kernel.name}: its arguments are {frame}")
    values = iter(runtime)
    for index, parameter in enumerate(function.params):
        if parameter.is_constexpr and parameter.name not in compile_time:
            raise CompileError(f"kernel {job.kernel.name}: nothing sets its parameter {parameter.name}")
        kind, aligned = ("constexpr", False) if parameter.is_constexpr else next(values)
        signature.types[parameter.name] = kind
        if kind == "constexpr":
            signature.constants[(index,)] = compile_time.get(parameter.name)
        elif aligned:
            signature.attributes[(index,)] = [["tt.divisibility", 16]]
    return signature


def _compile_time(job: Job) -> dict[str, Any]:
    """float32 dots in full precision, torch's default."""
    tile, launch = job.tile, job.launch
    return {
        "BM": tile.bm, "BN": tile.bn, "PRECISION": "ieee", "GATE": launch.gate, "ACCUMULATE": launch.accumulate
    }  # fmt: skip


def _runtime(job: Job, plan: Plan) -> list[tuple[str, bool]]:
    """(type, whether 16 divides it) of every argument that is no constant by its name."""
    bound = dict(job.launch.binds)
    arguments = [_pointer(o, bound, job, plan) for o in job.kernel.operands]
    if not job.kernel.walks:
        return [*arguments, ("i32", False)]
    # cu_ptr is None: one sequence a batch entry. Lengths are never specialised.
    arguments += [("constexpr", False), *[("i32", False)] * 3, ("fp32", False)]
    for operand in job.kernel.operands:
        if operand.role in STRIDED:
            arguments += _strides(operand, plan)
    return [*arguments, *([("i32", False)] if job.kernel.body == "attend_dkv" else [])]


def _pointer(operand: Operand, bound: dict[str, str], job: Job, plan: Plan) -> tuple[str, bool]:
    if operand.name not in bound:
        return ("constexpr", False)  # an optional operand left out is None
    dtype = plan.buffer(bound[operand.name]).dtype
    kept = {"float32": "fp32", "int32": "i32"}
    return (f"*{kept.get(dtype, DTYPES[job.dtype][0])}", True)  # gates are in the inputs' dtype here


def _strides(operand: Operand, plan: Plan) -> list[tuple[str, bool]]:
    """Of a contiguous [B, rows, heads, dim] whose row count is anything."""
    h = plan.heads
    dim = h.v_dim if operand.role == "v" else h.qk_dim
    row = dim * (h.query if operand.role == "q" else h.kv)
    return [("i32", row % 16 == 0), ("i32", row % 16 == 0), ("i32", dim % 16 == 0)]


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
