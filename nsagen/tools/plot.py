"""`nsagen explain --plot`: a picture of which keys each query sees, a panel a branch and key axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsagen.errors import MissingPackage, NsagenError
from nsagen.ir.graph import TOKENS, Attend, Graph, KeyAxis, Piece, Source
from nsagen.sym import AtLeast, Conjunct, evaluate, to_text

SMALLEST, LARGEST = 64, 2048  # tokens of a picture


def plot(graph: Graph, file: str | Path) -> Path:
    """Write the picture; its kind follows the file's ending."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage("--plot", "matplotlib", "bench") from None
    panels = [(_title(n.branch, s), s.axis, s.pieces) for n in graph.nodes if isinstance(n, Attend) for s in n.sources]
    tokens = _tokens(panels)
    figure = Figure(figsize=(4.6 * len(panels), 4.8), layout="constrained")
    for (title, axis, pieces), axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _panel(axes, title, axis, pieces, tokens)
    figure.suptitle(f"{graph.name}: keys that a query sees")
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # no such folder; no such kind of picture
        raise NsagenError(f"cannot write {file}: {error}") from None
    return Path(file)


def _title(branch: str, source: Source) -> str:
    """A list is made of the data: what is drawn is where its blocks may lie."""
    listed = source.listed
    return f"{branch}: {listed.count} blocks of {listed.size} out of" if listed else branch


def _panel(axes: Any, title: str, axis: KeyAxis, pieces: tuple[Piece, ...], tokens: int) -> None:
    """Each piece in its own shade, so that a key counted twice would show."""
    import numpy as np

    keys = evaluate(axis.length(), {TOKENS.name: tokens})
    t, s = np.arange(tokens)[:, None], np.arange(keys)[None, :]
    picture = np.zeros((tokens, keys))
    for shade, piece in enumerate(pieces, 2):
        seen = np.logical_and.reduce([np.broadcast_to(_holds(c, t, s), picture.shape) for c in piece.where])
        picture += shade * seen
    axes.imshow(picture, cmap="Blues", vmin=0, vmax=len(pieces) + 2, aspect="auto", interpolation="nearest")
    unit = "token" if axis.is_tokens else f"block of {axis.block} tokens, one every {axis.stride}"
    axes.set(title=title, xlabel=f"key ({unit})", ylabel="query t")


def _holds(c: Conjunct, t: Any, s: Any) -> Any:
    """The conjunct on arrays: its expression is linear, so its text is numpy's too."""
    value = eval(to_text(c.expr), {}, {"t": t, "s": s})  # text of our own printer, never a user's
    return value >= 0 if isinstance(c, AtLeast) else value % c.modulus == 0


def _tokens(panels: list[tuple[str, KeyAxis, tuple[Piece, ...]]]) -> int:
    """Enough for twice the widest distance that any predicate speaks of."""
    reach = [
        abs(int(x)) for _, _, pieces in panels for p in pieces for c in p.where for x in [c.expr.as_coeff_Add()[0]]
    ]
    blocks = [4 * axis.block for _, axis, _ in panels]
    return min(LARGEST, max(SMALLEST, 2 * max(reach, default=0), *blocks))
