"""Names of a kernel's operands, and what a launch binds to those of keys."""

from __future__ import annotations

from nsagen.ir.graph import Source

Binds = tuple[tuple[str, str], ...]


def suffixes(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """'' for the only source, else its number."""
    return ("",) if len(sources) == 1 else tuple(str(i) for i in range(len(sources)))


def key_binds(sources: tuple[Source, ...]) -> Binds:
    binds: list[tuple[str, str]] = []
    for source, suffix in zip(sources, suffixes(sources), strict=True):
        binds += [("k" + suffix, source.k), ("v" + suffix, source.v)]
        if source.listed:
            binds.append(("blocks" + suffix, source.listed.blocks))
    return tuple(binds)
