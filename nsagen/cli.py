"""Layer 8: the command line. Exit 0 fine, 1 a check failed, 2 bad input. Heavy imports wait inside the commands.

Results go to stdout, diagnostics to stderr, one unwrapped line each.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nsagen.compiler import Compiled
    from nsagen.spec import Spec

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
cache_app = typer.Typer(no_args_is_help=True, help="Where modules and measurements are kept, and removing them.")
app.add_typer(cache_app, name="cache")


class Arch(str, Enum):
    sm_80 = "sm_80"
    sm_90 = "sm_90"
    sm_100 = "sm_100"
    gfx942 = "gfx942"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Half(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"


class KV(str, Enum):
    fp8 = "fp8"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, or a ready spec's name.")]
SpecsArgument = Annotated[list[str], typer.Argument(metavar="SPEC…", help="YAML files, or ready specs' names.")]


def main() -> None:
    app(prog_name="nsagen")


def command(on: typer.Typer, name: str, *examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command with examples in its help; expected errors become clean lines and exit 2."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        lines = "\n\n".join(f"  $ nsagen {example}" for example in examples)
        return on.command(name, epilog=f"[bold]Examples[/bold]\n\n{lines}")(_guarded(function))

    return register


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        from nsagen.errors import NsagenError

        try:
            function(*arguments, **options)
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (NsagenError, OSError) as error:
            _complain(error)
            raise typer.Exit(BAD_INPUT) from None

    return run


def _complain(error: Exception, where: str = "") -> None:
    """A spec's diagnostics with their places; any other error in one line."""
    for diagnostic in getattr(error, "diagnostics", ()) or (None,):
        line = diagnostic.render() if diagnostic else f"{where}error: {' '.join(str(error).split())}"
        typer.echo(line, err=True)


def _read_all(specs: list[str], each: Callable[[str, Spec], None] | None = None) -> list[Spec]:
    """Every spec (each one shown to `each` at once), or exit 2 after the diagnostics of all of them."""
    from nsagen.api import read
    from nsagen.errors import NsagenError

    good: list[Spec] = []
    for name in specs:
        try:
            good.append(read(name))
        except (NsagenError, OSError) as error:
            _complain(error)
        else:
            if each:
                each(name, good[-1])
    if len(good) < len(specs):
        raise typer.Exit(BAD_INPUT)
    return good


def _compiled(spec: str) -> Compiled:
    from nsagen.api import compiled_of, read
    from nsagen.errors import NsagenError

    checked = read(spec)
    try:
        return compiled_of(checked)
    except NsagenError as error:
        _complain(error, f"{spec}: ")
        raise typer.Exit(BAD_INPUT) from None


def _version(wanted: bool) -> None:
    if wanted:
        import nsagen

        typer.echo(f"nsagen {nsagen.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A compiler from a YAML spec of a sparse attention to a Python module of Triton kernels."""


@command(app, "check", "check my_nsa.yaml", "check specs/*.yaml")
def check(specs: SpecsArgument) -> None:
    """Check specs: every mistake in every file, with its place."""
    _read_all(specs, lambda name, spec: typer.echo(f"{name}: ok ({spec.name}: {', '.join(spec.branches)})"))


@command(
    app,
    "build",
    "build nsa_paper",
    "build my_nsa.yaml --out src/kernels",
    "build my_nsa.yaml --standalone",
    "build specs/*.yaml --check",
)
def build(
    specs: SpecsArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where NAME.py goes.")] = Path("generated"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if a file is out of date.")] = False,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="A file that needs torch and triton alone, not nsagen.")
    ] = False,
) -> None:
    """Generate a module from each spec."""
    from nsagen.errors import NsagenError
    from nsagen.tools.build import build_one

    code = 0
    for spec in _read_all(specs):
        try:
            good, text = build_one(spec, out, check, standalone)
        except NsagenError as error:
            _complain(error, f"{spec.name}: ")
            code = BAD_INPUT
        else:
            typer.echo(text)
            code = max(code, 0 if good else FAILED)
    raise typer.Exit(code)


@command(
    app, "explain", "explain nsa_paper", "explain my_nsa.yaml --after split_loops", "explain nsa_paper --plot p.png"
)
def explain(
    spec: SpecArgument,
    after: Annotated[str | None, typer.Option(metavar="PASS", help="Dump the IR after this pass.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="What each pass (or that of --after) changed.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw which keys a query sees.")] = None,
) -> None:
    """Show what was decided and why, what it costs at least, and the IR after any pass."""
    from nsagen.tools import explain as tool

    compiled = _compiled(spec)
    if diff:
        typer.echo(tool.diffs(compiled, after))
    elif after:
        typer.echo(tool.stage_of(compiled, after).text, nl=False)
    elif not plot:
        typer.echo(tool.summary(compiled))
    if plot:
        from nsagen.tools.plot import plot as draw

        typer.echo(f"wrote {draw(compiled.graph, plot)}")


@command(
    app,
    "verify",
    "verify nsa_paper",
    "verify my_nsa.yaml --length 100 --length 333 --seed 7",
    "verify my_nsa.yaml --packed --dtype bf16",
)
def verify(
    spec: SpecArgument,
    length: Annotated[list[int] | None, typer.Option(min=1, metavar="N", help="Tokens; may be repeated.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: fp32, and bf16 too on a GPU.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs.")] = 0,
    device: Annotated[Device | None, typer.Option(help="Default: cuda if there is one.")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Only packed sequences.")] = False,
) -> None:
    """Compare the generated kernels with the reference: outputs, parts and every gradient.

    Without a GPU the kernels run in Triton's interpreter, at short lengths.
    """
    from nsagen.tools.verify import Request, run

    request = Request(spec, tuple(length or ()), dtype and dtype.value, seed, device and device.value, packed)
    if not run(_compiled(spec), request):
        raise typer.Exit(FAILED)


@command(
    app,
    "compile",
    "compile nsa_paper",
    "compile my_nsa.yaml --arch sm_80 --arch sm_90 --arch gfx942",
    "compile nsa_paper --all-candidates --json out.json",
)
def compile_(
    spec: SpecArgument,
    arch: Annotated[list[Arch] | None, typer.Option(help="May be repeated; default sm_90.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of q, k and v.")] = Dtype.bf16,
    all_candidates: Annotated[
        bool, typer.Option("--all-candidates", help="Not only each kernel's first choice.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as JSON too.")] = None,
) -> None:
    """Compile every kernel ahead of time, without a GPU: registers, spills, shared memory, compiler warnings.

    gfx942 (MI300) goes as far as it goes: what is not known of it is said below the table.

    Exit 1 if a kernel's first choice does not compile, does not fit the chip, or spills.
    """
    from nsagen.tools import compile as tool

    reports = tool.compile_all(_compiled(spec), [a.value for a in arch or [Arch.sm_90]], dtype.value, all_candidates)
    typer.echo(tool.text(reports))
    if json:
        tool.write_json(reports, json)
    if tool.failed_first_choices(reports):
        raise typer.Exit(FAILED)


@command(
    app,
    "tune",
    "tune nsa_paper",
    "tune my_nsa.yaml --length 8192 --length 131072 --dtype fp16",
    "tune generated/nsa_128.py --export nvidia_h200.json",
)
def tune(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, a ready spec's name, or a module's file.")],
    length: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="Tokens; may be repeated; default 8192 and 65536.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of q, k and v.")] = Dtype.bf16,
    candidates: Annotated[int, typer.Option(min=1, metavar="N", help="Measured of each kernel, best first.")] = 12,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is known.")] = False,
    export: Annotated[Path | None, typer.Option(metavar="FILE", help="Add what is known on this GPU to FILE.")] = None,
) -> None:
    """Measure tile candidates on the GPU and keep the times: launches take the fastest from then on.

    What was measured is not measured again. Ctrl-C keeps what is done (exit 130); the same command goes on.
    """
    from nsagen.tools import tune as tool

    if not tool.run(tool.Request(spec, tuple(length or tool.LENGTHS), dtype.value, candidates, force, export)):
        raise typer.Exit(INTERRUPTED)


@command(
    app,
    "bench",
    "bench nsa_128",
    "bench my_nsa.yaml --lengths 8k,64k --against cudnn,fa3 --plot bench.png --json bench.json",
    "bench nsa_128 --forward-only --no-parts --rep 500",
    "bench tiny --device cpu --lengths 64,128",
    "bench nsa_128 --decode --grid 8kx256,64kx1 --plot decode.png",
    "bench nsa_128 --decode --tokens 4 --page-size 256 --kv fp8",
)
def bench(
    spec: SpecArgument,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N…", help="Tokens, 64k for 65536. Default: 4k to 128k.")
    ] = None,
    dtype: Annotated[Half, typer.Option(help="Of q, k, v and gates.")] = Half.bf16,
    device: Annotated[Device, typer.Option(help="cpu: a trial through the torch path.")] = Device.cuda,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="As in inference, no backward.")] = False,
    parts: Annotated[bool, typer.Option("--parts/--no-parts", help="Each public part too.")] = True,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Of fa2, cudnn, flex, fa3, fla, sdpa; or none. Default: what is there."),
    ] = None,
    rep: Annotated[int, typer.Option(min=1, metavar="MS", help="Milliseconds of one measurement.")] = 200,
    slowest: Annotated[float, typer.Option(min=0, metavar="S", help="Skip a rival that takes longer a call.")] = 4.0,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: benchmarks/results/… or here; none on the CPU.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw times by length.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="A step of decoding over a full cache instead.")] = False,
    grid: Annotated[
        str | None,
        typer.Option(metavar="TxB,…", help="Of --decode: context x batch. Default: 4 GiB of K/V, then batch 1."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, max=8, metavar="M", help="Of --decode: new tokens of a sequence. Default: 1.")
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of --decode: keys in pages of N tokens. Default: in a row.")
    ] = None,
    kv: Annotated[
        KV | None, typer.Option(help="Of --decode: keys and values as e4m3 with scales. Default: in --dtype.")
    ] = None,
) -> None:
    """Time the whole operation and its parts beside dense attention: medians, peak memory, break-even length.

    --decode: a step over a full cache, eager and in a CUDA graph, each of its kernels, beside FA3, SDPA and what the
    bytes alone take. Its time is the mean over a round: the steps up to the context after which compression blocks end
    as before (as many as the compression stride, at one token a step); the slowest of them is told, too.

    What does not fit, is not installed or takes too long is a dash with its reason.

    Exit 1 if the whole operation ran at no length, or on an interrupt.
    """
    if decode:
        from nsagen.tools.decode_grid import Serving

        serving = Serving(tokens or 1, page_size, kv is not None)
        _bench_decode(spec, lengths, grid, dtype, device, against, rep, json, plot, serving)
        return
    if grid is not None:
        raise _usage("--grid goes with --decode: without it, give --lengths")
    for name, given in (("--tokens", tokens), ("--page-size", page_size), ("--kv", kv)):
        if given is not None:
            raise _usage(f"{name} goes with --decode: add it, or leave {name} out")
    from nsagen.tools.bench import Request, run

    request = Request(
        spec, lengths, dtype.value, device.value, forward_only, parts, against, rep, slowest, json, plot
    )  # fmt: skip
    if not run(_compiled(spec), request):
        raise typer.Exit(FAILED)


def _bench_decode(spec: str, lengths: str | None, grid: str | None, dtype: Half, device: Device, *options: Any) -> None:
    from nsagen.tools.bench_decode import Request, run

    if lengths is not None:
        raise _usage("--lengths does not go with --decode: give --grid, as in 8kx256,64kx1")
    if not run(_compiled(spec), Request(spec, grid, dtype.value, device.value, *options)):
        raise typer.Exit(FAILED)


def _usage(text: str) -> Exception:
    from nsagen.errors import NsagenError

    return NsagenError(text)


@command(app, "list", "list")
def list_() -> None:
    """The specs that come with nsagen, a line each."""
    from nsagen.tools.list import lines

    typer.echo("\n".join(lines()))


@command(app, "new", "new my_nsa", "new my_nsa --from nsa_paper")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the spec; the file is NAME.yaml.")],
    ready: Annotated[str | None, typer.Option("--from", metavar="READY", help="A ready spec to copy.")] = None,
) -> None:
    """Start a spec: NAME.yaml with comments. Never overwrites."""
    from nsagen.tools.new import new as write

    typer.echo(f"wrote {write(name, ready)}")


@command(app, "schema", "schema > nsagen.schema.json")
def schema() -> None:
    """Print the JSON schema of a spec, for editors."""
    import json

    from nsagen.spec import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@command(cache_app, "dir", "cache dir")
def cache_dir() -> None:
    """Print the cache's directory. NSAGEN_CACHE_DIR moves it."""
    from nsagen.runtime import cache

    typer.echo(cache.directory())


@command(cache_app, "clear", "cache clear")
def cache_clear() -> None:
    """Remove what nsagen wrote to the cache."""
    from nsagen.runtime import cache

    typer.echo(f"removed {cache.clear()} modules and measurements from {cache.directory()}")
