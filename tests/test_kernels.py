"""Which path computes a kernel: Triton on a GPU or under the interpreter, plain torch elsewhere."""
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels.draw_markers import mark_photos
from kernels.group_norm_silu import group_norm_silu
from kernels.layer_norm_modulate import layer_norm_modulate
from kernels.log_ratio import log_ratio_kl
from kernels.pair_reward import pair_reward
from kernels.sde_step import sde_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_cpu_tensors_take_the_torch_path_unless_asked():
    assert not kernels.uses_triton(torch.zeros(1))
    with pytest.raises(ValueError, match="got 'cuda', want 'auto', 'torch' or 'triton'"):
        kernels.use("cuda")


def test_describe_names_the_path(triton_path):
    if kernels.INTERPRET:
        assert kernels.describe() == "kernels: triton (interpreter)"
    kernels.use("torch")
    assert kernels.describe() == "kernels: torch (as asked)"
    assert not kernels.uses_triton(torch.zeros(1, device=DEVICE))
    kernels.use("auto")
    want = "kernels: triton (" if DEVICE == "cuda" else "kernels: torch (no GPU)"
    assert kernels.describe().startswith(want)


def test_without_triton_the_torch_path_announces_itself():
    code = """if True:
        import sys
        sys.modules["triton"] = None                             # import triton now raises ImportError
        import torch, kernels
        import kernels.draw_markers, kernels.group_norm_silu, kernels.layer_norm_modulate, kernels.log_ratio
        import kernels.pair_credit, kernels.pair_reward
        from kernels.sde_step import sde_step
        x = torch.zeros(2, 3)
        assert sde_step(x, x, x[:, None], 1.0, -0.1, 0.5)[0].shape == (2, 1, 3)
        print(kernels.describe())"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "kernels: torch (triton is not installed)", done.stderr


def test_where_triton_cannot_launch_torch_computes_and_the_first_line_says_so(monkeypatch):
    """A slim image without a C compiler: found by one launch, not after the base predictor and the judge."""
    tries = []

    def refuse(*_, **__):
        tries.append(1)
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "launch", refuse)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(kernels, "INTERPRET", False)
    kernels.launch_error.cache_clear()
    want = "kernels: torch (Triton cannot launch: RuntimeError: Failed to find C compiler. Set CC)"
    assert kernels.describe() == kernels.describe() == want
    assert not kernels.uses_triton(SimpleNamespace(is_cuda=True)) and len(tries) == 1
    kernels.launch_error.cache_clear()


def test_a_launch_takes_place_on_the_device_of_its_tensor(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())
    x = torch.zeros(2)
    kernels.launch({(1,): lambda *a, **k: seen.append((a, k))}, (1,), x, 3, BLOCK=4)
    assert seen[0] is x and seen[1] == ((x, 3), dict(BLOCK=4))


class Step(torch.nn.Module):
    """User code around the kernels."""

    def forward(self, x, v, eps, pts, prob):
        x_next, mean = sde_step(x, v.detach(), eps, 0.9, -0.1, 0.4)
        ratio, kl = log_ratio_kl(x_next, x, v, mean, v.detach() + 0.1, 0.9, -0.1, 0.4, True)
        reward = pair_reward(x_next.detach(), pts, prob, prob, "albedo")[2]
        photos = mark_photos(x, pts[:, 0], torch.arange(len(x)), x.new_zeros(3, 1, 1), x.new_ones(3, 1, 1), x.dtype)
        h = group_norm_silu(v, v.new_ones(3), v.new_zeros(3), 1, 1e-5, torch.float32).flatten(2)
        h = layer_norm_modulate(h, h[:, :1], h[:, 1:2], 1e-5, torch.float32) * x.flatten(2)
        return (ratio.exp() * reward[..., None, None]).mean() + kl.mean() + photos.mean() + h.mean()


def step_inputs():
    rng = torch.Generator().manual_seed(0)
    x, v = torch.rand(2, 2, 3, 6, 7, generator=rng)
    return (x, v, torch.randn(2, 4, 3, 6, 7, generator=rng), torch.randint(6, (2, 5, 2, 2), generator=rng),
            torch.rand(2, 5, generator=rng))


def step_gradient(step):
    x, v, *rest = step_inputs()
    v.requires_grad_()
    loss = step(x, v, *rest)
    return loss.detach(), torch.autograd.grad(loss, v)[0]


def test_user_code_around_the_kernels_compiles_in_one_graph():
    got, want = step_gradient(torch.compile(Step(), fullgraph=True, backend="aot_eager")), step_gradient(Step())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_export_keeps_every_kernel_as_one_node():
    program = torch.export.export(Step(), step_inputs())
    nodes = " ".join(str(n.target) for n in program.graph.nodes)
    assert all(f"reasonx.{op}" in nodes for op in ("sde_step", "log_ratio_kl", "pair_reward", "mark_photos",
                                                   "group_norm_silu", "layer_norm_modulate"))
    torch.testing.assert_close(program.module()(*step_inputs()), Step()(*step_inputs()))


def test_operators_keep_the_rules_of_torch_library():
    x, v, eps, pts, prob = step_inputs()
    check = torch.library.opcheck
    ops = torch.ops.reasonx
    check(ops.sde_step, (x, v, eps, 0.9, -0.1, 0.4))
    check(ops.log_ratio_kl, (eps, x, v.requires_grad_(), x, x + 1, 0.9, -0.1, 0.4, False))
    check(ops.pair_reward, (eps, pts, prob, prob, "albedo", "hard", 0.1, 0, True))
    check(ops.mark_photos, (x, pts[:, 0], torch.arange(2), torch.zeros(3, 1, 1), torch.ones(3, 1, 1), torch.bfloat16))
    check(ops.group_norm_silu, (eps[0].requires_grad_(), x[0, :, 0, 0], x[0, :, 1, 1], 3, 1e-5, torch.bfloat16))
    check(ops.layer_norm_modulate, (eps[0, 0].detach(), eps[0, 1, :, :1], eps[0, 2, :, :1], 1e-5, torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_captures_the_kernels():
    inputs = [z.cuda() for z in step_inputs()]
    step = Step()
    want = step(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(*inputs)
    graph.replay()
    torch.testing.assert_close(got, want)
