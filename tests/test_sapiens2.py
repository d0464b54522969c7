"""Sapiens2 normals: the map of transformers under both signs of x, its canvas, GRPO, files, who says the sign."""
import functools
import json
import shutil

import numpy as np
import one_step
import pytest
import tiny_depth
import torch
import transformers
from expect import edit, enter, refused, seeded
from test_depth import toy_config
from torch.nn import functional as F

import eval as evaluation
import predictor
import train
from data.pictures import save_png
from evaluation.predictions import weights_key
from models.copies import Networks
from predictor import load_predictor, predict_photo
from relations import NAMES, sample_pairs
from runtime.files import read_log
from runtime.flags import parse
from runtime.weights import add_flip, read_spec, remove_flip, weights_digest

MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def spec(flip_x):
    return add_flip(tiny_depth.folder("sapiens"), flip_x)


def official(folder, pixels):
    """Unit normals by transformers alone."""
    net = transformers.AutoModelForNormalEstimation.from_pretrained(folder).eval()
    with torch.no_grad():
        return F.normalize(net(pixel_values=pixels).normals, dim=1)


@pytest.mark.parametrize("flip_x, sign", [("yes", -1), ("no", 1)])
def test_the_normals_are_those_of_transformers_with_x_as_it_was_said(flip_x, sign):
    rgb = torch.rand(2, 3, 64, 48, generator=seeded())
    policy = load_predictor(spec(flip_x))
    want = official(tiny_depth.folder("sapiens"), (rgb - MEAN) / STD)
    with torch.no_grad():
        got = policy.network.predict(rgb, "normal")
    torch.testing.assert_close(got, want * torch.tensor([sign, 1, 1]).view(3, 1, 1), rtol=0, atol=1e-5)
    assert want.std((0, 2, 3)).min() > 0.1 and policy.modalities == ("normal",) and policy.size == 64


def test_a_wide_photo_keeps_its_aspect_on_a_black_canvas():
    """30 x 60 px fill 24 x 48 of 64 x 48: 20 black rows above and below, which are no part of the map."""
    rgb = torch.rand(1, 3, 30, 60, generator=seeded())
    small = F.interpolate(rgb, (24, 48), mode="bilinear", antialias=True)
    canvas = torch.zeros(1, 3, 64, 48)
    canvas[..., 20:44, :] = small
    net = load_predictor(spec("no")).network
    torch.testing.assert_close(net.prepare(rgb)[0], (canvas - MEAN) / STD, rtol=0, atol=1e-5)
    want = official(tiny_depth.folder("sapiens"), (canvas - MEAN) / STD)[..., 20:44, :]
    want = F.normalize(F.interpolate(want, (30, 60), mode="bilinear"), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(net.predict(rgb, "normal"), want, rtol=0, atol=1e-4)
    maps = predict_photo(load_predictor(spec("no")), torch.rand(3, 90, 20, generator=seeded()))
    assert maps["normal"].shape == (3, 90, 20)


def test_three_steps_begin_with_a_ratio_of_one_and_no_position_is_rescaled(tmp_path):
    """With adapters on attention and gated MLP; what is saved opens in transformers and knows its sign."""
    cfg = toy_config(lora=2, checkpointing=True)
    nets = Networks(functools.partial(load_predictor, spec("yes")), cfg, torch.device("cpu"))
    rgb = torch.randint(256, (3, 3, 48, 48), generator=seeded(4), dtype=torch.uint8)
    pts = sample_pairs(3, (48, 48), 8, seeded(5))
    prob = torch.rand(3, 8, len(NAMES), generator=seeded(6))
    opt = torch.optim.AdamW(nets.params, 1e-3)
    for step in range(3):
        batch = one_step.batch_of(cfg, nets.policy, rgb, pts, prob, seeded(step))
        transitions, advantage, _ = one_step.explore(nets.actor, batch, seeded(10 + step))
        log = one_step.learn(nets.policy, nets.reference, batch, transitions, advantage, update=0)
        assert log["policy/ratio_min"] == log["policy/ratio_max"] == 1 and log["policy/gap"] == 0
        opt.step()
        opt.zero_grad(set_to_none=True)
        nets.follow(step)
    adapted = {name.rpartition(".lora")[0] for name, p in nets.policy.network.model.named_parameters()
               if p.requires_grad}
    assert {name.rpartition(".")[2] for name in adapted} == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up",
                                                                                   "down")}
    nets.save_average(tmp_path, base=spec("yes"))
    photos = rgb.float() / 255
    again = load_predictor(tmp_path)
    with torch.no_grad():
        got = again.network.predict(photos, "normal")
        torch.testing.assert_close(got, nets.average.network.predict(photos, "normal"), rtol=0, atol=1e-4)
    want = official(tmp_path, again.network.prepare(photos)[0])[..., 8:56, :] * torch.tensor([-1, 1, 1]).view(3, 1, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "predictor.json").read_text())["flip_x"] == "yes"
    card = (tmp_path / "README.md").read_text()
    assert "x left" in card and f"base_model: {tiny_depth.folder('sapiens')}\n" in card
    refused(ValueError, lambda: load_predictor(add_flip(tmp_path, "no")), "tuned with --flip-x yes")
    assert load_predictor(add_flip(tmp_path, "yes")).network.x_sign == -1


# who must say it --------------------------------------------------------------------------------------------------

def test_without_it_one_line_names_the_flag_and_how_to_find_out(tmp_path):
    refused(ValueError, lambda: load_predictor(tiny_depth.folder("sapiens")), "--flip-x", "x points right or left",
            "a wall on its left", "x > 0")
    shutil.copytree(tiny_depth.folder("sapiens"), tmp_path / "net")
    (tmp_path / "net" / "predictor.json").write_text('{"flip_x": "maybe"}')
    refused(ValueError, lambda: load_predictor(tmp_path / "net"), "--flip-x")
    refused(ValueError, lambda: load_predictor(add_flip(tiny_depth.folder("tips"), "yes")), "leave it", "--flip-x yes")
    refused(ValueError, lambda: load_predictor("my_net:Mine,flip-x=no"), "my_net:Mine", "leave it out")
    refused(ValueError, lambda: load_predictor(add_flip("tests/fixtures/predictor", "no")), "--flip-x no", "leave it")


@pytest.mark.parametrize("about, word", [
    (dict(do_pad=False), "do_pad"), (dict(size=dict(height=64, width=40)), "size"),
    (dict(size=dict(height=64, width=48, depth=3)), "")])
def test_a_processor_decides_the_canvas(about, word, tmp_path):
    shutil.copytree(tiny_depth.folder("sapiens"), tmp_path / "net")
    (tmp_path / "net" / "preprocessor_config.json").write_text(json.dumps(about))
    name = add_flip(tmp_path / "net", "no")
    if word:
        refused(ValueError, lambda: load_predictor(name), word, "multiples of 16")
    else:
        assert load_predictor(name).network.sides == (64, 48)
    edit(tmp_path / "net" / "config.json", architectures=["Sapiens2ForPoseEstimation"])
    refused(ValueError, lambda: load_predictor(name), "Sapiens2ForPoseEstimation", "Sapiens2ForNormalEstimation")


def test_the_flag_is_part_of_a_spec(tmp_path, monkeypatch, capsys):
    found = read_spec("org/name,flip-x=no")
    assert (found.hub, found.flip_x, found.text) == ("org/name", "no", "org/name")
    assert read_spec("my:Class,flip-x=yes").module == "my" and add_flip("org/name", "") == "org/name"
    assert remove_flip("org/name,flip-x=no") == "org/name" == remove_flip("org/name")
    odd = tmp_path / "net,flip-x=no"
    odd.mkdir()
    assert read_spec(odd).folder == odd and not read_spec(odd).flip_x
    assert weights_digest(spec("yes")) == weights_digest(tiny_depth.folder("sapiens"))
    assert len({weights_key(load_predictor(spec(x))) for x in ("yes", "no")}) == 2      # no benchmark takes the other's
    words = ["--stage", "grpo", "--judge", "x", "--images", "y"]
    assert parse([*words, "--policy", "z", "--flip-x", "yes"])[1].policy == "z,flip-x=yes"
    for call, argv in ((parse, [*words, "--flip-x", "yes"]), (parse, [*words, "--policy", "z", "--flip-x", "left"]),
                       (evaluation.arguments, ["--dataset", "photos", "--flip-x", "no"])):
        with pytest.raises(SystemExit):
            call(argv)
        assert "--flip-x" in capsys.readouterr().err
    args = evaluation.arguments(["--dataset", "photos", "--checkpoint", "a", "--compare", "b", "--flip-x", "no"])
    assert (args.checkpoint, args.compare) == ("a,flip-x=no", ["b,flip-x=no"])


JUDGE = '''
import torch
from relations import NAMES

class LowerFacesUp:
    size, grid = 48, 1
    def digest(self): return "lower"
    def ask(self, rgb, pts, names=None, modalities=None):
        prob = torch.full((*pts.shape[:2], len(NAMES)), torch.nan)
        prob[..., NAMES.index("normal")] = torch.sigmoid((pts[..., 0, 0] - pts[..., 1, 0]) / 4)
        return prob
'''


def test_said_once_to_train_and_never_again_to_what_came_of_it(tmp_path, monkeypatch):
    enter(monkeypatch, tmp_path, faces=JUDGE)
    for i in range(3):
        save_png(tmp_path / "photos" / f"{i}.png", torch.rand(3, 50, 60, generator=seeded(i)).numpy())
    train.main(["--stage", "grpo", "--policy", str(tiny_depth.folder("sapiens")), "--flip-x", "yes",
                "--judge", "faces:LowerFacesUp", "--images", "photos", "--out", "out", "--device", "cpu",
                *("--size 48 --steps 2 --photos 3 --pairs 8 --bank-pairs 8 --group 2 --batch 2 --replay 0 "
                  "--eval-images 2 --eval-every 0 --save-every 1").split()])
    assert all(row["policy/ratio_max"] == 1 for row in read_log(tmp_path / "out" / "photos" / "metrics.jsonl"))
    predictor.main(["photos/0.png", "--checkpoint", "out/photos", "--out", "after", "--device", "cpu"])
    for flip_x in ("yes", "no"):
        predictor.main(["photos/0.png", "--checkpoint", str(tiny_depth.folder("sapiens")), "--flip-x", flip_x,
                        "--out", flip_x, "--device", "cpu"])
    after, yes, no = (np.load(tmp_path / name / "0_normal.npy") for name in ("after", "yes", "no"))
    assert after.shape == (3, 50, 60)
    np.testing.assert_allclose(yes, no * np.array([-1, 1, 1]).reshape(3, 1, 1), atol=1e-6)
    assert (np.sign(after) == np.sign(yes)).mean() > 0.9
