"""Text from a small transformer with random weights: prefill, then a token a step over a KVCache.

The words mean nothing; the loop is a usual one. Tokens are bytes, positions are rotary (φ pools un-rotated keys and
rotates what comes out), gates are a linear layer and a sigmoid, every branch has keys and values of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nsagen

SPEC = {
    "name": "generate_example",
    "heads": {"query": 16, "kv": 2, "qk_dim": 32, "v_dim": 32},
    "kv": "per_branch",
    "branches": {
        "compressed": {"block": 16, "stride": 8, "pool": "mlp"},
        "selected": {"block": 16, "top_n": 4, "initial": 1, "local": 1},
        "window": {"size": 32},
    },
    "combine": "gated_sum",
}
VOCABULARY, WIDTH, LAYERS = 256, 128, 2
PROMPT = "In the beginning there was one attention for all keys. It read every one of them, for every word it wrote. "
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the logits, by norm
EXAMPLES = """examples:
  python examples/generate.py
  python examples/generate.py --prompt "Once upon a time" --tokens 200 --temperature 0.8 --seed 3
  python examples/generate.py --samples 4 --temperature 1 --chunk 32
  python examples/generate.py --check
"""
Attend = Callable[..., Tensor]  # (layer, q, k, v, gates, phi) -> out


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, T, H, D] rotated by its position, int64 [T]: pairs (i, i + D/2) at 10000^(−2i/D) radians a token."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = (positions.unsqueeze(-1) * rates).unsqueeze(1)  # [T, 1, D/2]
    a, b = x.float().split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Layer(nn.Module):
    """Attention and an MLP, each on a normed residual stream [B, T, WIDTH]."""

    def __init__(self, nsa: Any, index: int) -> None:
        super().__init__()
        self.heads, self.branches, self.index = nsa.SPEC["heads"], list(nsa.SPEC["branches"]), index
        query, kv, qk, v = (self.heads[name] for name in ("query", "kv", "qk_dim", "v_dim"))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q = nn.Linear(WIDTH, query * qk, bias=False)
        self.k, self.v = (
            nn.ModuleDict({branch: nn.Linear(WIDTH, kv * dim, bias=False) for branch in self.branches})
            for dim in (qk, v)
        )
        self.gate = nn.Linear(WIDTH, query * len(self.branches))
        self.out = nn.Linear(query * v, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.phi = nsa.Compressor(rope=rope)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        h = self.norms[0](x)
        q = rope(self._split(self.q(h), self.heads["query"]), positions)
        k = {branch: self._split(self.k[branch](h), self.heads["kv"]) for branch in self.branches}
        v = {branch: self._split(self.v[branch](h), self.heads["kv"]) for branch in self.branches}
        k |= {branch: rope(k[branch], positions) for branch in self.branches if branch != "compressed"}
        gates = self._split(self.gate(h).sigmoid(), self.heads["query"])
        x = x + self.out(attend(self.index, q, k, v, gates, self.phi).flatten(2))
        return x + self.mlp(self.norms[1](x))

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1))


class Model(nn.Module):
    """tokens int64 [B, T] at positions from `first` on -> logits [B, T, VOCABULARY]."""

    def __init__(self, nsa: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(nsa, i) for i in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, attend: Attend, first: int = 0) -> Tensor:
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, positions, attend)
        return self.head(self.norm(x))


@torch.no_grad()
def generate(nsa: Any, model: Model, prompt: Tensor, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """prompt int64 [B, T] -> all tokens [B, T + options.tokens], and the logits that each new one was drawn from."""
    batch, length = prompt.shape
    dtype = model.head.weight.dtype
    room = -(-(length + options.tokens) // 64) * 64
    caches = [nsa.KVCache(batch, room, device=prompt.device, dtype=dtype) for _ in model.layers]

    def prefill(layer: int, *arguments: Any) -> Tensor:
        return nsa.prefill(*arguments, caches[layer])

    def decode(layer: int, *arguments: Any) -> Tensor:
        return nsa.decode(*arguments, caches[layer])

    tokens, seen, logits = prompt, 0, prompt.new_empty(0)
    for chunk in prompt.split(options.chunk or length, 1):  # a chunk attends to the cache before it
        logits = model(chunk, prefill, seen)[:, -1]
        seen += chunk.shape[1]
    steps = [logits]
    for _ in range(options.tokens - 1):
        tokens = torch.cat([tokens, pick(steps[-1], options.temperature)], 1)
        steps.append(model(tokens[:, -1:], decode, tokens.shape[1] - 1)[:, -1])
    tokens = torch.cat([tokens, pick(steps[-1], options.temperature)], 1)
    return tokens, torch.stack(steps, 1)


def pick(logits: Tensor, temperature: float) -> Tensor:
    """[B, VOCABULARY] -> [B, 1]: the likeliest token, or one drawn."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1)


@torch.no_grad()
def worst_error(nsa: Any, model: Model, tokens: Tensor, steps: Tensor) -> float:
    """Of each step's logits beside those of one forward over all tokens, which are causal: ‖a − b‖ / ‖b‖, the worst."""
    whole = model(tokens[:, :-1], lambda layer, *arguments: nsa.attention(*arguments))[:, -steps.shape[1] :].float()
    return float(((steps.float() - whole).norm(dim=-1) / whole.norm(dim=-1)).max())


def text_of(tokens: Tensor) -> str:
    return "".join(chr(t) if 32 <= t < 127 else "·" for t in tokens.tolist())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=PROMPT, help="text to go on from, as UTF-8 bytes")
    parser.add_argument("--tokens", type=int, default=64, help="new bytes, 1 or more (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest byte (default)")
    parser.add_argument("--samples", type=int, default=1, help="continuations of the prompt, as one batch")
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a prefill; 0: the prompt at once (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of what is drawn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--check", action="store_true", help="compare every step with a forward over all tokens")
    found = parser.parse_args()
    if not found.prompt or min(found.tokens, found.samples) < 1 or found.chunk < 0 or found.temperature < 0:
        parser.error("--prompt, --tokens and --samples take something; --chunk and --temperature nothing below 0")
    return found


def main() -> None:
    options = arguments()
    on_gpu = torch.device(options.device).type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    nsa = nsagen.load(SPEC)
    torch.manual_seed(options.seed)
    model = Model(nsa).to(options.device, dtype)
    prompt = torch.tensor([list(options.prompt.encode())] * options.samples, device=options.device)
    start = time.perf_counter()
    tokens, steps = generate(nsa, model, prompt, options)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    for row in tokens:
        print(f"{options.prompt}|{text_of(row[prompt.shape[1] :])}")
    count = options.tokens * options.samples
    print(
        f"{count} tokens in {seconds:.1f} s, prefill and compiling included; {options.device}, {dtype}", file=sys.stderr
    )
    if options.check:
        error = worst_error(nsa, model, tokens, steps)
        good = error <= TOLERANCE[dtype]
        print(f"worst error of a step's logits: {error:.1e} ({'at most' if good else 'above'} {TOLERANCE[dtype]:.0e})")
        sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
