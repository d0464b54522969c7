"""Kernels against their `_ref`: interpreted on a CPU, compiled where there is a GPU."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import step_logprob as sl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {
    "scalar": (sl.step_logprob, sl.step_logprob_ref),
    "map": (sl.step_logprob_map, sl.step_logprob_map_ref),
}
SHAPES = [(3, 2, 1, 37), (2, 3, 31, 41), (1, 4, 7, 5), (2, 1, 1, 1), (1, 2, 32, 32)]    # 31*41 = 1271 > BLOCK

# Outputs are fp32 (fp64 for fp64) sums of at most 3813 terms in two orders: a few ulp. The gradient is stored
# in the dtype of mean; the interpreter truncates bf16 there, so one ulp of the stored dtype is allowed.
OUT_TOL = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRAD_TOL = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(OUT_TOL)

form = pytest.mark.parametrize("form", FORMS)


def inputs(shape, dtype=torch.float32, seed=0):
    """x_next, mean (with gradient), std."""
    rng = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=rng, dtype=torch.float64)
    x_next = mean + 0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)
    std = 0.3 + torch.rand(shape[0], generator=rng, dtype=torch.float64)
    x_next, mean = x_next.to(DEVICE, dtype), mean.to(DEVICE, dtype)
    return x_next, mean.requires_grad_(), std.to(DEVICE, torch.promote_types(dtype, torch.float32))


def forward_backward(fn, x_next, mean, std):
    mean = mean.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    logp = fn(x_next, mean, std)
    upstream = torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype, device=logp.device).view_as(logp)
    (dmean,) = torch.autograd.grad(logp, mean, upstream)
    return {"logp": logp.detach(), "dmean": dmean}


def assert_close(name, got, want, tol):
    assert (got.dtype, got.shape) == (want.dtype, want.shape), f"{name}: {got.dtype} {tuple(got.shape)}"
    if not want.numel():
        return
    floor = torch.finfo(want.dtype).smallest_normal * tol        # one subnormal step
    got, want = got.double(), want.double()
    err = (got - want).abs()
    at = tuple(i.item() for i in torch.unravel_index(err.nan_to_num(math.inf).argmax(), err.shape))
    scale = want.abs() if name == "dmean" else want.abs().amax()
    rms = (err.square().mean().sqrt() / want.square().mean().sqrt()).item()
    report = f"{name}: max error {err[at]:.3g} at {at}, relative RMS {rms:.3g}, tol {tol:.3g}"
    assert (err <= tol * scale + 2 * floor).all(), report


@form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_ref_forward_and_gradient(triton_path, form, dtype, shape):
    fn, ref = FORMS[form]
    args = inputs(shape, dtype)
    got, want = forward_backward(fn, *args), forward_backward(ref, *args)
    assert_close("logp", got["logp"], want["logp"], OUT_TOL[dtype])
    assert_close("dmean", got["dmean"], want["dmean"], GRAD_TOL[dtype])


@form
def test_public_function_really_reaches_the_kernel(triton_path, form, monkeypatch):
    for name in ("step_logprob_ref", "step_logprob_map_ref"):
        monkeypatch.setattr(sl, name, None)
    FORMS[form][0](*inputs((2, 2, 3, 3)))


@form
def test_float32_kernel_is_as_close_to_float64_as_the_ref_is(triton_path, form):
    fn, ref = FORMS[form]
    x_next, mean, std = inputs((2, 3, 31, 41))
    exact = ref(x_next.double(), mean.double(), std.double()).detach()
    assert_close("logp", fn(x_next, mean, std).detach().double(), exact, 1e-6)      # 4 ulp of fp32


@form
def test_mixed_dtypes_follow_the_wider_state(triton_path, form):
    fn, ref = FORMS[form]
    x_next, mean, std = inputs((2, 3, 5, 37))
    for args in ((x_next, mean.bfloat16(), std.double()), (x_next.double(), mean, std)):
        got, want = forward_backward(fn, *args), forward_backward(ref, *args)
        assert_close("logp", got["logp"], want["logp"], 2e-6)
        assert_close("dmean", got["dmean"], want["dmean"], GRAD_TOL[args[1].dtype])


@form
def test_gradcheck_in_float64(triton_path, form):
    x_next, mean, std = inputs((2, 2, 1, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda mean: FORMS[form][0](x_next, mean, std), (mean,))


@form
def test_scalar_std_equals_the_same_std_per_image(triton_path, form):
    fn, ref = FORMS[form]
    x_next, mean, _ = inputs((2, 3, 5, 7))
    std = torch.tensor(0.7, device=DEVICE)
    for f in (fn, ref):
        assert torch.equal(f(x_next, mean, std), f(x_next, mean, std.expand(2)))


@form
def test_non_contiguous_inputs_and_upstream_gradient(triton_path, form):
    fn, ref = FORMS[form]
    x_next, mean, std = inputs((2, 3, 5, 37))
    mean = mean.detach().to(memory_format=torch.channels_last).transpose(2, 3).requires_grad_()
    args = x_next.transpose(2, 3), mean, std.repeat_interleave(2)[::2]
    got, want = forward_backward(fn, *args), forward_backward(ref, *args)
    assert_close("logp", got["logp"], want["logp"], 2e-6)
    assert_close("dmean", got["dmean"], want["dmean"], 1e-6)
    sums = []
    for f in (fn, ref):                                          # sum() sends back a gradient of stride 0
        (dmean,) = torch.autograd.grad(f(*args).sum(), args[1], retain_graph=True)
        sums.append(dmean)
    assert_close("dmean", *sums, 1e-6)


@form
def test_same_bits_in_two_runs(triton_path, form):
    args = inputs((2, 3, 31, 41))
    first, second = (forward_backward(FORMS[form][0], *args) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@form
def test_inputs_are_never_written_and_backward_runs_twice(triton_path, form):
    args = inputs((2, 3, 5, 37))
    before = [z.detach().clone() for z in args]
    logp = FORMS[form][0](*args).sum()
    (first,) = torch.autograd.grad(logp, args[1], retain_graph=True)
    (second,) = torch.autograd.grad(logp, args[1])
    assert torch.equal(first, second)
    assert all(torch.equal(z.detach(), b) for z, b in zip(args, before, strict=True))


@form
@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_only_the_mean_receives_a_gradient(triton_path, form, mode):
    kernels.use(mode)
    x_next, mean, std = inputs((2, 3, 5, 7))
    x_next, std = x_next.requires_grad_(), std.requires_grad_()
    FORMS[form][0](x_next, mean, std).sum().backward()
    assert x_next.grad is None and std.grad is None and mean.grad is not None
    assert not FORMS[form][0](x_next, mean.detach(), std).requires_grad


@form
def test_empty_batch(triton_path, form):
    got = forward_backward(FORMS[form][0], *inputs((0, 3, 5, 7)))
    assert got["logp"].shape == ((0,) if form == "scalar" else (0, 5, 7))
    assert got["dmean"].shape == (0, 3, 5, 7)


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_equals_the_mean_of_torch_normal_log_prob(triton_path, mode):
    kernels.use(mode)
    x_next, mean, std = inputs((2, 3, 31, 41), torch.float64)
    want = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x_next)
    assert_close("logp", sl.step_logprob(x_next, mean, std), want.flatten(1).mean(1), 1e-14)
    assert_close("logp", sl.step_logprob_map(x_next, mean, std), want.mean(1), 1e-14)


def test_mean_of_the_map_is_the_scalar(triton_path):
    args = inputs((2, 3, 31, 41), torch.float64)
    assert_close("logp", sl.step_logprob_map(*args).mean((1, 2)), sl.step_logprob(*args), 1e-14)


def test_scalar_form_takes_any_trailing_axes(triton_path):
    for shape in ((2, 37), (2, 3, 4, 5, 6)):
        args = inputs(shape)
        assert_close("logp", sl.step_logprob(*args), sl.step_logprob_ref(*args), 2e-6)


@form
def test_shape_mismatch_names_got_and_want(form):
    x_next, mean, std = inputs((2, 3, 5, 7))
    fn = FORMS[form][0]
    with pytest.raises(ValueError, match=r"got x_next \(2, 3, 5, 6\), want \(2, 3, 5, 7\)"):
        fn(x_next[..., :-1], mean, std)
    with pytest.raises(ValueError, match=r"got std \(1,\), want \(\) or \(2,\)"):
        fn(x_next, mean, std[:1])
    with pytest.raises(ValueError, match=r"got mean \(2,\), want \(B, "):
        fn(x_next[:, 0, 0, 0], mean[:, 0, 0, 0], std)


def test_cpu_tensors_take_the_torch_path_unless_asked():
    assert not kernels.on(torch.zeros(1))
    with pytest.raises(ValueError, match="got 'cuda', want 'auto', 'torch' or 'triton'"):
        kernels.use("cuda")


def test_describe_names_the_path(triton_path):
    if kernels.INTERPRET:
        assert kernels.describe() == "kernels: triton (interpreter)"
    kernels.use("torch")
    assert kernels.describe() == "kernels: torch (as asked)"
    assert not kernels.on(torch.zeros(1, device=DEVICE))
    kernels.use("auto")
    want = "kernels: triton (" if DEVICE == "cuda" else "kernels: torch (no GPU)"
    assert kernels.describe().startswith(want)


def test_without_triton_the_torch_path_announces_itself():
    code = """if True:
        import sys
        sys.modules["triton"] = None                             # import triton now raises ImportError
        import torch, kernels
        import kernels.draw_markers, kernels.log_ratio, kernels.pair_credit, kernels.pair_reward
        from kernels.step_logprob import step_logprob
        assert step_logprob(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)).shape == (2,)
        print(kernels.describe())"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "kernels: torch (triton is not installed)", done.stderr
