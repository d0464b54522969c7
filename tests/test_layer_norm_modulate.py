"""Fused LayerNorm and modulation, forward and backward, against their definition, interpreted on a CPU."""
import pytest
import torch

import kernels
from kernels import layer_norm_modulate as lm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NAMES = ("y", "dx", "dscale", "dshift")
# share of the largest element: fp32 sums in another order; bf16: rounded once, and 1 + scale once more, which the
# interpreter truncates both
TOL = {torch.float64: 2e-14, torch.float32: 5e-6, torch.bfloat16: 2**-6}


def case(shape=(2, 5, 12), dtype=torch.float32, half=torch.float32):
    """Tokens in one dtype; the matrix of which scale and shift are two chunks, and a gradient in another."""
    rng = torch.Generator().manual_seed(0)
    B, _, D = shape
    x, g = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    mod = torch.randn(B, 1, 6 * D, generator=rng, dtype=torch.float64)
    return (2 * x + 3).to(DEVICE, dtype), mod.to(DEVICE, half), g.to(DEVICE, half)


def outputs(fn, x, mod, g):
    """Result and gradients, by name."""
    x = x.detach().clone().requires_grad_()
    scale, shift = (z.detach().requires_grad_() for z in mod.chunk(6, -1)[1::2][:2])
    y = fn(x, scale, shift, EPS, g.dtype)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, (x, scale, shift), g)), strict=True))


@pytest.mark.parametrize("shape, dtype, half", [
    ((2, 5, 12), torch.float64, torch.float64), ((3, 37, 71), torch.float32, torch.float32),
    ((1, 9, 1271), torch.float32, torch.bfloat16), ((2, 300, 71), torch.bfloat16, torch.bfloat16)], ids=str)
def test_kernel_equals_ref_forward_and_every_gradient(triton_path, shape, dtype, half):
    args = case(shape, dtype, half)
    got, want = (outputs(fn, *args) for fn in (lm.layer_norm_modulate, lm.layer_norm_modulate_ref))
    for name in NAMES:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        most = want[name].abs().max().item()
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=TOL[half] * most, msg=name)


def test_a_row_wider_than_a_program_takes_the_definition(triton_path, monkeypatch):
    args = case()
    want = outputs(lm.layer_norm_modulate_ref, *args)
    monkeypatch.setattr(lm, "WIDEST", 11)
    monkeypatch.setattr(lm, "launch", None)
    got = outputs(lm.layer_norm_modulate, *args)
    assert all(torch.equal(got[k], want[k]) for k in NAMES)


def test_the_kernel_is_really_reached(triton_path, monkeypatch):
    monkeypatch.setattr(lm, "layer_norm_modulate_ref", None)
    outputs(lm.layer_norm_modulate, *case())


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_gradcheck_in_float64(triton_path, mode):
    kernels.use(mode)
    x, mod, _ = case((1, 2, 3), torch.float64, torch.float64)
    fn = lambda x, a, b: lm.layer_norm_modulate(x, a, b, EPS, torch.float64)                    # noqa: E731
    assert torch.autograd.gradcheck(fn, [z.detach().requires_grad_() for z in (x, *mod.chunk(6, -1)[:2])])


def test_same_bits_in_two_runs_inputs_unwritten_backward_twice_and_other_layouts(triton_path):
    args = case(half=torch.bfloat16)
    before = [z.clone() for z in args]
    first, second = (outputs(lm.layer_norm_modulate, *args) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in NAMES)
    x, mod, g = args
    x = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y = lm.layer_norm_modulate(x, mod[..., 12:24], mod[..., 36:48].clone(), EPS, torch.bfloat16)
    dx = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(y, first["y"]) and torch.equal(dx[0], dx[1]) and torch.equal(dx[0], first["dx"])
    assert all(torch.equal(z, b) for z, b in zip(args, before, strict=True))


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_no_token_and_what_does_not_fit(triton_path, mode):
    kernels.use(mode)
    x, mod, _ = case()
    scale, shift = mod.chunk(6, -1)[:2]
    assert lm.layer_norm_modulate(x[:, :0], scale, shift, EPS, torch.bfloat16).shape == (2, 0, 12)
    with pytest.raises(ValueError, match=r"got x \(2, 5, 12\), scale \(1, 1, 12\), shift \(2, 1, 12\); want"):
        lm.layer_norm_modulate(x, scale[:1], shift, EPS, torch.bfloat16)
