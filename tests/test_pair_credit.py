"""The splat of per-pair credit against its definition, interpreted on a CPU."""
import math

import pytest
import torch

import kernels
from kernels import pair_credit as pc

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of at most 40 products, of the size of the largest, in two orders; the interpreter's exp is numpy's.
TOL = {torch.float32: 2e-6, torch.float64: 1e-14}


def case(B=2, G=3, P=41, size=(37, 33), dtype=torch.float32, seed=0):
    """Agreements, uneven weights that sum to 1, points with two corners among them."""
    rng = torch.Generator().manual_seed(seed)
    agree = torch.rand(B, G, P, generator=rng, dtype=torch.float64)
    agree[:, :, 1::3] = agree[:, :1, 1::3]                                       # pairs that the group agrees on
    weight = torch.rand(B, P, generator=rng, dtype=torch.float64) + 0.1
    pts = torch.stack([torch.randint(n, (B, P, 2), generator=rng) for n in size], -1)
    if P:
        pts[:, 0] = torch.tensor([[0, 0], [size[0] - 1, size[1] - 1]])
    return tuple(z.to(DEVICE) for z in (agree.to(dtype), (weight / weight.sum(1, keepdim=True)).to(dtype), pts))


def assert_same(got, want, tol):
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=tol * max(want.abs().max().item(), 1e-30))


@pytest.mark.parametrize("size, G, P, width, dtype", [
    ((37, 33), 3, 20, 1.0, torch.float32), ((7, 5), 2, 16, 0.3, torch.float32), ((1, 65), 5, 1, 4.0, torch.float32),
    ((32, 32), 8, 17, 200.0, torch.float32), ((37, 33), 3, 20, 1.0, torch.float64),
    ((7, 5), 2, 16, 0.3, torch.float64)], ids=str)
def test_kernel_equals_ref(triton_path, dtype, size, G, P, width):
    args = case(G=G, P=P, size=size, dtype=dtype)
    want = pc.pair_credit_ref(*args, size, width)
    assert want.abs().max() > 0
    assert_same(pc.pair_credit(*args, size, width), want, TOL[dtype])


def test_public_function_really_reaches_the_kernel(triton_path, monkeypatch):
    monkeypatch.setattr(pc, "pair_credit_ref", None)
    pc.pair_credit(*case(P=3, size=(4, 4)), (4, 4), 1.0)


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("width", [1.0, math.inf])
def test_the_mean_over_pixels_is_the_centred_reward(triton_path, mode, width):
    kernels.use(mode)
    agree, weight, pts = case(P=13)
    reward = (agree * weight[:, None]).sum(-1)
    got = pc.pair_credit(agree, weight, pts, (37, 33), width).mean((2, 3))
    torch.testing.assert_close(got, reward - reward.mean(1, keepdim=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_a_group_that_agrees_gets_exactly_nothing(triton_path, mode):
    """Seven equal agreements: their mean is not always the number itself, in fp32."""
    kernels.use(mode)
    agree, weight, pts = case(G=7, size=(9, 9))
    agree = agree[:, :1].expand(-1, 7, -1)
    assert (pc.pair_credit(agree, weight, pts, (9, 9), 1.0) == 0).all()


def test_no_pair_gives_no_credit(triton_path):
    assert torch.equal(pc.pair_credit(*case(P=0, size=(4, 5)), (4, 5), 1.0), torch.zeros(2, 3, 4, 5, device=DEVICE))


def test_same_bits_in_two_runs_inputs_unwritten_and_other_layouts(triton_path):
    agree, weight, pts = case(B=1, P=17)
    before = agree.clone(), weight.clone(), pts.clone()
    first, second = (pc.pair_credit(agree, weight, pts, (37, 33), 2.0) for _ in range(2))
    other = pc.pair_credit(agree.mT.contiguous().mT, weight.T.contiguous().T, pts.int(), (37, 33), 2.0)
    assert torch.equal(first, second) and torch.equal(first, other)
    assert all(torch.equal(a, b) for a, b in zip((agree, weight, pts), before, strict=True))


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_what_does_not_fit_is_refused(triton_path, mode):
    kernels.use(mode)
    agree, weight, pts = case()
    with pytest.raises(ValueError, match="want 0 <= row < 37, 0 <= col < 32"):
        pc.pair_credit(agree, weight, pts, (37, 32), 1.0)
    with pytest.raises(ValueError, match="got width 0, want width > 0"):
        pc.pair_credit(agree, weight, pts, (37, 33), 0)
    with pytest.raises(ValueError, match=r"got weight \(2, 40\)"):
        pc.pair_credit(agree, weight[:, 1:], pts, (37, 33), 1.0)
