"""rewards.py: agreement with the judge, who is credited, mining, and the rewards that need no judge."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import metrics
import rewards
from config import Config
from pools import ScenePool
from relations import MODALITIES, agreement, relation, sample_pairs

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
    agree, weight, reward = rewards.judged(pred, pts, prob, m, replace(CFG, reward="hard"))
    want = agreement(relation(pred, pts[:, None], m), torch.where(prob > 0.5, 1, -1)[:, None])
    torch.testing.assert_close(reward, want, rtol=1e-6, atol=1e-6)              # fp32 sum of 12
    torch.testing.assert_close((agree * weight[:, None]).sum(-1), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m", NAMES)
@pytest.mark.parametrize("reward", ["hard", "soft", "confidence"])
def test_a_map_that_answers_as_the_judge_does_beats_one_that_contradicts_it(m, reward):
    pred, pts, _ = case(m, G=1)
    rel = relation(pred[:, 0], pts, m).float()
    cfg = replace(CFG, reward=reward)
    score = [rewards.judged(pred, pts, 0.5 + 0.5 * sign * rel, m, cfg)[2] for sign in (1, -1)]
    assert (score[0] > 0.5).all() and (score[1] < 0.5).all() and torch.allclose(score[0] + score[1], torch.ones(3, 1))


def test_a_balanced_albedo_reward_gives_both_answers_half_of_the_weight():
    _, _, prob = case("albedo")
    weight = rewards.pair_weights(prob, "albedo", replace(CFG, balance=1))
    torch.testing.assert_close(weight.sum(1), torch.ones(3))
    yes = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    rows = rewards.pair_weights(yes, "albedo", replace(CFG, balance=1))
    torch.testing.assert_close(rows, torch.tensor([[1 / 6, 1 / 6, 1 / 2, 1 / 6]]), rtol=1e-4, atol=0)
    assert (rewards.pair_weights(yes, "depth", replace(CFG, balance=1)) == 0.25).all()


def test_a_confidence_weight_follows_how_sure_the_judge_is_and_the_answer_stays_hard():
    prob = torch.tensor([[0.5, 0.75, 0.0, 1.0]])
    cfg = replace(CFG, reward="confidence")
    torch.testing.assert_close(rewards.pair_weights(prob, "depth", cfg), torch.tensor([[0, 0.2, 0.4, 0.4]]))
    pred, pts, _ = case("depth", B=1, P=4)
    hard = rewards.judged(pred, pts, prob, "depth", replace(CFG, reward="hard"))[0]
    assert torch.equal(rewards.judged(pred, pts, prob, "depth", cfg)[0], hard)
    unsure = rewards.judged(pred, pts, torch.full((1, 4), 0.5), "depth", cfg)
    assert (unsure[2] == 0).all() and unsure[1].isfinite().all()                # nothing to learn, nothing breaks


# credit -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("credit", ["global", "pair", "mix"])
@pytest.mark.parametrize("norm", ["group", "global", "none"])
def test_a_unanimous_group_gets_no_credit(credit, norm):
    _, pts, _ = case("depth")
    agree, weight = torch.full((3, 4, 12), 0.75), torch.full((3, 12), 1 / 12)
    assert (rewards.advantage(agree, weight, pts, (16, 16), 0.5, replace(CFG, credit=credit, norm=norm)) == 0).all()


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("width", [1.0, 4.0])
def test_the_mean_of_any_mix_over_the_map_is_the_global_credit(mix, width):
    pred, pts, prob = case("depth")
    agree, weight, _ = rewards.judged(pred, pts, prob, "depth", CFG)
    cfg = replace(CFG, norm="none", credit_width=width, credit_mix=mix)
    one = rewards.advantage(agree, weight, pts, (16, 16), 0.5, replace(cfg, credit="global"))
    mixed = rewards.advantage(agree, weight, pts, (16, 16), 0.5, replace(cfg, credit="mix"))
    torch.testing.assert_close(mixed.mean((2, 3)), one, rtol=1e-4, atol=1e-6)
    local = rewards.advantage(agree, weight, pts, (16, 16), 0.5, replace(cfg, credit="pair"))
    torch.testing.assert_close(mixed, (1 - mix) * local + mix * one[..., None, None], rtol=1e-4, atol=1e-5)


def test_the_splat_is_wider_where_the_state_is_noisier():
    agree, weight = torch.tensor([[[1.0], [0.0]]]), torch.ones(1, 1)
    pts = torch.tensor([[[[8, 8], [8, 8]]]])
    spread = []
    for level in (0.0, 0.5, 1.0):
        cfg = replace(CFG, credit="pair", norm="none", credit_width=1.0, credit_growth=2.0)
        at = rewards.advantage(agree, weight, pts, (17, 17), level, cfg)[0, 0]
        y = torch.arange(17.0) - 8
        spread.append(float((at.sum(1) * y.square()).sum() / at.sum()) ** 0.5)
    np.testing.assert_allclose(spread, [1.0, 2.0, 3.0], rtol=0.06)             # cut at the border: a little narrower


@pytest.mark.parametrize("norm", ["group", "global"])
def test_credit_is_scaled_to_unit_variance(norm):
    pred, pts, prob = case("depth")
    agree, weight, _ = rewards.judged(pred, pts, prob, "depth", CFG)
    credit = rewards.advantage(agree, weight, pts, (16, 16), 0.5, replace(CFG, credit="pair", norm=norm))
    axes = (1, 2, 3) if norm == "group" else (0, 1, 2, 3)
    torch.testing.assert_close(credit.square().mean(axes), torch.ones(3 if norm == "group" else ()))


# mining -----------------------------------------------------------------------------------------------------------

def test_mining_keeps_the_pairs_that_split_the_group():
    _, pts, _ = case("depth")
    agree, weight = torch.rand(3, 4, 12, generator=torch.Generator().manual_seed(3)), torch.full((3, 12), 1 / 12)
    agree[:, :, :9] = agree[:, :1, :9]                                          # the group agrees on the first nine
    kept, share, where = rewards.mine(agree, weight, pts, 3)
    assert kept.shape == (3, 4, 3) and torch.allclose(share.sum(1), torch.ones(3))
    for b in range(3):
        assert {tuple(p.flatten().tolist()) for p in where[b]} == {tuple(p.flatten().tolist()) for p in pts[b, 9:]}
        for k in range(3):
            match = (pts[b] == where[b, k]).all(-1).all(-1)
            assert torch.equal(agree[b][:, match][:, 0], kept[b, :, k])


# consistency ------------------------------------------------------------------------------------------------------

def test_normals_of_depth_are_those_of_the_metric(scenes):
    depth = torch.rand(2, 3, 1, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = rewards.depth_normals(depth)
    for b in range(2):
        for g in range(3):
            want = metrics.normals_from_depth(1 + 2 * depth[b, g, 0].numpy(), 16, 16, 7.5, 5.5)
            np.testing.assert_allclose(got[b, g].numpy(), want[:, 1:-1, 1:-1], atol=1e-12)


def test_maps_that_fit_each_other_beat_maps_of_other_scenes(scenes):
    depth = torch.rand(3, 1, 1, 1, 1) + torch.linspace(0, 0.5, 16).view(1, 1, 1, 16, 1) * torch.rand(3, 1, 1, 1, 16)
    normal = torch.nn.functional.pad(rewards.depth_normals(depth), (1, 1, 1, 1))
    own, other = (rewards.depth_normal_agreement(depth, n)[..., 1:-1, 1:-1] for n in (normal, -normal))
    torch.testing.assert_close(own, torch.ones_like(own))
    torch.testing.assert_close(other, torch.zeros_like(other), atol=1e-6, rtol=0)
    assert rewards.depth_normal_agreement(depth, normal).shape == (3, 1, 16, 16)


def test_the_photo_agreement_is_one_for_the_true_maps_up_to_a_scale_and_symmetric_about_it():
    rng = torch.Generator().manual_seed(1)
    albedo, irradiance = torch.rand(2, 2, 3, 8, 8, generator=rng).unbind(0)
    linear = rewards.srgb_decode(albedo) * rewards.srgb_decode(irradiance)
    encode = lambda x: torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.pow(1 / 2.4) - 0.055)  # noqa: E731
    got = rewards.photo_agreement(albedo, irradiance, encode(0.3 * linear))
    torch.testing.assert_close(got, torch.ones(2, 8, 8), rtol=0, atol=1e-3)
    worse = rewards.photo_agreement(albedo, irradiance, torch.rand(2, 3, 8, 8, generator=rng))
    assert ((worse >= 0) & (worse <= 1)).all() and worse.mean() < 0.9


@pytest.mark.parametrize("credit", ["global", "pair"])
def test_a_consistency_advantage_is_centred_in_its_group_and_points_the_right_way(credit):
    agree = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    agree[:, 0] = 1.0
    adv = rewards.map_advantage(agree, (8, 8), replace(CFG, credit=credit))
    assert adv.shape == ((2, 4) if credit == "global" else (2, 4, 8, 8))
    torch.testing.assert_close(adv.sum(1), torch.zeros_like(adv.sum(1)), rtol=0, atol=1e-5)
    assert (adv[:, 0] > 0).all()
    same = torch.rand(2, 1, 16, 16).expand(2, 4, 16, 16)
    assert (rewards.map_advantage(same, (8, 8), replace(CFG, credit=credit)).abs() < 1e-6).all()


def test_consistency_rewards_are_off_by_default():
    assert not list(rewards.consistency({}, None, CFG))
