"""The docstring of a generated kernel."""

from __future__ import annotations

from nsagen.ir.graph import Heads
from nsagen.ir.plan import BY_KEYS, HEADS_IN_TURN, Kernel


def kernel_doc(kernel: Kernel, heads: Heads, rows: str) -> str:
    """What it computes, and of what one program; rows: those of a tile that belong to one query."""
    what = {
        "attend_fwd": "out = softmax(scale·q·kᵀ)·v and its log-sum-exp",
        "attend_dq": "dq from the scores recomputed with lse",
        "attend_queries": "dq from the scores recomputed with lse",
        "attend_dkv": "dk and dv from the scores recomputed with lse",
        "attend_keys": "dk and dv from the scores recomputed with lse",
        "attend_wide_keys": "dk and two parts of dv from the scores recomputed with lse",
        "attend_list_fwd": "an item's parts of out, each a softmax over the item's key block, and their log-sum-exp",
        "merge_lists": "out and its log-sum-exp from the parts of the query's listed blocks",
        "sum_lists": "dq from the parts of the query's listed blocks, added in order",
        "attend_list_dkv": "an item's part of dk and dv, float32, from the scores recomputed with lse",
        "attend_list_grads": "an item's part of dk and two of dv, float32, and its queries' parts of dq",
        "sum_list_parts": "dq from the parts of the query's listed blocks, added in order",
        "sum_items": "dk and dv of a key block: its items' parts, added in order",
        "score_lse": "log-sum-exp of scale·q·k over the ended blocks",
        "sum_splits": "dk and dv of every key row: the parts of the programs that shared its tile, added in order",
        "select_scores": "importance of compressed keys: exp(scale·q·k − lse), summed over the group's heads",
        "select_blocks": "the best blocks of a query and KV head, ascending, −1 for none",
        "split_attend": "parts of a decoding step's attention, float32, each of a run of a source's keys",
        "split_select": "the best blocks of a query and KV head, from sums of its scores, −1 for none",
        "split_merge": "out: the parts of every term, merged in their order, times its gate if there are gates",
        "combine_fwd": "out = Σ_c gate_c·term_c",
        "combine_bwd": "row sums of d_out·term: deltas, and the gates' gradients if there are gates",
    }[kernel.body]
    if not kernel.walks:
        flat = dict.fromkeys(("combine_fwd", "combine_bwd", "sum_splits"), "BM flat rows")
        one = flat | {"sum_items": "a key block", "split_merge": "ROWS flat rows"}
        one |= {"split_select": "a query and KV head, and a run of its candidates"}
        one |= dict.fromkeys(("merge_lists", "sum_lists", "sum_list_parts"), "a query and the heads of one KV head")
        return f"{what}; one program: {one.get(kernel.body, 'one of each')}."
    tile = f"BM // {rows} queries"
    if any(w.listed for w in kernel.walks):
        listed = kernel.body in ("attend_list_dkv", "attend_list_fwd", "attend_list_grads")
        tile = "BN keys and one item's queries" if listed else "one query"
    elif kernel.body in HEADS_IN_TURN:
        tile = "BM queries and BN keys"
    elif kernel.body in ("attend_dkv", *BY_KEYS):
        tile = "BN keys, one run of their queries" if kernel.grid.split else "BN keys"
    return f"{what}; one program: {tile} × the {heads.group} heads of one KV head."
