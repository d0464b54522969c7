"""Relations, agreements and rewards of the kernel against relations.py, interpreted on a CPU."""
import pytest
import torch
from formulas import agreement

import kernels
from kernels import pair_reward as pr
from relations import MODALITIES, margin, relation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = list(MODALITIES)
TOL = dict(rtol=0, atol=2e-6)              # agreements in [0, 1], rewards: sums of at most 1271 of them in two orders

every_modality = pytest.mark.parametrize("m", NAMES)


def case(m, P=37, dtype=torch.float32, size=(13, 17), B=2, G=3, seed=0):
    """Maps, points with the four corners among them, probabilities with 0, 1/2 and 1 among them, weights."""
    rng = torch.Generator().manual_seed(seed)
    H, W = size
    pred = torch.rand(B, G, MODALITIES[m].channels, H, W, generator=rng)
    if m == "normal":
        pred = 2 * pred - 1
    if m == "albedo":
        pred = pred / 8                                                          # both answers occur
    pts = torch.stack([torch.randint(n, (B, P, 2), generator=rng) for n in size], -1)
    pts[:, :2] = torch.tensor([[[0, 0], [H - 1, W - 1]], [[0, W - 1], [H - 1, 0]]])[:P]
    prob = torch.rand(B, P, generator=rng)
    prob[:, :3] = torch.tensor([0.0, 0.5, 1.0])[:P]
    weight = torch.rand(B, P, generator=rng) + 0.1
    return tuple(z.to(DEVICE) for z in (pred.to(dtype), pts, prob, weight / weight.sum(1, keepdim=True)))


def outputs(found):
    """What a call gives: the relation, where the form is hard, agreement and reward."""
    return [z for z in found if z is not None]


def assert_same(got, want):
    assert (got[0] is None) == (want[0] is None)
    if want[0] is not None:
        assert torch.equal(got[0], want[0]) and got[0].dtype == torch.int8
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=TOL["atol"] if a.dtype == torch.float32 else 1e-13)


@every_modality
@pytest.mark.parametrize("form, window, dtype", [                   # a map is read before the form matters
    ("hard", 0, torch.float32), ("soft", 1, torch.float32), ("brier", 0, torch.float32),
    ("soft", 0, torch.float64), ("hard", 0, torch.bfloat16), ("brier", 0, torch.float16)], ids=str)
def test_kernel_equals_ref(triton_path, m, dtype, form, window):
    args = case(m, dtype=dtype)
    want = pr.pair_reward_ref(*args, m, form, 0.1, window)
    rel = pr.pair_reward_ref(*args, m, "hard", 0.1, window)[0]
    assert {-1, 1} <= set(rel.flatten().tolist())
    assert_same(pr.pair_reward(*args, m, form, 0.1, window, form == "hard"), want)


@pytest.mark.parametrize("m", ["depth", "irradiance"])
@pytest.mark.parametrize("P, window", [(1271, 0), (37, 3)])
def test_more_pairs_than_one_program_holds_and_a_wide_window(triton_path, m, P, window):
    args = case(m, P=P, size=(9, 11), B=1, G=2 if P > 256 else 1)
    assert_same(pr.pair_reward(*args, m, "soft", 0.05, window), pr.pair_reward_ref(*args, m, "soft", 0.05, window))


def test_a_map_larger_than_one_step_of_the_range(triton_path):
    """18,285 pixels: more than the 16 programs of 1,024 pixels read at once; the extremes lie in the last row."""
    pred, pts, prob, weight = case("depth", size=(115, 159), B=1, G=2)
    pred[0, :, 0, -1, -1], pred[0, :, 0, -1, -2] = 9.0, -9.0
    assert_same(pr.pair_reward(pred, pts, prob, weight, "depth", "hard", relation=True),
                pr.pair_reward_ref(pred, pts, prob, weight, "depth", "hard"))


@every_modality
@pytest.mark.parametrize("P", [0, 1])
def test_no_pair_and_one_pair(triton_path, m, P):
    args = case(m, P=P)
    got = pr.pair_reward(*args, m, "hard", relation=True)
    assert got[0].shape == (2, 3, P) and got[2].shape == (2, 3)
    assert_same(got, pr.pair_reward_ref(*args, m, "hard"))


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_a_relation_is_given_only_where_it_is_asked_for(triton_path, mode):
    kernels.use(mode)
    args = case("depth")
    assert all(pr.pair_reward(*args, "depth", form)[0] is None for form in pr.FORMS)
    rel = [pr.pair_reward(*args, "depth", form, relation=True)[0] for form in ("hard", "confidence")]
    assert torch.equal(*rel) and rel[0].dtype == torch.int8
    with pytest.raises(ValueError, match="got form 'soft', want one of hard, confidence"):
        pr.pair_reward(*args, "depth", "soft", relation=True)


@pytest.mark.parametrize("mode", ["triton", "torch"])
@pytest.mark.parametrize("form", pr.FORMS)
def test_a_pair_without_an_answer_counts_as_an_unsure_one_of_no_weight(triton_path, mode, form):
    kernels.use(mode)
    pred, pts, prob, weight = case("irradiance")
    silent = torch.arange(37) % 5 == 2
    found = pr.pair_reward(pred, pts, prob.masked_fill(silent, torch.nan), weight, "irradiance", form)
    want = pr.pair_reward(pred, pts, prob.masked_fill(silent, 0.5), weight.masked_fill(silent, 0.0), "irradiance", form)
    assert all(torch.equal(a, b) for a, b in zip(outputs(found), outputs(want), strict=True))
    assert found[2].isfinite().all()


def test_a_form_that_does_not_use_the_relation_does_not_compute_it(monkeypatch):
    monkeypatch.setattr(pr, "harden", None)
    for form in ("soft", "brier"):
        pr.pair_reward_ref(*case("depth"), "depth", form)


def test_no_map():
    args = case("depth", B=0)
    assert pr.pair_reward(*args, "depth")[2].shape == (0, 3)


def test_public_function_really_reaches_the_kernel(triton_path, monkeypatch):
    monkeypatch.setattr(pr, "pair_reward_ref", None)
    pr.pair_reward(*case("depth"), "depth")


@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("m", ["depth", "normal", "irradiance"])     # one channel, the last, and all three in turn
def test_any_strides_give_the_bits_of_a_contiguous_map_and_no_copy(triton_path, m, form):
    pred, pts, prob, weight = case(m, G=2)
    layouts = dict(channels_last=pred.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
                   transposed=pred.mT.contiguous().mT, sliced=torch.stack((pred, -pred), -1)[..., 0])
    strided = torch.stack((prob, 1 - prob), -1)[..., 0]
    want = outputs(pr.pair_reward(pred, pts, prob, weight, m, form))
    for layout, other in layouts.items():
        assert (m, layout) == ("depth", "channels_last") or not other.is_contiguous()
        got = outputs(pr.pair_reward(other, pts.int(), strided, weight, m, form))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), layout


def near(value, ulps=6):
    """fp32 numbers around a value, one ulp apart."""
    out = torch.full((2 * ulps + 1,), value)
    for i in range(len(out)):
        for _ in range(abs(i - ulps)):
            out[i] = torch.nextafter(out[i], torch.tensor(torch.inf if i > ulps else -torch.inf))
    return out


@pytest.mark.parametrize("m, value, extent", [("depth", 0.02, 1.0), ("depth", 0.02 * 0.7, 0.7),
                                              ("depth", 0.02 * 3.1, 3.1), ("normal", 0.04, 1.0), ("albedo", 0.05, 1.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_edge_of_the_dead_zone_and_ties_are_decided_as_by_the_definition(triton_path, m, value, extent, sign):
    steps = sign * near(value)
    C, n = MODALITIES[m].channels, len(steps)
    pred = torch.zeros(1, 1, C, 2, n + 1)
    pred[0, 0, -1, 0, 1:] = steps                                                # red, against green: 0
    pred[0, 0, -1, 1, :2] = torch.tensor([0.0, sign * extent])                   # of depth: the range
    pts = torch.zeros(1, n + 1, 2, 2, dtype=torch.long)
    pts[0, :, 0, 1] = torch.arange(n + 1)
    prob, weight = torch.ones(1, n + 1), torch.full((1, n + 1), 1 / (n + 1))
    pred, pts, prob, weight = (z.to(DEVICE) for z in (pred, pts, prob, weight))
    want = relation(pred, pts[:, None], m)
    assert len(set(want[0, 0, 1:].tolist())) == 2                                # both sides of the edge occur
    assert torch.equal(pr.pair_reward(pred, pts, prob, weight, m, "hard", relation=True)[0], want)


@every_modality
@pytest.mark.parametrize("form, window", [("hard", 0), ("soft", 1)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_non_finite_pixels_give_no_answer_and_do_not_widen_the_range(triton_path, m, form, window):
    pred, pts, prob, weight = case(m)
    for g, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        pred[0, g, :, ::3, ::2] = bad
        pred[1, g] = bad                                                         # nothing finite at all
    want = pr.pair_reward_ref(pred, pts, prob, weight, m, form, 0.1, window)
    rel = relation(pred, pts[:, None], m, window)
    assert (rel[0] == 0).any(1).all() and (want[1][1] == 0.5).all()
    assert_same(pr.pair_reward(pred, pts, prob, weight, m, form, 0.1, window, form == "hard"), want)


@every_modality
def test_a_constant_map_is_in_the_dead_zone_but_has_one_colour(triton_path, m):
    pred, pts, prob, weight = case(m)
    pred[:] = 0.25
    assert (pr.pair_reward(pred, pts, prob, weight, m, "hard", relation=True)[0] == (1 if m == "albedo" else 0)).all()


@every_modality
@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_the_hard_reward_of_sure_answers_is_the_share_of_agreement(triton_path, m, mode):
    kernels.use(mode)
    pred, pts, prob, weight = case(m)
    answer = torch.where(prob > 0.5, 1, -1)
    uniform = torch.full_like(weight, 1 / weight.shape[1])
    reward = pr.pair_reward(pred, pts, (answer > 0).float(), uniform, m, "hard")[2]
    torch.testing.assert_close(reward, agreement(relation(pred, pts[:, None], m), answer[:, None]), **TOL)


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_swapping_the_points_flips_the_vote_exactly(triton_path, mode):
    kernels.use(mode)
    pred, pts, prob, weight = case("depth")
    sure = torch.ones_like(prob)
    rel, flipped = (pr.pair_reward(pred, z, sure, weight, "depth", "hard", relation=True)[0]
                    for z in (pts, pts.flip(2)))
    assert torch.equal(rel, -flipped)
    for form in ("hard", "soft"):
        agree = pr.pair_reward(pred, pts, sure, weight, "depth", form)[1]
        swapped = pr.pair_reward(pred, pts.flip(2), sure, weight, "depth", form)[1]
        torch.testing.assert_close(agree - 0.5, 0.5 - swapped, rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_same_bits_in_two_runs_and_inputs_are_never_written(triton_path, form):
    args = case("depth", P=300)
    before = [z.clone() for z in args]
    first, second = (outputs(pr.pair_reward(*args, "depth", form, window=1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(z, b) for z, b in zip(args, before, strict=True))


def test_a_soft_reward_that_wants_a_gradient_has_the_right_one(triton_path):
    pred, pts, prob, weight = case("irradiance", P=5, dtype=torch.float64, size=(3, 4), B=1, G=2)
    reward = lambda z: pr.pair_reward(z, pts, prob.double(), weight.double(), "irradiance", "soft", 0.5)[2]  # noqa: E731
    assert torch.autograd.gradcheck(reward, (pred.requires_grad_(),))


def test_arguments_that_do_not_fit_name_got_and_want():
    pred, pts, prob, weight = case("normal")
    with pytest.raises(ValueError, match="got modality 'colour', want one of depth, "):
        pr.pair_reward(pred, pts, prob, weight, "colour")
    with pytest.raises(ValueError, match="got form 'harder', want one of hard, confidence, soft, brier"):
        pr.pair_reward(pred, pts, prob, weight, "depth", "harder")
    with pytest.raises(ValueError, match=r"got pred \(2, 3, 3, 13, 17\), want \(B, G, 1, H, W\) for 'depth'"):
        pr.pair_reward(pred, pts, prob, weight, "depth")
    with pytest.raises(ValueError, match=r"got pts \(1, 37, 2, 2\), want \(2, P, 2, 2\)"):
        pr.pair_reward(pred, pts[:1], prob, weight, "normal")
    with pytest.raises(ValueError, match=r"got weight \(2, 36\), want \(2, 37\), one per pair"):
        pr.pair_reward(pred, pts, prob, weight[:, 1:], "normal")


@every_modality
def test_the_brier_reward_is_best_for_a_map_as_sure_as_the_judge(m):
    """A proper score: of all answers of the map the expected reward is largest at tanh(margin / tau) = 2 p - 1."""
    pred, pts, _, weight = (z.double() if z.is_floating_point() else z for z in case(m, dtype=torch.float64))
    vote = pr.soften(margin(pred, pts[:, None], m), 0.1)                 # (B, G, P)
    sure = 0.5 + 0.5 * vote[:, 0]
    agree = pr.pair_reward(pred, pts, sure, weight, m, "brier")[1]
    torch.testing.assert_close(agree[:, 0], torch.ones_like(sure))
    want = 1 - (vote - vote[:, :1]).square() / 4
    torch.testing.assert_close(agree, want)
    assert (agree >= 0).all() and (agree[:, 1:] <= agree[:, :1]).all()
