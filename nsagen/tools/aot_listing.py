"""What a kernel came to, out of the texts that its compilers leave: PTX and ptxas's log, or AMDGCN."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listing:
    """Counts; None where the chip's compilers do not say, or the chip has no such thing."""

    registers: int  # a thread
    stack: int  # bytes of local memory a thread
    spill_stores: int  # bytes
    spill_loads: int
    wgmma: int = 0
    mma: int = 0
    mfma: int = 0
    scalar_spills: int | None = None  # scalar registers kept in the lanes of vector registers
    warnings: tuple[str, ...] | None = None  # ptxas C75xx: a pipeline of wgmma that it serialises

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads)


def nvidia(ptx: str, log: str) -> Listing:
    """The largest numbers: a log speaks of every function in the file."""
    return Listing(
        registers=_largest(r"Used (\d+) registers", log),
        stack=_largest(r"(\d+) bytes stack frame", log),
        spill_stores=_largest(r"(\d+) bytes spill stores", log),
        spill_loads=_largest(r"(\d+) bytes spill loads", log),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"(?<!wg)mma\.sync|tcgen05\.mma", ptx)),
        warnings=tuple(dict.fromkeys(re.findall(r"\(C75\d\d\)[^\n]*", log))),
    )


def amd(amdgcn: str) -> Listing:
    """From the kernel's metadata, and the comments with which LLVM marks each spill."""
    return Listing(
        registers=_largest(r"\.vgpr_count:\s+(\d+)", amdgcn),
        stack=_largest(r"\.private_segment_fixed_size:\s+(\d+)", amdgcn),
        spill_stores=_sum(r"(\d+)-byte Folded Spill", amdgcn),
        spill_loads=_sum(r"(\d+)-byte Folded Reload", amdgcn),
        mfma=len(re.findall(r"^\s*v_mfma_", amdgcn, re.MULTILINE)),
        scalar_spills=_largest(r"\.sgpr_spill_count:\s+(\d+)", amdgcn),
    )


def ptxas_log(ptx: str, capability: int) -> str:
    """The log of the ptxas that Triton uses, which Triton itself throws away."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory(prefix="nsagen-ptxas-") as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(x) for x in re.findall(pattern, text)]


def _largest(pattern: str, text: str) -> int:
    return max(_numbers(pattern, text), default=0)


def _sum(pattern: str, text: str) -> int:
    return sum(_numbers(pattern, text))
