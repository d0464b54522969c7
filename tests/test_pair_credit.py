"""The splat of per-pair credit against its formula written out: means, ties, layouts, refusals."""
import math

import pytest
import torch

from kernels.pair_credit import _profile, pair_credit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def written_out(agree, weight, pts, size, width):
    """The formula of the module docstring, point by point."""
    B, G, P = agree.shape
    y, x = (torch.arange(n, device=agree.device, dtype=agree.dtype) for n in size)
    out = torch.zeros(B, G, *size, dtype=agree.dtype, device=agree.device)
    for b in range(B):
        for p in range(P):
            adv = weight[b, p] * (agree[b, :, p] - agree[b, :, p].mean())
            for row, col in pts[b, p].tolist():
                down, right = (torch.exp(-(z - c) ** 2 / (2 * width**2)) for z, c in ((y, row), (x, col)))
                out[b] += adv[:, None, None] * torch.outer(down / down.sum(), right / right.sum())
    return out * size[0] * size[1] / 2


@pytest.mark.parametrize("size, G, P, width", [
    ((37, 33), 3, 20, 1.0), ((7, 5), 2, 16, 0.3), ((1, 65), 5, 1, 4.0), ((32, 32), 8, 17, 200.0)], ids=str)
def test_it_is_the_sum_over_points_written_out(size, G, P, width):
    args = case(G=G, P=P, size=size, dtype=torch.float64)
    want = written_out(*args, size, width)
    assert want.abs().max() > 0
    torch.testing.assert_close(pair_credit(*args, size, width), want, rtol=0, atol=1e-13 * want.abs().max().item())


def test_no_number_of_a_profile_is_denormal():
    """On a CPU the product of profiles of 32 pixels took six times as long with them, for the same bits."""
    value = _profile(32, torch.zeros(1, device=DEVICE), 1.0)
    assert (value == 0).any() and (value[value > 0] >= torch.finfo(value.dtype).tiny).all()


@pytest.mark.parametrize("width", [1.0, math.inf])
def test_the_mean_over_pixels_is_the_centred_reward(width):
    agree, weight, pts = case(P=13)
    reward = (agree * weight[:, None]).sum(-1)
    got = pair_credit(agree, weight, pts, (37, 33), width).mean((2, 3))
    torch.testing.assert_close(got, reward - reward.mean(1, keepdim=True), rtol=0, atol=1e-6)


def test_a_group_that_agrees_gets_exactly_nothing():
    """Seven equal agreements: their mean is not always the number itself, in fp32."""
    agree, weight, pts = case(G=7, size=(9, 9))
    agree = agree[:, :1].expand(-1, 7, -1)
    assert (pair_credit(agree, weight, pts, (9, 9), 1.0) == 0).all()


def test_no_pair_gives_no_credit():
    assert torch.equal(pair_credit(*case(P=0, size=(4, 5)), (4, 5), 1.0), torch.zeros(2, 3, 4, 5, device=DEVICE))


def test_same_bits_in_two_runs_inputs_unwritten_and_other_layouts():
    agree, weight, pts = case(B=1, P=17)
    before = agree.clone(), weight.clone(), pts.clone()
    first, second = (pair_credit(agree, weight, pts, (37, 33), 2.0) for _ in range(2))
    other = pair_credit(agree.mT.contiguous().mT, weight.T.contiguous().T, pts.int(), (37, 33), 2.0)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, other, rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip((agree, weight, pts), before, strict=True))


def test_what_does_not_fit_is_refused():
    agree, weight, pts = case()
    with pytest.raises(ValueError, match="got width 0, want width > 0"):
        pair_credit(agree, weight, pts, (37, 33), 0)
    with pytest.raises(ValueError, match=r"got weight \(2, 40\)"):
        pair_credit(agree, weight[:, 1:], pts, (37, 33), 1.0)
