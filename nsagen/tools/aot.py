"""Kernels ahead of time: compiled for a chip that need not be here, with what the compilers say of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nsagen.errors import CompileError
from nsagen.ir.plan import Kernel, Launch, Plan
from nsagen.tools.signature import DTYPES, Job, signature_of, warps_of

ARCHES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


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


def compile_job(module: ModuleType, job: Job, plan: Plan) -> Report:
    """Compile one kernel of an imported module; a compiler's refusal is a report too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(module, job.kernel.name)
    s = signature_of(function, job, plan)
    source = ASTSource(function, s.types, s.constants, s.attributes)
    options = {"num_warps": warps_of(job), "num_stages": job.tile.stages}
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
