"""What the benchmark times is what it says: the parts of each spec, the mask of FlexAttention, lists of a caller."""

from __future__ import annotations

import pytest
import torch

from nsagen.api import compiled_of, module_of, read, ready_specs
from nsagen.errors import NsagenError
from nsagen.tools.bench_cases import own_cases
from nsagen.tools.bench_inputs import Setting, dense_inputs, random_blocks
from nsagen.tools.dense import causal_mask, fa3
from nsagen.tools.rivals import RIVALS, fits_fla, rivals


def setting_of(name: str, device: str = "cpu") -> Setting:
    return Setting(read(name), torch.float32, device)


def test_the_parts_are_those_of_the_spec():
    found = {}
    for name in ready_specs():
        compiled = compiled_of(read(name))
        found[name] = [c.name for c in own_cases(compiled, module_of(compiled), setting_of(name), True)]
    assert found["window_only"] == ["whole", "window_attention"]
    assert found["selected_only"] == ["whole", "selected_attention"]
    assert found["nsa_compressed_window"] == ["whole", "compressor", "compressed_attention", "window_attention"]
    assert found["nsa_paper"] == [
        "whole", "compressor", "compressed_attention", "select_blocks", "selected_attention", "window_attention",
    ]  # fmt: skip


@pytest.mark.parametrize("length", [5, 21])
def test_every_case_of_tiny_runs_forward_and_backward(length):
    """At 5 tokens no block of the compressed branch has ended yet."""
    compiled, setting = compiled_of(read("tiny")), setting_of("tiny")
    for case in own_cases(compiled, module_of(compiled), setting, True):
        work = case.make(length, 0)
        outs = work.call()
        if case.forward_only:
            assert outs[0].dtype == torch.int32
            continue
        assert all(x.isfinite().all() for x in outs)
        assert [x.shape for x in outs] == [x.shape for x in work.d_outs]
        if length > 8:
            work.backward(outs)
            assert all(x.grad is not None and x.grad.any() for x in work.leaves), case.name


def test_inputs_differ_by_seed_and_length_and_are_never_zero():
    setting = setting_of("tiny")
    first, again, second = (dense_inputs(setting, 16, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert 0.8 < float(first.detach().std()) < 1.2
    compiled = compiled_of(read("tiny"))
    make = own_cases(compiled, module_of(compiled), setting, False)[0].make
    one, two = make(16, 0).leaves, make(16, 1).leaves
    assert not any(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(x.any() for x in one)


def test_random_lists_are_lists(monkeypatch):
    monkeypatch.setattr("nsagen.tools.random_lists.CHUNK", 100)
    setting = setting_of("selected_only")
    length = 64 * 20 + 7
    lists = random_blocks(setting, setting.source(length, 0), length)[0]
    assert lists.shape == (length, 4, 16)
    own = torch.arange(length)[:, None, None] // 64
    there = lists >= 0
    assert (lists <= own).all()
    assert torch.equal(there.sum(-1), (own[..., 0] + 1).clamp(max=16).expand(-1, 4))
    pairs = there[..., 1:]
    assert (lists[..., 1:] > lists[..., :-1])[pairs].all()
    assert (there[..., :-1] | ~pairs).all()  # −1 last


@pytest.mark.parametrize("length", [128, 100, 300, 512])
def test_the_causal_mask_of_flex(length):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    mask = causal_mask(length, "cpu")
    expected = create_block_mask(lambda b, h, t, s: s <= t, None, None, length, length, device="cpu")
    assert mask.shape == expected.shape
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert torch.equal(mask.q_num_blocks + mask.full_q_num_blocks, expected.q_num_blocks + expected.full_q_num_blocks)
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    found = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5, rtol=1e-5)


def test_which_rivals_take_part():
    assert [c.name for c in rivals(setting_of("tiny"), None)] == ["dense SDPA"]
    on_gpu = [c.name for c in rivals(setting_of("tiny", "cuda"), None)]
    assert on_gpu[:3] == ["dense FA2", "dense cuDNN", "dense Flex"]
    assert "fla NSA" not in on_gpu
    assert [c.name for c in rivals(setting_of("tiny"), ["sdpa", "fa2", "sdpa"])] == ["dense SDPA", "dense FA2"]
    assert rivals(setting_of("tiny"), []) == []
    with pytest.raises(NsagenError, match="choose from fa2, cudnn, flex, fa3, fla, sdpa, or none"):
        rivals(setting_of("tiny"), ["fa9"])


def test_fla_only_where_it_computes_the_same():
    assert [name for name in ready_specs() if fits_fla(read(name))] == ["fla"]
    reason = RIVALS["fla"].refuse(setting_of("nsa_paper", "cuda"))
    assert reason is not None


def test_the_fa3_wheel_is_called_forward_alone(monkeypatch, tmp_path):
    (tmp_path / "fa3_fwd_interface.py").write_text(
        "import torch\n"
        "def flash_attn_func(q, k, v, causal):\n"
        "    assert causal and not (q.requires_grad or k.requires_grad or v.requires_grad)\n"
        "    return torch.ones_like(q), None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert RIVALS["fa3"].refuse(setting_of("tiny", "cuda")) is None
    assert RIVALS["fa3"].forward_only
    work = fa3(setting_of("tiny"), 8, 0)
    assert [x.shape for x in work.call()] == [(1, 8, 6, 24)]
    assert work.leaves == ()
