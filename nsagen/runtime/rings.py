"""Rings: stores of tokens that keep only what later queries see.

Token s < sinks lies in row s for good, token s ≥ sinks in row sinks + (s − sinks) mod `size`. So a ring holds the last
`size` tokens: the `keep` that a query sees before itself, and as many more as a step adds, so that a step overwrites
none that its queries see, and as many can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ring(NamedTuple):
    sinks: int  # first tokens, which stay
    keep: int  # tokens before a query that it, or φ, sees
    size: int  # last tokens that stay

    @property
    def rows(self) -> int:
        return self.sinks + self.size

    @property
    def before(self) -> int:
        """Old tokens that a query sees at most."""
        return self.sinks + self.keep

    def within(self, max_len: int) -> Ring:
        """The same for sequences of up to max_len tokens: before a query there are no more."""
        return self._replace(keep=min(self.keep, max_len))

    def row(self, position: Tensor) -> Tensor:
        """The row of a token within its sequence's ring."""
        return torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % self.size)

    def stays(self, position: Tensor, total: Tensor) -> Tensor:
        """Whether a token is still there when its sequence has `total`."""
        return (position < self.sinks) | (position >= total - self.size)


class TakenBack:
    """Which sequences were taken back to where a ring no longer has what they need.

    lost: bool [B]. It stays so until the sequence is taken back to no tokens at all.
    """

    def __init__(self, rings: Sequence[Ring], lengths: Tensor) -> None:
        self.slack = min(r.size - r.keep for r in rings)  # tokens that can be taken back
        self.unwrapped = min(r.rows for r in rings)  # up to so many tokens nothing is overwritten
        self.most = torch.zeros_like(lengths)  # the longest that a sequence was before it was taken back
        self.lost = torch.zeros_like(lengths, dtype=torch.bool)

    def loses(self, before: Tensor, after: Tensor) -> Tensor:
        """bool [B]: whether cutting a sequence from `before` tokens to `after` does that."""
        most = torch.maximum(self.most, before)
        return (after > 0) & (after < most - self.slack) & (most > self.unwrapped)

    def cut(self, before: Tensor, after: Tensor) -> None:
        self.lost.copy_((self.lost | self.loses(before, after)) & (after > 0))
        self.most.copy_(torch.where(after > 0, torch.maximum(self.most, before), 0))
