"""Fused GroupNorm and SiLU, forward and backward, against their definition, interpreted on a CPU."""
import pytest
import torch

import kernels
from kernels import group_norm_silu as gs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NAMES = ("y", "dx", "dweight", "dbias")
LAST = torch.channels_last
FIRST = torch.contiguous_format
# share of the largest element: fp32 sums in another order; 16 bits: of a sum in fp32, rounded once (the interpreter
# truncates where it stores: two ulp)
TOL = {torch.float64: 2e-14, torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def case(shape=(2, 6, 5, 7), dtype=torch.float32, form=FIRST, mean=3.0):
    """x, weight, bias and the gradient of the result."""
    rng = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], generator=rng, dtype=torch.float64)
    of = torch.float64 if dtype == torch.float64 else torch.float32
    return [*((z.to(DEVICE, of)) for z in (weight, bias)),
            *(z.to(DEVICE, dtype).contiguous(memory_format=form) for z in (2 * x + mean, g))]


def outputs(fn, args, groups, dtype):
    """Result and gradients, by name."""
    weight, bias, x, g = args
    leaves = [z.detach().clone(memory_format=torch.preserve_format).requires_grad_() for z in (x, weight, bias)]
    y = fn(*leaves, groups, EPS, dtype)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, g)), strict=True))


@pytest.mark.parametrize("form", [FIRST, LAST], ids=["first", "last"])
@pytest.mark.parametrize("shape, groups, dtype", [
    ((2, 6, 5, 7), 3, torch.float64), ((1, 4, 31, 41), 2, torch.float32),              # 1271 > PIXELS
    ((1, 70, 3, 37), 5, torch.bfloat16), ((3, 5, 1, 1), 1, torch.float32), ((1, 6, 3, 11), 6, torch.float16)], ids=str)
def test_kernel_equals_ref_forward_and_every_gradient(triton_path, form, shape, groups, dtype):
    args = case(shape, dtype, form)
    got, want = (outputs(fn, args, groups, dtype) for fn in (gs.group_norm_silu, gs.group_norm_silu_ref))
    for name in NAMES:
        assert got[name].dtype == want[name].dtype and got[name].stride() == want[name].stride(), name
        tol = TOL[dtype if name in ("y", "dx") or dtype == torch.float64 else torch.float32]
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tol * want[name].abs().max().item(), msg=name)


def test_fp32_in_16_bits_out(triton_path):
    weight, bias, x, _ = case()
    got, want = (fn(x, weight, bias, 3, EPS, torch.bfloat16) for fn in (gs.group_norm_silu, gs.group_norm_silu_ref))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)


def test_a_mean_far_from_zero_costs_no_digits(triton_path):
    """The difference of two sums of squares would be off by half the variance; x has an ulp of 6e-5 here."""
    weight, bias, x, _ = case((1, 4, 32, 64), mean=1000.0)
    got = gs.group_norm_silu(x, weight, bias, 2, EPS, torch.float32)
    want = gs.group_norm_silu_ref(x.double(), weight, bias, 2, EPS, torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-4)


def test_the_kernel_is_really_reached(triton_path, monkeypatch):
    monkeypatch.setattr(gs, "group_norm_silu_ref", None)
    outputs(gs.group_norm_silu, case(), 3, torch.float32)


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_gradcheck_in_float64(triton_path, mode):
    kernels.use(mode)
    weight, bias, x, _ = case((1, 2, 1, 3), torch.float64)
    fn = lambda *leaves: gs.group_norm_silu(*leaves, 1, EPS, torch.float64)                     # noqa: E731
    assert torch.autograd.gradcheck(fn, [z.requires_grad_() for z in (x, weight, bias)])


def test_same_bits_in_two_runs_inputs_unwritten_backward_twice_and_other_layouts(triton_path):
    args = case(dtype=torch.bfloat16, form=LAST)
    before = [z.clone() for z in args]
    first, second = (outputs(gs.group_norm_silu, args, 3, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in NAMES)
    weight, bias, x, g = args
    x = torch.cat((x, x), 1)[:, :6].requires_grad_()                             # in neither format
    y = gs.group_norm_silu(x, weight, bias, 3, EPS, torch.bfloat16)
    dx = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*dx)
    torch.testing.assert_close(y, first["y"], rtol=2**-6, atol=1e-6)             # sums in another order
    assert all(torch.equal(z, b) for z, b in zip(args, before, strict=True))


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_no_image_and_what_does_not_fit(triton_path, mode):
    kernels.use(mode)
    weight, bias, x, _ = case()
    assert gs.group_norm_silu(x[:0], weight, bias, 3, EPS, torch.bfloat16).shape == (0, 6, 5, 7)
    with pytest.raises(ValueError, match=r"got x \(2, 6, 5, 7\), weight \(6,\), bias \(6,\), 4 groups; want"):
        gs.group_norm_silu(x, weight, bias, 4, EPS, torch.bfloat16)
