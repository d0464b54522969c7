"""Marked, normalised photos against relations.draw_markers, interpreted on a CPU."""
import pytest
import torch

import kernels
from judge import build_mini_judge
from kernels import draw_markers as dm
from models.mini_judge import MiniSizes
from relations import draw_markers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (torch.tensor(z).view(3, 1, 1).to(DEVICE) for z in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def case(size=(31, 41), B=2, N=7, dtype=torch.float32):
    """Photos; points at the corners, on one another, overlapping, anywhere; the photo of each pair, out of order."""
    rng = torch.Generator().manual_seed(0)
    H, W = size
    pts = torch.stack([torch.randint(n, (N, 2), generator=rng) for n in size], -1)
    special = torch.tensor([[[0, 0], [H - 1, W - 1]], [[0, W - 1], [H - 1, 0]], [[9, 9], [9, 9]], [[9, 9], [10, 11]]])
    pts[:4] = special[:N]
    photo = torch.randint(B, (N,), generator=rng)
    return torch.rand(B, 3, H, W, generator=rng).to(DEVICE, dtype), pts.to(DEVICE), photo.to(DEVICE)


@pytest.mark.parametrize("size, dtype", [                           # 31 * 41 = 1271 > BLOCK; places before colours
    ((31, 41), torch.float32), ((37, 12), torch.float32), ((280, 230), torch.float32),
    ((31, 41), torch.float64), ((31, 41), torch.bfloat16)], ids=str)
def test_kernel_equals_ref_to_an_ulp(triton_path, size, dtype):
    args = case(size, N=1 if size[0] > 100 else 7, dtype=dtype)                  # 230 px: 0.45 of its size
    out = torch.float64 if dtype == torch.float64 else torch.float32
    got, want = (fn(*args, MEAN, STD, out) for fn in (dm.mark_photos, dm.mark_photos_ref))
    assert got.dtype == out
    tol = 1e-14 if dtype == torch.float64 else 1e-6                              # a product, not a quotient
    torch.testing.assert_close(got, want, rtol=0, atol=tol)


def test_the_edge_of_the_ring_at_the_size_of_512_px(triton_path, monkeypatch):
    """There pixels lie at distances 4 and 6, exactly on the edge of the ring."""
    monkeypatch.setattr("relations.REFERENCE", 31)
    dm.square_distances.cache_clear()
    got, want = (fn(*case(), MEAN, STD, torch.float32) for fn in (dm.mark_photos, dm.mark_photos_ref))
    dm.square_distances.cache_clear()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_in_the_dtype_of_the_judge(triton_path, dtype):
    """The interpreter truncates bf16 where it stores: one ulp."""
    args = case()
    got, want = (fn(*args, MEAN, STD, dtype) for fn in (dm.mark_photos, dm.mark_photos_ref))
    torch.testing.assert_close(got, want, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-6)


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_without_normalisation_it_is_the_marker_of_relations(triton_path, mode):
    kernels.use(mode)
    rgb, pts, photo = case()
    got = dm.mark_photos(rgb, pts, photo, torch.zeros_like(MEAN), torch.ones_like(STD), torch.float32)
    for i, k in enumerate(photo.tolist()):
        assert torch.equal(got[i], draw_markers(rgb[k:k + 1], pts[i:i + 1, None].transpose(0, 1))[0, 0])


def test_public_function_really_reaches_the_kernel(triton_path, monkeypatch):
    monkeypatch.setattr(dm, "mark_photos_ref", None)
    dm.mark_photos(*case(), MEAN, STD, torch.bfloat16)


def test_the_judge_answers_the_same_on_both_paths(triton_path):
    rng = torch.Generator().manual_seed(0)
    judge = build_mini_judge(MiniSizes(16, 4, 32, 1, 1, 2), rng).eval().to(DEVICE)
    rgb, pts = torch.rand(2, 3, 16, 16, generator=rng).to(DEVICE), case((16, 16), N=6)[1].view(2, 3, 2, 2)
    answers = []
    for path in ("triton", "torch"):
        kernels.use(path)
        answers.append(judge.ask(rgb, pts, batch=4))
    assert answers[0].shape == (2, 3, 4) and answers[0].std() > 1e-3
    torch.testing.assert_close(*answers, rtol=0, atol=1e-6)


def test_no_pair(triton_path):
    assert dm.mark_photos(*case(N=0), MEAN, STD, torch.bfloat16).shape == (0, 3, 31, 41)


def test_same_bits_in_two_runs_inputs_unwritten_and_other_layouts(triton_path):
    rgb, pts, photo = case()
    before = rgb.clone(), pts.clone(), photo.clone()
    first, second = (dm.mark_photos(rgb, pts, photo, MEAN, STD, torch.float32) for _ in range(2))
    other = dm.mark_photos(rgb.to(memory_format=torch.channels_last), pts.int(), photo, MEAN, STD, torch.float32)
    assert torch.equal(first, second) and torch.equal(first, other)
    assert all(torch.equal(a, b) for a, b in zip((rgb, pts, photo), before, strict=True))


def test_a_gradient_into_the_photo_is_that_of_the_definition(triton_path):
    rgb, pts, photo = case((5, 6), B=1, N=2, dtype=torch.float64)
    pts = pts.clamp_max(4)
    mark = lambda z: dm.mark_photos(z, pts, photo, MEAN.double(), STD.double(), torch.float64)  # noqa: E731
    assert torch.autograd.gradcheck(mark, (rgb.requires_grad_(),))


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_what_does_not_fit_is_refused(triton_path, mode):
    kernels.use(mode)
    rgb, pts, photo = case()
    with pytest.raises(ValueError, match=r"got rgb \(2, 3, 31, 41\), pts \(7, 2, 2\), photo \(6,\)"):
        dm.mark_photos(rgb, pts, photo[1:], MEAN, STD, torch.float32)


def test_a_judge_refuses_points_outside_the_photo_before_it_looks():
    judge = build_mini_judge(MiniSizes(16, 4, 32, 1, 1, 2), torch.Generator().manual_seed(0)).eval()
    with pytest.raises(ValueError, match="judge.ask: got points from .*, want 0 <= row < 16, 0 <= col < 16"):
        judge.ask(torch.rand(1, 3, 16, 16), torch.full((1, 1, 2, 2), 16))
