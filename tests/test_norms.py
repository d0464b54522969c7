"""Norms of networks: torch's own bits on a CPU and where compiled, one kernel under autocast on a GPU."""
import pytest
import torch
import torch.nn.functional as F

import kernels
from models import norms
from models.dit import Block
from models.sd2 import Resnet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPE = torch.device(DEVICE).type


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def autocast():
    return torch.autocast(TYPE, torch.bfloat16)


@pytest.fixture
def calls(triton_path, monkeypatch):
    """Names of the kernels that were called; layers of any size take them."""
    made = []
    monkeypatch.setattr(kernels, "LAYER", 0)

    def watch(name, call):
        def watched(*args):
            made.append(name)
            return call(*args)
        monkeypatch.setattr(norms, name, watched)

    for name in ("group_norm_silu", "layer_norm_modulate"):
        watch(name, getattr(norms, name))
    return made


def of_both_norms():
    """The layers on fixed inputs: torch's expressions, and those of models/norms.py."""
    group = torch.nn.GroupNorm(2, 6).to(DEVICE)
    layer = torch.nn.LayerNorm(12, elementwise_affine=False)
    x = seeded(2, 6, 5, 7)
    tokens, scale, shift = seeded(2, 5, 12), seeded(2, 1, 12, seed=1), seeded(2, 1, 12, seed=2)
    return ((F.silu(group(x)), layer(tokens) * (1 + scale) + shift),
            (norms.norm_silu(group, x), norms.norm_modulate(layer, tokens, scale, shift)))


def test_torchs_own_bits_where_no_kernel_runs(calls, monkeypatch):
    want, got = of_both_norms()                                                 # without autocast
    assert all(map(torch.equal, want, got))
    kernels.use("torch")
    with autocast():
        want, got = of_both_norms()
    assert all(map(torch.equal, want, got))
    kernels.use("triton")
    monkeypatch.setattr(kernels, "LAYER", 1 << 22)
    with autocast():
        want, got = of_both_norms()
    assert all(map(torch.equal, want, got)) and calls == []


def test_tensors_without_data_take_torchs_layers():
    x = torch.empty(1, 128, 256, 256, device="meta")                            # what the arithmetic of bench/ counts
    assert norms.norm_silu(torch.nn.GroupNorm(2, 128, device="meta"), x).shape == x.shape


def test_compiled_code_keeps_the_definition_in_one_graph(calls):
    group = torch.nn.GroupNorm(2, 6).to(DEVICE)
    x = seeded(2, 6, 5, 7)
    with autocast():
        fast = torch.compile(norms.norm_silu, fullgraph=True, backend="eager")(group, x)
        assert torch.equal(fast, F.silu(group(x))) and calls == []


@pytest.mark.parametrize("module, inputs, names", [
    (lambda: Resnet(6, 6, 2, 1e-5, 8), (seeded(2, 6, 5, 7), seeded(2, 8)), ["group_norm_silu"] * 2),
    (lambda: Block(12, 2, True), (seeded(2, 5, 12), seeded(2, 12, seed=1)), ["layer_norm_modulate"] * 2)],
    ids=["Resnet", "Block"])
def test_a_block_computes_and_learns_the_same_with_its_kernels(calls, module, inputs, names):
    """In bf16 twice: to a few of its ulp of the largest."""
    torch.manual_seed(0)
    module = module().to(DEVICE)
    for p in module.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    found = []
    for mode in ("torch", "triton"):
        kernels.use(mode)
        module.zero_grad()
        x, cond = (z.clone().requires_grad_() for z in inputs)
        with autocast():
            y = module(x, cond)
        y.float().square().sum().backward()
        found.append([y.float(), x.grad, cond.grad, *(p.grad for p in module.parameters())])
    assert calls == names
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0.03 * want.abs().max().item())
