"""Kernels ahead of time: compiled for a chip that need not be here, with what the compilers say of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from nsagen.errors import CompileError
from nsagen.ir.plan import SHARED, Kernel, Launch, Plan, TileConfig
from nsagen.tools.aot_chips import CHIPS, TENSOR_MEMORY, Chip, candidates
from nsagen.tools.aot_listing import Listing, amd, nvidia, ptxas_log
from nsagen.tools.aot_step import step_kernels
from nsagen.tools.signature import DTYPES, Job, signature_of, warps_of


@dataclass(frozen=True)
class Report:
    """What the compilers made of a job, no listing where they made nothing. Too large for the chip is an error, too."""

    job: Job
    listing: Listing | None = None
    smem: int | None = None  # bytes a block
    error: str | None = None

    @property
    def spills(self) -> bool:
        """More than it is known to."""
        x = self.listing
        return x is not None and x.spill_stores + x.spill_loads > self.job.tile.spills

    @property
    def failed(self) -> bool:
        return self.error is not None or self.spills


def jobs_of(plan: Plan, arch: str, dtype: str, all_candidates: bool = False) -> list[Job]:
    """The first choice of a kernel, in each form, or all that survive; of a step's own those that it takes."""
    bits = DTYPES[dtype][1]
    jobs: list[Job] = []
    for kernel in plan.kernels:
        tiles = candidates(kernel, arch, bits)
        for launch in launches_of(plan, kernel):
            found, bound = _with_riders(plan, kernel, launch)
            chosen = tiles if all_candidates else _first(tiles)
            jobs += [Job(found, _bound_by(kernel, c, bound), arch, dtype, c) for c in chosen]
    return [*jobs, *(Job(kernel, x, arch, dtype, tile) for kernel, x, tile in step_kernels(plan, arch, bits))]


def _first(tiles: list[TileConfig]) -> list[TileConfig]:
    """The first choice, and the first without warps of their own tasks, for launches that cannot take that one."""
    if not tiles or not tiles[0].specialised:
        return tiles[:1]
    return [*tiles[:1], *next(([c] for c in tiles if not c.specialised), [])]


def _bound_by(kernel: Kernel, tile: TileConfig, launch: Launch) -> Launch:
    """The launch; a forward's completes another branch's rows where a warp copies alone."""
    if kernel.body != "attend_fwd" or tile.specialised:
        return launch
    return replace(launch, binds=tuple(b for b in launch.binds if not b[0].endswith("_taken")))


def launches_of(plan: Plan, kernel: Kernel) -> list[Launch]:
    """The launch that asks most of the kernel: the one with most operands bound, gates and all, or keys left out.

    Of a kernel whose programs may share a tile, that of those, too: they store something else.
    """
    launches = plan.launches(kernel.name)
    if not launches:
        raise CompileError(f"kernel {kernel.name}: no operator launches it")
    kinds = [[x for x in launches if (SHARED in x.when) == shared] for shared in (False, True)]
    return [max(some, key=lambda x: (len(x.binds), x.accumulate, x.leaves)) for some in kinds if some]


def _with_riders(plan: Plan, kernel: Kernel, launch: Launch) -> tuple[Kernel, Launch]:
    """Both with what comes for the sake of what may ride on the kernel: operands, and what a selection is of."""
    riders, more = [plan.kernel(x.kernel) for x in plan.riders(kernel.name)], plan.brought(launch)
    operands = {o.name: o for rider in riders for o in rider.operands if o.name in dict(more)}
    select = next((x.select for x in riders if x.select), kernel.select)
    kernel = replace(kernel, operands=(*kernel.operands, *operands.values()), select=select)
    return kernel, replace(launch, binds=(*launch.binds, *more))


def compile_job(module: ModuleType, job: Job, plan: Plan) -> Report:
    """Compile one kernel of an imported module; a compiler's refusal is a report too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    chip, form = CHIPS[job.arch], "_specialised" if job.tile.specialised else ""
    function = getattr(module, job.kernel.name + form)
    s = signature_of(function, job, plan)
    source = (GluonASTSource if form else ASTSource)(function, s.types, s.constants, s.attributes)
    options = {"num_warps": warps_of(job), "num_stages": job.tile.stages}
    options |= {"maxnreg": job.tile.cap} if job.tile.cap else {}
    try:
        built = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.warp), options=options)
    except Exception as error:  # MLIR, LLVM and ptxas each raise their own
        return Report(job, error=_brief(error))
    return Report(job, _listing(built.asm, chip), built.metadata.shared, _excess(built.metadata, chip))


def _listing(asm: Any, chip: Chip) -> Listing:
    if isinstance(chip.arch, str):
        return amd(asm["amdgcn"])
    return nvidia(asm["ptx"], ptxas_log(asm["ptx"], chip.arch))


def _excess(metadata: Any, chip: Chip) -> str | None:
    """What the launch would refuse: nothing before it looks at the chip's sizes."""
    if metadata.shared > chip.smem:
        return f"shared memory {metadata.shared} > {chip.smem}"
    columns = getattr(metadata, "tmem_size", None) or 0
    return f"tensor memory {columns} > {TENSOR_MEMORY} columns" if columns > TENSOR_MEMORY else None


def _brief(error: Exception) -> str:
    """The lines that say what is wrong, out of a compiler's pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fatal|exceed|out of", line, re.IGNORECASE)]
    return f"{type(error).__name__}: {' | '.join((telling or lines)[:3])}"
