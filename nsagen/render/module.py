"""Plan -> the text of a module."""

from __future__ import annotations

import json
import pprint
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2

from nsagen.errors import Refused
from nsagen.files import data_dir
from nsagen.ir.graph import Combine, CombineGrad, Graph, Pool
from nsagen.ir.plan import MOST_NEW, Kernel, Plan, TileTable
from nsagen.passes.specialise import UNITED_QUERIES
from nsagen.render.branches import branch_views, joint_view
from nsagen.render.decode import DecodeView, decode_view
from nsagen.render.host import (
    ahead_view,
    op_views,
    part_views,
    pool_node,
    select_node,
    serving_view,
    whole_call,
)
from nsagen.render.keys import kernel_key
from nsagen.render.split_view import split_view
from nsagen.render.standalone import link
from nsagen.render.view import combined_view, kernel_view, scores_are_whole
from nsagen.render.walks import Named

SHIPPED_CONFIGS = 12  # candidates of each table that a module carries and `tune` measures, best first
COMPRESSORS = {
    "mean": "MeanCompressor", "weighted": "WeightedCompressor", "linear": "LinearCompressor", "mlp": "MLPCompressor"
}  # fmt: skip


@dataclass(frozen=True)
class KernelText:
    name: str
    key: str
    source: str
    configs: tuple[TileTable, ...]
    lengths: tuple[int, int | None] | None  # queries from and below which it runs, if not always
    carries: str | None = None  # the kernel that rides on its specialised form, or goes before it


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_dir("templates")),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=False,
    )
    env.filters["each"] = _each
    return env


def _each(items: Any, form: str, separator: str = ", ") -> str:
    """form filled from the fields of each item (or the item itself as `it`), joined."""
    return separator.join(form.format(it=x, **_fields(x)) for x in items)


def _fields(x: Any) -> dict[str, Any]:
    return {} if isinstance(x, str) else vars(x)


def render_module(
    spec: dict[str, Any], graph: Graph, plan: Plan, digest: str, runtime_version: int, standalone: bool = False
) -> str:
    """The module's text. graph must be differentiated; digest is the content hash in its header and op names.

    standalone: what it uses of nsagen.runtime stands in it, and it imports torch and triton alone.
    """
    context = _context(spec, graph, plan, digest, runtime_version) | {"standalone": standalone}
    text = _tidy(environment().get_template("module.py.j2").render(context))
    return link(text) if standalone else text


def _folded(pool: Pool) -> bool:
    """Whether φ has positions; the runtime knows them as a constant alone."""
    if pool.positions == "per_token":
        raise Refused(f"%{pool.out}: positions of pool {pool.pool} are not folded (pass fold_positions)")
    return pool.positions == "constant"


def _context(spec: dict[str, Any], graph: Graph, plan: Plan, digest: str, runtime_version: int) -> dict[str, Any]:
    pool = pool_node(graph)
    combine = next((n for n in graph.nodes if isinstance(n, Combine)), None)
    grad = next(n for n in graph.nodes if isinstance(n, CombineGrad))
    whole = whole_call(graph, plan, tuple(spec["branches"]))
    select = select_node(graph)
    return {
        "spec": spec,
        "spec_text": _spec_text(spec),
        "spec_literal": pprint.pformat(spec, width=110, sort_dicts=False),
        "digest": digest,
        "runtime_version": runtime_version,
        "kernels_with_choices": [Named(k.name, _choices(k)) for k in plan.kernels],
        "kernels": [_kernel_text(k, plan) for k in plan.kernels],
        "attends": branch_views(graph, plan),
        "joint": joint_view(graph, plan),
        "specialised": any(k.specialised for k in plan.kernels),
        "scores_by_rows": any(k.scores_by_rows for k in plan.kernels),
        "whole_scores": scores_are_whole(plan),
        "qk_parts": next((k.qk_parts for k in plan.kernels if k.body == "select_scores"), ()),
        "united": UNITED_QUERIES if any(k.unites for k in plan.kernels) else 0,
        "operations": op_views(graph, plan),
        "public_parts": part_views(graph),
        "whole": {
            "op": whole.name, "arguments": whole.text.split(", "),
            "lean_keeps": any(op.doc == "lean" and len(op.outputs) > 1 for op in plan.ops),
        },
        "compressor": pool and {
            "cls": COMPRESSORS[pool.pool], "pool": pool.pool, "block": pool.axis.block, "stride": pool.axis.stride,
            "positions": _folded(pool),
        },
        "select": select,
        "ahead": ahead_view(graph),
        "serving": serving_view(graph, plan),
        **_step_context(decode_view(graph, plan, tuple(spec["branches"])), plan),
        "most_new": MOST_NEW,
        "caller_blocks": "blocks" in graph.inputs,
        "blocks_count": next((b.shape[-1] for b in plan.buffers if b.name == "blocks"), 0),
        "pooled": ("compressed", pool.axis.block, pool.axis.stride) if pool else None,
        "gated": combine is not None,
        "terms": combine.terms if combine else (),
        "deltas": grad.deltas,
        "shifts": grad.shifts,
        "lses": grad.lses,
        "rests": tuple(r for r in grad.rests if r),
        "any_rest": any(grad.rests),
        "branches": tuple(spec["branches"]),
        "per_branch": spec["kv"] == "per_branch",
        "hq": plan.heads.query, "hkv": plan.heads.kv, "group": plan.heads.group,
        "qk_dim": plan.heads.qk_dim, "v_dim": plan.heads.v_dim,
    }  # fmt: skip


def _step_context(view: DecodeView, plan: Plan) -> dict[str, Any]:
    """A decoding step's launches, and the tiles of those that have some."""
    append = {
        "stores": view.stores,
        "pools": view.pools,
        "phi_pools": view.phi_pools,
        "scores": view.scores,
        "scored": view.scored,
        "ringed": view.ringed,
        "hkv": plan.heads.kv,
    }
    source = environment().get_template("cache_append.py.j2").render(append).strip("\n")
    kernels = [k for k in plan.kernels if k.body == "split_attend"]
    scores, attend = next((k for k in kernels if k.select), None), next(k for k in kernels if not k.select)
    whole = {"x": kernel_view(attend, plan), "own": split_view(attend, plan)}
    whole["scored"] = scores and kernel_view(scores, plan)
    whole_source = environment().get_template("split_whole.py.j2").render(whole).strip("\n")
    tiles = [KernelText(k.name, kernel_key(_source(k, plan)), "", _distinct(k.tiles), None) for k in kernels]
    return {"decode": view, "append_source": source, "whole_source": whole_source, "decode_tiles": tiles}


def kernel_keys(plan: Plan) -> dict[str, str]:
    """The key under which each kernel's measurements are kept."""
    return {k.name: kernel_key(_source(k, plan)) for k in plan.kernels}


def _kernel_text(kernel: Kernel, plan: Plan) -> KernelText:
    source = _source(kernel, plan)
    # A kernel over a cache runs with the tiles of the one that it is made from.
    configs = () if kernel.cached else _distinct(kernel.tiles)
    riders = plan.riders(kernel.name) if combined_view(kernel, plan) else ()
    before = "unite_lists" if kernel.unites else "order_keys" if kernel.scores_by_rows else None
    carries = riders[0].kernel if riders else before
    return KernelText(kernel.name, kernel_key(source), source, configs, _lengths(kernel, plan), carries)


def _lengths(kernel: Kernel, plan: Plan) -> tuple[int, int | None] | None:
    """What the guards of the kernel's launches say of the number of queries."""
    bounds = {g.op: int(g.value) for x in plan.launches(kernel.name) for g in x.when if g.key == "length"}
    return (bounds.get("from", 0), bounds.get("below")) if bounds else None


def _source(kernel: Kernel, plan: Plan) -> str:
    views = {"x": kernel_view(kernel, plan), "own": split_view(kernel, plan)}
    return environment().get_template(f"{kernel.body}.py.j2").render(views).strip("\n")


def _distinct(tables: tuple[TileTable, ...]) -> tuple[TileTable, ...]:
    """Without a table that the architecture before has, too: the runtime goes back to it."""
    kept: dict[int, TileTable] = {}
    distinct: list[TileTable] = []
    for table in map(_shipped, tables):
        before = kept.get(table.bits)
        kept[table.bits] = table
        if before is None or before.configs != table.configs:
            distinct.append(table)
    return tuple(distinct)


def _shipped(table: TileTable) -> TileTable:
    kept = tuple(c for c in table.configs if c.dropped is None)
    smallest = min(kept, key=lambda c: (c.smem, c.bm * c.bn))  # what a chip with less shared memory can still run
    best = kept[:SHIPPED_CONFIGS]
    return TileTable(table.arch, table.bits, best if smallest in best else (*best, smallest))


def _choices(kernel: Kernel) -> str:
    return "; ".join(f"{c.what}, because {c.because}" for c in kernel.choices)


def _spec_text(spec: dict[str, Any]) -> str:
    h = spec["heads"]
    lines = [
        f"heads    {h['query']} query, {h['kv']} KV, dims {h['qk_dim']} (q, k) and {h['v_dim']} (v); K/V {spec['kv']}"
    ]
    lines += [f"branch   {name} {json.dumps(options)}" for name, options in spec["branches"].items()]
    lines.append(f"combine  {spec['combine']}")
    below = [f"dense    below {spec['dense_below']} tokens, through torch"] if spec["dense_below"] else []
    return "\n".join([*lines, *below])


def _tidy(text: str) -> str:
    """No trailing blanks, at most two blank lines, one newline at the end."""
    lines: list[str] = []
    for line in text.split("\n"):
        line = line.rstrip()
        if line or lines[-2:] != ["", ""]:
            lines.append(line)
    return "\n".join(lines).strip("\n") + "\n"
