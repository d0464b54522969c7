"""Rewards of grpo.py: agreement with the judge, and who is credited."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
from data.maps import assumed_camera, normals_from_depth
from data.pools import ScenePool
from evaluation import surface
from grpo import Score, advantage, agreement, pair_weights
from relations import MODALITIES, relation, sample_pairs
from runtime.config import Config

NAMES = list(MODALITIES)
CFG = Config()


def case(m, seed=0, B=3, G=4, P=12):
    rng = torch.Generator().manual_seed(seed)
    pred = torch.rand(B, G, MODALITIES[m].channels, 16, 16, generator=rng)
    if m == "normal":
        pred = torch.nn.functional.normalize(2 * pred - 1, dim=2)
    return pred, sample_pairs(B, (16, 16), P, rng), torch.rand(B, P, generator=rng)


@pytest.fixture(scope="module")
def scenes():
    return ScenePool("synthetic", "val", 6, 32).all()


# agreement --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m", NAMES)
def test_the_hard_reward_is_the_share_of_pairs_on_which_map_and_judge_agree(m):
    pred, pts, prob = case(m)
    agree, weight, reward = agreement(pred, pts, prob, m, replace(CFG, reward="hard"))
    rel = relation(pred, pts[:, None], m).float()                               # 0 in the dead zone counts one half
    want = (0.5 + 0.5 * rel * torch.where(prob > 0.5, 1, -1)[:, None]).mean(-1)
    torch.testing.assert_close(reward, want, rtol=1e-6, atol=1e-6)              # fp32 sum of 12
    torch.testing.assert_close((agree * weight[:, None]).sum(-1), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m", NAMES)
@pytest.mark.parametrize("reward", ["hard", "soft", "confidence"])
def test_a_map_that_answers_as_the_judge_does_beats_one_that_contradicts_it(m, reward):
    pred, pts, _ = case(m, G=1)
    rel = relation(pred[:, 0], pts, m).float()
    cfg = replace(CFG, reward=reward)
    found = [agreement(pred, pts, 0.5 + 0.5 * sign * rel, m, cfg)[2] for sign in (1, -1)]
    assert (found[0] > 0.5).all() and (found[1] < 0.5).all() and torch.allclose(found[0] + found[1], torch.ones(3, 1))


def test_in_the_dead_zone_an_answer_counts_half_or_not_at_all():
    """A map of three levels: 0, 0.5 and 1 of its range; a pair of equal points is in the dead zone."""
    pred = torch.tensor([0.0, 0.5, 1.0]).repeat(8, 1).view(1, 1, 1, 8, 3)
    red, green = torch.tensor([0, 0, 0, 1]), torch.tensor([2, 0, 1, 1])         # closer, dead, closer, dead
    pts = torch.stack([torch.stack((torch.full((4,), 3), col), -1) for col in (red, green)], 1)[None]
    prob = torch.tensor([[0.9, 0.9, 0.2, 0.3]])
    half, skip = (agreement(pred, pts, prob, "depth", replace(CFG, dead_zone=word)) for word in ("half", "skip"))
    assert half[0][0, 0].tolist() == [1, 0.5, 0, 0.5] and half[2].item() == 0.5
    assert skip[0][0, 0].tolist() == [1, 0.5, 0, 0.5] and skip[2].item() == 0.5
    sure = agreement(pred, pts, torch.tensor([[0.9, 0.9, 0.8, 0.3]]), "depth", replace(CFG, dead_zone="skip"))
    assert sure[0][0, 0].tolist() == [1, 1, 1, 1] and sure[2].item() == 1       # the mean over the two that are asked
    flat = agreement(torch.full_like(pred, 0.3), pts, prob, "depth", replace(CFG, dead_zone="skip"))
    assert flat[2].item() == 0.5                                                # a map that answers nothing is unsure


def test_a_balanced_albedo_reward_gives_both_answers_half_of_the_weight():
    _, _, prob = case("albedo")
    weight = pair_weights(prob, "albedo", replace(CFG, balance=1))
    torch.testing.assert_close(weight.sum(1), torch.ones(3))
    yes = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    rows = pair_weights(yes, "albedo", replace(CFG, balance=1))
    torch.testing.assert_close(rows, torch.tensor([[1 / 6, 1 / 6, 1 / 2, 1 / 6]]), rtol=1e-4, atol=0)
    assert (pair_weights(yes, "depth", replace(CFG, balance=1)) == 0.25).all()


def test_a_confidence_weight_follows_how_sure_the_judge_is_and_the_answer_stays_hard():
    prob = torch.tensor([[0.5, 0.75, 0.0, 1.0]])
    cfg = replace(CFG, reward="confidence")
    torch.testing.assert_close(pair_weights(prob, "depth", cfg), torch.tensor([[0, 0.2, 0.4, 0.4]]))
    pred, pts, _ = case("depth", B=1, P=4)
    hard = agreement(pred, pts, prob, "depth", replace(CFG, reward="hard"))[0]
    assert torch.equal(agreement(pred, pts, prob, "depth", cfg)[0], hard)
    unsure = agreement(pred, pts, torch.full((1, 4), 0.5), "depth", cfg)
    assert (unsure[2] == 0).all() and unsure[1].isfinite().all()                # nothing to learn, nothing breaks


# credit -----------------------------------------------------------------------------------------------------------

def credit_of(agree, weight, pts, size, cfg):
    """Advantage of one modality whose state has as many pixels as its photos."""
    one = Score(agree, weight, (agree * weight[:, None]).sum(-1))
    batch = SimpleNamespace(cfg=cfg, pts=pts, rgb=torch.zeros(len(pts), 3, *size))
    return advantage({"depth": one}, batch, [SimpleNamespace(x=torch.zeros(1, 3, *size))])


@pytest.mark.parametrize("credit", ["global", "pair"])
@pytest.mark.parametrize("norm", ["group", "global", "none"])
def test_a_unanimous_group_gets_no_credit(credit, norm):
    _, pts, _ = case("depth")
    agree, weight = torch.full((3, 4, 12), 0.75), torch.full((3, 12), 1 / 12)
    assert (credit_of(agree, weight, pts, (16, 16), replace(CFG, credit=credit, norm=norm)) == 0).all()


@pytest.mark.parametrize("share", [1 / 32, 1 / 4])
def test_the_mean_of_pair_credit_over_the_map_is_the_global_credit(share, monkeypatch):
    monkeypatch.setattr(grpo, "CREDIT_WIDTH", share)
    pred, pts, prob = case("depth")
    agree, weight, _ = agreement(pred, pts, prob, "depth", CFG)
    cfg = replace(CFG, norm="none")
    one = credit_of(agree, weight, pts, (16, 16), replace(cfg, credit="global"))
    local = credit_of(agree, weight, pts, (16, 16), replace(cfg, credit="pair"))
    torch.testing.assert_close(local.mean((2, 3)), one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["group", "global"])
def test_credit_is_scaled_to_unit_variance(norm):
    pred, pts, prob = case("depth")
    agree, weight, _ = agreement(pred, pts, prob, "depth", CFG)
    credit = credit_of(agree, weight, pts, (16, 16), replace(CFG, credit="pair", norm=norm))
    axes = (1, 2, 3) if norm == "group" else (0, 1, 2, 3)
    torch.testing.assert_close(credit.square().mean(axes), torch.ones(3 if norm == "group" else ()))


def test_points_of_the_photo_are_pixels_of_a_smaller_state():
    agree, weight = torch.tensor([[[1.0], [0.0]]]), torch.ones(1, 1)
    one = Score(agree, weight, agree[..., 0])
    cfg = replace(CFG, credit="pair", norm="none")
    batch = SimpleNamespace(cfg=cfg, rgb=torch.zeros(1, 3, 32, 32),
                            pts=torch.tensor([[[[8, 20], [8, 20]]]]))
    credit = advantage({"depth": one}, batch, [SimpleNamespace(x=torch.zeros(1, 3, 8, 8))])[0, 0]
    assert divmod(int(credit.argmax()), 8) == (2, 5)


# normals of depth --------------------------------------------------------------------------------------------------

def depth_normals(depth):
    return normals_from_depth(*assumed_camera(depth[..., 0, :, :]))


def one_normal(z, row, col):
    """Normal of planar z (12, 16) at an inner pixel, for a focal length of 16 px and the centre (7.5, 5.5)."""
    def point(r, c):
        return z[r, c] * np.array([(c - 7.5) / 16, -(r - 5.5) / 16, -1.0])
    n = np.cross(point(row, col + 1) - point(row, col - 1), point(row - 1, col) - point(row + 1, col))
    return n / np.linalg.norm(n)


def test_normals_of_depth_are_those_of_the_metric(scenes):
    depth = torch.rand(2, 3, 1, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = depth_normals(depth)
    for b in range(2):
        for g in range(3):
            z = 1 + 2 * depth[b, g, 0].numpy()
            want = surface.valid_normals(z, 16, 16, 7.5, 5.5)[:, 1:-1, 1:-1]
            np.testing.assert_allclose(got[b, g].numpy(), want, atol=1e-12)
            loop = [[one_normal(z, row, col) for col in range(1, 15)] for row in range(1, 11)]
            np.testing.assert_allclose(want, np.array(loop).transpose(2, 0, 1), atol=1e-12)


# pairs that the judge does not know ---------------------------------------------------------------------------------

@pytest.mark.parametrize("m", NAMES)
@pytest.mark.parametrize("reward", ["hard", "soft", "confidence", "brier"])
@pytest.mark.parametrize("balance", [0, 1])
def test_a_pair_without_an_answer_is_as_if_it_had_not_been_drawn(m, reward, balance):
    pred, pts, prob = case(m)
    cfg = replace(CFG, reward=reward, balance=balance)
    want = agreement(pred, pts[:, :8], prob[:, :8], m, cfg)
    unknown = prob.clone()
    unknown[:, 8:] = torch.nan
    agree, weight, found = agreement(pred, pts, unknown, m, cfg)
    torch.testing.assert_close(found, want[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight[:, :8], want[1], rtol=1e-5, atol=1e-7)
    assert (weight[:, 8:] == 0).all() and agree.isfinite().all()


def test_photos_of_which_the_judge_knows_nothing_teach_nothing():
    pred, pts, prob = case("depth")
    prob[0] = torch.nan
    for credit in ("global", "pair"):
        cfg = replace(CFG, credit=credit, norm="global")
        scored = {"depth": Score(*agreement(pred, pts, prob, "depth", cfg))}
        batch = SimpleNamespace(cfg=cfg, pts=pts, rgb=torch.zeros(3, 3, 16, 16))
        given = advantage(scored, batch, [SimpleNamespace(x=torch.zeros(3, 3, 16, 16))])
        assert (given[0] == 0).all() and given[1:].abs().amax() > 0 and given.isfinite().all()
