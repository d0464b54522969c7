"""Fused exploration step, log-ratio and KL against their definitions, interpreted on a CPU."""
import pytest
import torch
from formulas import WRITTEN_OUT, log_prob, log_prob_map

import grpo
import kernels
from kernels import log_ratio as lr
from kernels import sde_step as ss
from predictor import COEFFICIENTS, plan_walk, rollout
from runtime.ranks import Draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
A, B, STD = 0.83, -0.21, 0.37
SHAPES = [(2, 3, 2, 5, 7), (1, 2, 3, 31, 41), (3, 1, 1, 1, 37)]                  # 31 * 41 = 1271 > BLOCK
# fp32 sums of at most 3813 terms in two orders, scaled by the largest. A bf16 or fp16 gradient is stored in the dtype
# of v: the interpreter truncates bf16, one ulp.
TOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRAD_TOL = TOL | {torch.bfloat16: 2**-7, torch.float16: 2**-10}

per_pixel = pytest.mark.parametrize("per_pixel", [False, True], ids=["scalar", "map"])


def case(shape=SHAPES[0], dtype=torch.float32, seed=0):
    """x_next, x, v, mean_old, v_ref."""
    rng = torch.Generator().manual_seed(seed)
    R, K, *state = shape
    x, v_old, change, other = (torch.randn(R, *state, generator=rng, dtype=torch.float64) for _ in range(4))
    eps = torch.randn(shape, generator=rng, dtype=torch.float64)
    mean_old = A * x + B * v_old
    made = mean_old[:, None] + STD * eps, x, v_old + 0.3 * change, mean_old, v_old + 0.2 * other
    return [z.to(DEVICE, dtype) for z in made]


def outputs(fn, args, per_pixel):
    """Log-ratio, KL and the gradient into v of an uneven sum of both."""
    x_next, x, v, *rest = args
    v = v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = fn(x_next, x, v, *rest, A, B, STD, per_pixel)
    uneven = [torch.linspace(-1, 2, z.numel(), dtype=z.dtype, device=z.device).view_as(z) for z in out]
    return dict(log_ratio=out[0].detach(), kl=out[1].detach(), dv=torch.autograd.grad(out, v, uneven)[0])


def assert_same(got, want, dtype):
    for name, w in want.items():
        assert (got[name].dtype, got[name].shape) == (w.dtype, w.shape), name
        tol = (GRAD_TOL if name == "dv" else TOL)[dtype]
        torch.testing.assert_close(got[name], w, rtol=tol if name == "dv" else 0,
                                   atol=TOL[dtype] * w.double().abs().max().item() if w.numel() else 0, msg=name)


@per_pixel
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_ratio_equals_ref_forward_and_gradient(triton_path, per_pixel, dtype, shape):
    args = case(shape, dtype)
    assert_same(outputs(lr.log_ratio_kl, args, per_pixel), outputs(lr.log_ratio_kl_ref, args, per_pixel), dtype)


@per_pixel
@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_log_ratio_is_the_difference_of_two_log_densities_and_kl_is_torchs(triton_path, per_pixel, mode):
    kernels.use(mode)
    x_next, x, v, mean_old, v_ref = case(dtype=torch.float64)
    ratio, kl = lr.log_ratio_kl(x_next, x, v, mean_old, v_ref, A, B, STD, per_pixel)
    std = torch.tensor(STD, dtype=torch.float64)
    density = log_prob_map if per_pixel else log_prob
    for k in range(x_next.shape[1]):
        want = density(x_next[:, k], A * x + B * v, std) - density(x_next[:, k], mean_old, std)
        torch.testing.assert_close(ratio[:, k], want, rtol=1e-12, atol=1e-12)
    new, ref = (torch.distributions.Normal(A * x + B * z, STD) for z in (v, v_ref))
    want = torch.distributions.kl_divergence(new, ref).flatten(1).mean(1)
    torch.testing.assert_close(kl, want, rtol=1e-12, atol=0)


@per_pixel
def test_the_kernels_are_really_reached(triton_path, per_pixel, monkeypatch):
    monkeypatch.setattr(lr, "log_ratio_kl_ref", None)
    monkeypatch.setattr(ss, "sde_step_ref", None)
    x_next, x, v, mean_old, v_ref = case()
    lr.log_ratio_kl(x_next, x, v, mean_old, v_ref, A, B, STD, per_pixel)
    ss.sde_step(x, v, x_next, A, B, STD)


@per_pixel
def test_gradcheck_in_float64(triton_path, per_pixel):
    x_next, x, v, mean_old, v_ref = case((1, 2, 2, 1, 3), torch.float64)
    fn = lambda v: lr.log_ratio_kl(x_next, x, v, mean_old, v_ref, A, B, STD, per_pixel)         # noqa: E731
    assert torch.autograd.gradcheck(fn, (v.requires_grad_(),))


@per_pixel
@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_only_the_policy_receives_a_gradient(triton_path, per_pixel, mode):
    kernels.use(mode)
    args = [z.requires_grad_() for z in case()]
    ratio, kl = lr.log_ratio_kl(*args, A, B, STD, per_pixel)
    (ratio.sum() + kl.sum()).backward()
    assert [z.grad is not None for z in args] == [False, False, True, False, False]


@per_pixel
def test_same_bits_in_two_runs_inputs_unwritten_and_backward_twice(triton_path, per_pixel):
    args = case(SHAPES[1])
    before = [z.clone() for z in args]
    first, second = (outputs(lr.log_ratio_kl, args, per_pixel) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    v = args[2].clone().requires_grad_()
    total = sum(z.sum() for z in lr.log_ratio_kl(*args[:2], v, *args[3:], A, B, STD, per_pixel))
    grads = [torch.autograd.grad(total, v, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    assert all(torch.equal(z, b) for z, b in zip(args, before, strict=True))


@per_pixel
def test_draws_and_states_of_any_layout(triton_path, per_pixel):
    x_next, x, v, mean_old, v_ref = case()
    swapped = x_next.transpose(0, 1).contiguous().transpose(0, 1)                # as drawn: samples first
    want = outputs(lr.log_ratio_kl, (x_next, x, v, mean_old, v_ref), per_pixel)
    last = [z.to(memory_format=torch.channels_last) for z in (x, v, mean_old, v_ref)]
    for drawn, rest in ((swapped, (x, v, mean_old, v_ref)), (x_next.mT.contiguous().mT, last)):
        assert_same(outputs(lr.log_ratio_kl, (drawn, *rest), per_pixel), want, torch.float32)


@per_pixel
def test_mixed_dtypes_follow_the_wider_state(triton_path, per_pixel):
    x_next, x, v, mean_old, v_ref = case()
    args = x_next, x, v.bfloat16(), mean_old, v_ref.bfloat16()
    assert_same(outputs(lr.log_ratio_kl, args, per_pixel), outputs(lr.log_ratio_kl_ref, args, per_pixel),
                torch.bfloat16)


@per_pixel
def test_no_rows(triton_path, per_pixel):
    got = outputs(lr.log_ratio_kl, case((0, 3, 2, 5, 7)), per_pixel)
    assert got["log_ratio"].shape == ((0, 3, 5, 7) if per_pixel else (0, 3)) and got["kl"].shape == (0,)


# the step ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_ref(triton_path, dtype, shape):
    eps, x, v, *_ = case(shape, dtype)
    eps = eps.transpose(0, 1).contiguous().transpose(0, 1)                       # as drawn: samples first
    got, want = (fn(x, v, eps, A, B, STD) for fn in (ss.sde_step, ss.sde_step_ref))
    for name, g, w in zip(("x_next", "mean"), got, want, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape), name
        torch.testing.assert_close(g, w, rtol=0, atol=1e-14 if dtype == torch.float64 else 2e-6, msg=name)


def test_a_step_that_wants_a_gradient_has_one(triton_path):
    eps, x, v, *_ = case()
    (dv,) = torch.autograd.grad(ss.sde_step(x, v.requires_grad_(), eps, A, B, STD)[1].sum(), v)
    torch.testing.assert_close(dv, torch.full_like(dv, B))


def test_step_same_bits_in_two_runs_and_inputs_unwritten(triton_path):
    eps, x, v, *_ = case(SHAPES[1])
    before = eps.clone(), x.clone(), v.clone()
    first, second = (ss.sde_step(x, v, eps, A, B, STD) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((eps, x, v), before, strict=True))


# both together ----------------------------------------------------------------------------------------------------

@per_pixel
@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("t, s", [(1.0, 0.9), (0.6, 0.5), (0.3, 0.1)])
def test_a_policy_that_did_not_change_has_a_log_ratio_of_exactly_zero(triton_path, per_pixel, mode, name, t, s):
    kernels.use(mode)
    eps, x, v, *_ = case(SHAPES[1])
    a, b, std = COEFFICIENTS[name](t, s, 0.7)
    x_next, mean = ss.sde_step(x, v, eps, a, b, std)
    ratio, kl = lr.log_ratio_kl(x_next, x, v, mean, v.clone(), a, b, std, per_pixel)
    assert (ratio == 0).all() and (kl == 0).all()


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("t, s", [(1.0, 0.9), (0.6, 0.5), (0.3, 0.1)])
def test_the_coefficients_reproduce_the_step(name, t, s):
    eps, x, v, *_ = case((1, 1, 2, 5, 7), torch.float64)
    a, b, std = COEFFICIENTS[name](t, s, 0.7)
    got, want = ss.sde_step(x, v, eps, a, b, std), WRITTEN_OUT[name](x, v, t, s, 0.7, eps[:, 0])
    torch.testing.assert_close(got[0][:, 0], want[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-14)
    assert std == pytest.approx(want[2].item(), rel=1e-12)


@pytest.mark.parametrize("stochastic", [2, 1], ids=["full", "branch"])
def test_rollout_and_loss_are_the_same_on_both_paths_and_the_first_ratio_is_one(triton_path, stochastic):
    """fp32 states through three steps: rounding of fma against product and sum."""
    def net(x, t):
        return torch.tanh(x.roll(1, -1)) * (0.5 + t)

    x, results = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE), []
    for path in ("triton", "torch"):
        kernels.use(path)
        draw = Draw(torch.Generator().manual_seed(1), 2)
        plan = plan_walk([1.0, 0.75, 0.5, 0.0], stochastic, "flow", 0.7, draw)
        x0, steps = rollout(net, x, plan, 3, lambda shape, draw=draw: torch.randn(shape, generator=draw.rng))
        taken = steps[-1]
        v = net(taken.x, taken.t).requires_grad_()
        credit = torch.linspace(-1, 1, taken.x_next[:, :, 0].numel(), device=DEVICE).view_as(taken.x_next[:, :, 0])
        loss, stats = grpo.step_loss(v, v.detach() + 0.1, taken, credit, 0.1, 0.5)
        assert stats["ratio_min"] == stats["ratio_max"] == 1 and stats["clip_frac"] == 0
        results.append((x0, loss, torch.autograd.grad(loss, v)[0]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_shapes_that_do_not_fit_are_refused():
    x_next, x, v, mean_old, v_ref = case()
    with pytest.raises(ValueError, match=r"got x_next \(2, 3, 2, 5, 6\)"):
        lr.log_ratio_kl(x_next[..., 1:], x, v, mean_old, v_ref, A, B, STD)
    with pytest.raises(ValueError, match=r"want \(R, K, C, h, w\) and four of \(R, C, h, w\)"):
        lr.log_ratio_kl(x_next, x, v, mean_old[:1], v_ref, A, B, STD)
    with pytest.raises(ValueError, match=r"sde_step: got x \(2, 2, 5, 7\), v \(1, 2, 5, 7\)"):
        ss.sde_step(x, v[:1], x_next, A, B, STD)
    with pytest.raises(ValueError, match=r"eps \(2, 2, 5, 7\)"):
        ss.sde_step(x, v, x_next[:, 0], A, B, STD)
