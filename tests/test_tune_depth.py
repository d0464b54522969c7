"""A depth network learns what a judge says, the right way round; bench.tune_depth in miniature."""
import functools

import one_step
import pytest
import tiny_depth
import torch
from expect import refused, seeded
from test_depth import toy_config

from bench import tune_depth
from evaluation.scores import accuracy
from models.copies import Networks
from models.depth_families import find_family
from predictor import load_predictor
from relations import NAMES, at_points, margin, sample_pairs
from runtime.config import UserError


def toy_photos(n, seed):
    """Photos (n, 3, 56, 56) of 4 x 4 grey squares, pairs (n, 64, 2, 2), and +1 where red is the brighter point."""
    rgb = torch.rand(n, 1, 4, 4, generator=seeded(seed)).repeat_interleave(14, 2).repeat_interleave(14, 3)
    rgb = rgb.expand(-1, 3, -1, -1)
    pts = sample_pairs(n, (56, 56), 64, seeded(seed + 1))
    grey = at_points(rgb, pts)[..., 0]
    return rgb, pts, (grey[..., 0] - grey[..., 1]).sign()


def test_it_learns_that_brighter_is_closer_and_not_the_reverse():
    """Held-out photos, the network as it is used: with its ReLU. A slip of a sign anywhere unlearns instead."""
    cfg = toy_config(batch=4, group=8, pairs=64, bank_pairs=64, kl_weight=0.02, norm="global", reward="hard",
                     noise_blocks=(2, 4, 8), clip=0.1)
    nets = Networks(functools.partial(load_predictor, tiny_depth.folder("anything")), cfg, torch.device("cpu"))
    rgb, pts, closer = toy_photos(16, 1)
    prob = (0.5 + 0.4 * closer)[..., None].expand(-1, -1, len(NAMES))
    held, held_pts, truth = toy_photos(16, 50)

    def score():
        network = nets.policy.network
        network.clips = True
        with torch.no_grad():
            found = accuracy(margin(network.predict(held, "depth"), held_pts, "depth"), truth).mean()
        network.clips = False
        return found

    before = score()
    opt = torch.optim.AdamW(nets.params, 3e-3, betas=(0.9, 0.95))
    for step in range(18):
        batch = one_step.batch_of(cfg, nets.policy, (rgb * 255).byte(), pts, prob, seeded(step))
        transitions, advantage, _ = one_step.explore(nets.actor, batch, seeded(100 + step))
        one_step.learn(nets.policy, nets.reference, batch, transitions, advantage, update=0)
        torch.nn.utils.clip_grad_norm_(nets.params, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
    after = score()
    assert after > before + 0.08, (before, after)


# bench.tune_depth -------------------------------------------------------------------------------------------------

def test_the_script_goes_on_where_it_was_and_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_depth, "SCENES", 4)
    words = ["--seeds", "7", "--split", "val", "--images", "2", "--start-steps", "2", "--steps", "1",
             "--out", str(tmp_path)]
    few = ["--set", "--photos", "2", "--batch", "2", "--group", "2", "--pairs", "8", "--bank-pairs", "8"]
    tune_depth.main([*words, *few])
    first = capsys.readouterr().out
    assert "python train.py --stage grpo" in first and "| `wild` | 7 |" in first and "| `synthetic` | 7 |" in first
    folder = tmp_path / "seed7"
    assert (folder / "start" / "config.json").is_file() and (folder / "grpo" / "config.json").is_file()
    monkeypatch.setattr(tune_depth, "prepare_start", None)
    tune_depth.main([*words, *few])
    assert capsys.readouterr().out == first
    refused(UserError, lambda: tune_depth.main([*words, *few, "--lr", "1e-4"]), "other settings")


def test_the_start_learns_the_disparity_of_depth_anything_s_labels():
    """1 at the nearest point, in proportion to 1 / depth, 0 in the sky."""
    depth = torch.tensor([[[[2.0, 4.0], [8.0, 100.0]]]])
    mask = torch.tensor([[[[True, True], [True, False]]]])
    right = -torch.tensor([[[[1.0, 0.5], [0.25, 0.0]]]])
    assert tune_depth.disparity_loss(right, depth, mask) == 0
    assert tune_depth.disparity_loss(right + 0.5, depth, mask) == 0.5
    assert find_family(tune_depth.tiny_depth_anything(0).config, "").means == "disparity"


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--split", "train"]])
def test_a_wrong_flag_is_one_line(argv, capsys):
    with pytest.raises(SystemExit):
        tune_depth.arguments(argv)
    assert capsys.readouterr().err.count("\n") == 1
