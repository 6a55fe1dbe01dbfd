"""`nsagen verify`: the generated kernels against the paper's equations, forward, every gradient, every part.

The reference computes in float64 from the same, already rounded, inputs. Outputs are NaN before a launch, so that a
row that no program writes shows.
"""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from nsagen.compiler import Compiled
from nsagen.errors import NsagenError
from nsagen.tools.cases import Case, cases_of, is_large
from nsagen.tools.compare import Result, compare
from nsagen.tools.console import table, track
from nsagen.tools.process import compiled_kernels, interpreted_kernels


@dataclass(frozen=True)
class Request:
    """The command line."""

    spec: str
    lengths: tuple[int, ...] = ()
    dtype: str | None = None
    seed: int = 0
    device: str | None = None
    packed: bool = False


@dataclass(frozen=True)
class Outcome:
    case: Case
    results: tuple[Result, ...]
    error: str | None = None  # of an exception

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(r for r in self.results if not r.good)


def run(compiled: Compiled, request: Request) -> bool:
    """Compare, print the table and every failure with the way to see it again; whether all is well."""
    device = _settle_device(request.device)
    if device == "cpu" and request.dtype == "bf16":
        raise NsagenError("Triton's interpreter multiplies bfloat16 as integers: use --dtype fp16 or fp32, or a GPU")
    dtypes = (request.dtype,) if request.dtype else ("bf16", "fp32") if device == "cuda" else ("fp32",)
    cases = cases_of(compiled.spec, device == "cuda", request.lengths, request.packed, dtypes)
    outcomes = verify(compiled, cases, request.seed, device)
    print(_title(compiled, device))
    if device == "cpu" and is_large(compiled.spec) and not request.lengths:
        print("many wide heads, so few tokens in the interpreter: --length N for others")
    print(text(outcomes))
    for outcome in outcomes:
        print(_failures(outcome, request, device), end="")
    return not any(o.failed or o.error for o in outcomes)


def verify(compiled: Compiled, cases: Sequence[Case], seed: int, device: str) -> list[Outcome]:
    """Every case on its own, from the same seed: one of them alone gives the same numbers."""
    from nsagen.api import module_of
    from nsagen.runtime import launch

    module, poison = module_of(compiled), launch.POISON
    launch.POISON = True
    try:
        return [_outcome(compiled, module, c, seed, device) for c in track(cases, len(cases), "verifying")]
    finally:
        launch.POISON = poison


def _outcome(compiled: Compiled, module: ModuleType, case: Case, seed: int, device: str) -> Outcome:
    """A case that raises is a failed one, and does not keep the others from running."""
    try:
        return Outcome(case, tuple(compare(compiled, module, case, seed, device)))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return Outcome(case, (), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _settle_device(wanted: str | None) -> str:
    """cuda if there is one; else Triton's interpreter, which must be set before triton is imported."""
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise NsagenError("there is no CUDA device: use --device cpu, which runs the kernels in Triton's interpreter")
    device = wanted or ("cuda" if there else "cpu")
    if device == "cuda":
        compiled_kernels()
    else:
        interpreted_kernels()
    return device


def _title(compiled: Compiled, device: str) -> str:
    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter on the CPU"
    return f"{compiled.spec.name} {compiled.digest} on {where}: ‖a − b‖ / max(‖b‖, 10⁻³ · largest gradient norm)"


def text(outcomes: Sequence[Outcome]) -> str:
    """A row a quantity, a column a case; ! where the error passes its bar."""
    names = dict.fromkeys(r.name for o in outcomes for r in o.results)
    found = [{r.name: r for r in o.results} for o in outcomes]
    rows = [[name, *(_cell(results.get(name)) for results in found)] for name in names]
    return table(["", *(f"{o.case.dtype} {o.case.label}" for o in outcomes)], rows)


def _cell(result: Result | None) -> str:
    return "-" if result is None else f"{result.error:.1e}" + ("" if result.good else " !")


def _failures(outcome: Outcome, request: Request, device: str) -> str:
    case = outcome.case
    lines = [f"{r.name} {list(r.shape)}: error {r.error:.2e}, bar {r.bar:.0e}" for r in outcome.failed]
    lines += [f"raised {outcome.error}"] if outcome.error else []
    if not lines:
        return ""
    command = f"nsagen verify {shlex.quote(request.spec)} {case.options} --seed {request.seed} --device {device}"
    told = "\n".join(f"  {line}" for line in lines)
    return f"\nFAILED {case.dtype} {case.label}, seed {request.seed}\n{told}\n  again: {command}\n"
