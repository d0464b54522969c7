"""The photos of a run and the preset `tune`: who is held out, two sizes, what decides, the typed command end to end."""
import hashlib
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import tiny_depth
import torch
from expect import equal, seeded
from PIL import Image
from safetensors.torch import load_file
from test_train import refused

import grpo
import train
from data import album
from data.bank import Judgements
from data.photos import Photos, pixel_digest, read_rgb
from evaluation.watch import drift, mean_accuracy
from judge import build_mini_judge
from models.mini_judge import MiniSizes
from predictor import load_predictor
from relations import NAMES
from runtime.config import Config, UserError
from runtime.files import read_log

FLAGS = """--steps 4 --batch 2 --group 2 --pairs 8 --bank-pairs 8 --lr 1e-3 --ema 0.1 --eval-every 1 --save-every 1
    --device cpu""".split()


def digests(n, seed=0):
    """Digests of n photos."""
    return [hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).hexdigest() for i in range(n)]


def write_photos(folder, n, seed=0):
    """Photos of two flat halves and noise, 40 x 50 px."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        rgb = torch.rand(40, 50, 3, generator=seeded(seed + i))
        Image.fromarray((rgb * 255).byte().numpy()).save(folder / f"{i:02}.png")
    return folder


# who is held out --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, least, most", [
    (1, 0, 0), (2, 1, 1), (5, 2, 2), (8, 4, 4), (9, 8, 8), (102, 8, 12), (4000, 150, 250)])
def test_a_twentieth_is_held_out_and_at_least_eight_or_half_of_fewer(n, least, most):
    held = album.hold_out(digests(n))
    assert held.shape == (n,) and least <= int(held.sum()) <= most


@pytest.mark.parametrize("n", [12, 60, 400])
def test_adding_photos_holds_out_none_that_was_trained_on(n):
    few, more = digests(n), digests(300, seed=1)
    mixed = few + more
    random.Random(0).shuffle(mixed)
    before = {d for d, held in zip(few, album.hold_out(few), strict=True) if not held}
    after = {d for d, held in zip(mixed, album.hold_out(mixed), strict=True) if held}
    assert before and after and not before & after


def test_copies_of_a_photo_are_on_one_side_and_count_once():
    one = digests(10)
    held = album.hold_out(one * 3)
    assert torch.equal(held[:10], held[10:20]) and torch.equal(held[:10], held[20:]) and int(held[:10].sum()) == 8


def test_a_digest_is_of_pixels_not_of_files(tmp_path):
    write_photos(tmp_path, 2)
    Image.open(tmp_path / "00.png").save(tmp_path / "other name.bmp")
    a, b, copy = (pixel_digest(read_rgb(tmp_path / name)) for name in ("00.png", "01.png", "other name.bmp"))
    assert a == copy != b and len(a) == 16


def test_parting_keeps_rows_together_trains_on_the_asked_number_and_needs_no_second_copy():
    n = 20
    number = torch.arange(n)
    rgb = number.byte().view(n, 1, 1, 1).expand(n, 3, 4, 4).clone()
    judged = Judgements(rgb, number.view(n, 1, 1, 1).expand(n, 5, 2, 2), number.view(n, 1, 1).expand(n, 5, 4).float(),
                        [f"{i}" for i in range(n)])
    held = album.hold_out(digests(n))
    learn, apart = album.part_photos(judged, held, 7)
    for part, want in ((learn, (~held).nonzero()[:7, 0]), (apart, held.nonzero()[:, 0])):
        assert part.names == [str(i) for i in want.tolist()]
        for rows in (part.rgb[:, 0, 0, 0], part.pts[:, 0, 0, 0], part.prob[:, 0, 0]):
            assert torch.equal(rows.long(), want)
    assert learn.rgb.data_ptr() == rgb.data_ptr()


@pytest.mark.parametrize("copies", [0, 11])
def test_one_photo_and_its_copies_are_too_few(tmp_path, copies):
    write_photos(tmp_path / "photos", 1)
    for i in range(copies):
        shutil.copy(tmp_path / "photos" / "00.png", tmp_path / "photos" / f"copy{i}.png")
    cfg = SimpleNamespace(images=str(tmp_path / "photos"), size=8, photos=100, out=str(tmp_path))
    with pytest.raises(UserError, match="got 1 photo in .*; want at least 2"):
        album.read_album(cfg, SimpleNamespace(size=8))


def test_photos_limits_those_that_are_trained_on(tmp_path):
    cfg = SimpleNamespace(images=str(write_photos(tmp_path / "photos", 14)), size=8, photos=3, out=str(tmp_path))
    found = album.read_album(cfg, SimpleNamespace(size=4))
    assert len(found) == 11 and int((~album.hold_out(found.digests)).sum()) == 3
    assert found.images.shape == (11, 3, 8, 8) and found.seen.shape == (11, 3, 4, 4)


# two sizes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, to", [(32, 518), (448, 32), (28, 56), (7, 7), (10, 15)])
def test_a_point_moves_to_the_pixel_that_holds_its_centre(size, to):
    moved = album.move_points(torch.arange(size), size, to)
    assert moved.tolist() == [int((i + 0.5) * to / size + 1e-9) for i in range(size)]
    assert 0 <= moved.min() and moved.max() < to and (size != to or torch.equal(moved, torch.arange(size)))


class Lower:
    """Knows one thing about depth: what is lower is closer."""

    def __init__(self, size=24, grid=1):
        self.size = size
        self.grid = grid

    def digest(self):
        return f"lower {self.size}"

    def ask(self, rgb, pts, names=None, modalities=None):
        assert rgb.shape[-1] == self.size and rgb.min() >= 0
        prob = torch.full((*pts.shape[:2], len(NAMES)), torch.nan)
        prob[..., 0] = (pts[..., 0, 0] > pts[..., 1, 0]).float()
        return prob


@pytest.mark.parametrize("source", ["folder", "procedural"])
@pytest.mark.parametrize("size", [8, 40])
def test_a_judge_of_another_size_is_asked_at_its_own_and_its_points_move(tmp_path, source, size):
    images = str(write_photos(tmp_path / "photos", 10)) if source == "folder" else ""
    cfg = Config(images=images, size=size, photos=4, bank_pairs=64, out=str(tmp_path / "out"))
    judge = Lower()
    found = album.read_album(cfg, judge)
    want = album.read_album(cfg, judge)                                         # the first is used up
    learn, held = album.judgements(cfg, judge, torch.device("cpu"), ("depth",), found)
    assert learn.rgb.shape[1:] == (3, size, size) and learn.pts.max() < size and learn.pts.min() >= 0
    known = learn.prob[..., 0].isfinite()
    rows = learn.pts[..., 0]
    assert known.any() and torch.equal(known, (learn.pts[..., 0, :] != learn.pts[..., 1, :]).any(-1))
    up = (rows[..., 0] > rows[..., 1]) & known                                  # rows that stay apart keep their answer
    assert (learn.prob[..., 0][up] == 1).all() and (size > 8 or not known.all())
    if source == "folder":
        for part in (learn, held):
            for rgb, name in zip(part.rgb, part.names, strict=True):
                assert torch.equal(rgb, want.images[want.names.index(name)])
        assert not set(learn.names) & set(held.names) and len(learn.names + held.names) == 10
    else:
        assert held is None


@pytest.mark.parametrize("jitter, size, judge, want", [
    (0, 0, Lower(28, 4), (518, 74)), (4, 56, Lower(28, 4), (56, 8)), (4, 32, Lower(32, 4), (32, 4)),
    (0, 32, Lower(448, 1), (32, 1)), (0, 32, None, (32, 1)), (1, 0, Lower(448, 1), (518, 1))])
def test_size_and_cell_are_those_of_the_networks(jitter, size, judge, want):
    cfg = train.settle(Config(size=size, jitter=jitter), SimpleNamespace(size=525, multiple=14), judge)
    assert (cfg.size, cfg.jitter) == want


# what decides -----------------------------------------------------------------------------------------------------

def figures(reward, agreement, spread=1.0):
    return {"photos/reward/depth": reward, "photos/agreement/depth": agreement, "photos/spread/depth": spread,
            "synthetic/depth/pairs": 0.1}


def test_agreement_on_held_out_photos_decides_where_there_are_any():
    assert mean_accuracy(figures(0.8, 0.6)) == pytest.approx(0.7)
    assert mean_accuracy({"synthetic/depth/pairs": 0.1, "wild/depth/pairs": 0.3}) == pytest.approx(0.2)


@pytest.mark.parametrize("now, word", [
    (figures(0.8, 0.69), ""), (figures(0.8, 0.5), "photos/agreement/depth has fallen from 0.7 to 0.5"),
    (figures(0.6, 0.7), "photos/reward/depth has fallen"), (figures(0.8, 0.7, 5.0), "photos/spread/depth is 5 x"),
    (figures(0.8, 0.7, 0.2), "photos/spread/depth is 0.2 x")])
def test_a_run_ends_when_held_out_photos_are_left_behind(now, word):
    start = figures(0.8, 0.7)
    found = drift(now, start, 4.0, 0.5)
    assert found.startswith(word) if word else found == ""
    assert drift(now, start, 0, 0) == ""


def test_a_pair_more_against_a_judge_that_all_agree_with_is_no_drift():
    assert drift(figures(1, 0.93), figures(1, 1), 4.0, 0.5) == "" != drift(figures(1, 0.9), figures(1, 1), 4.0, 0.5)


# the command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Depth Anything made for 56 px, a mini judge of 32 px, twelve photos."""
    root = tmp_path_factory.mktemp("tune")
    shutil.copytree(tiny_depth.folder("anything"), root / "net")
    (root / "net" / "preprocessor_config.json").write_text(json.dumps(dict(size=dict(height=56, width=56))))
    build_mini_judge(MiniSizes(32, 8, 32, 1, 1, 2), seeded()).eval().save(root / "judge")
    write_photos(root / "photos", 12)
    return root


def command(place, out, *more):
    """The typed command, and flags that make it small."""
    return ["--stage", "grpo", "--policy", str(place / "net"), "--judge", str(place / "judge"),
            "--images", str(place / "photos"), "--out", str(out), "--bank", str(place / "bank"), *FLAGS, *more]


@pytest.fixture(scope="module")
def whole(place):
    """A finished run, and the photos that each step trained on."""
    seen = []
    draw = grpo.draw_batch

    def spy(*args):
        batch = draw(*args)
        seen.append((batch.photos, batch.cfg.jitter, tuple(batch.rgb.shape[-2:])))
        return batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "draw_batch", spy)
        train.main(command(place, place / "whole"))
    return place / "whole" / "photos", seen


def test_the_typed_command_tunes_a_network_on_photos_of_its_own_size(whole):
    result, seen = whole
    assert {size for _, _, size in seen} == {(56, 56)} and {cell for _, cell, _ in seen} == {14}    # 8 px of 32
    log = read_log(result / "metrics.jsonl")
    assert len(log) == 4 and all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 for row in log)
    assert load_predictor(result).size == 56
    settings = json.loads((result / "run.json").read_text())["settings"]
    assert (settings["size"], settings["judge_size"], settings["jitter"]) == (56, 32, 14) and settings["held_out"]


def test_no_step_trains_on_a_photo_of_the_report(whole):
    result, seen = whole
    report = json.loads((result / "report.json").read_text())
    used = {name for names, _, _ in seen for name in names}
    assert report["n"] == len(report["photos"]) == 8 and used and not used & set(report["photos"])
    assert used <= {f"{i:02}.png" for i in range(12)}
    for kind in ("reward/depth", "agreement/depth"):
        row = report[kind]
        assert row["low"] <= row["change"] <= row["high"] and row["verdict"] in ("better", "worse", "same")


def test_the_best_copy_is_that_of_the_highest_agreement_on_held_out_photos(whole):
    """Recomputed from the log."""
    result, _ = whole
    log = read_log(result / "metrics.jsonl")
    scores = [(row["photos/reward/depth"] + row["photos/agreement/depth"]) / 2 for row in log]
    best = json.loads((result / "best.json").read_text())
    assert best["step"] == scores.index(max(scores)) + 1 and best["score"] == pytest.approx(max(scores))
    assert len(set(scores)) > 2 and not any(k.startswith(("wild/", "synthetic/")) for row in log for k in row)


def test_it_resumes_bit_for_bit(place, whole):
    train.main(command(place, place / "parts", "--stop-at", "2"))
    train.main(command(place, place / "parts"))
    for name in ("model.safetensors", "best/model.safetensors"):
        assert equal(load_file(place / "parts" / "photos" / name), load_file(whole[0] / name))


def test_a_run_does_not_go_on_when_other_photos_would_be_held_out(place, tmp_path, capsys):
    shutil.copytree(place / "photos", tmp_path / "photos")
    here = SimpleNamespace(photos=tmp_path / "photos")
    argv = command(place, tmp_path / "out")
    argv[argv.index("--images") + 1] = str(here.photos)
    train.main([*argv, "--stop-at", "1"])
    found = Photos(here.photos, 8)
    held = [name for name, is_held in zip(found.names, album.hold_out(found.digests), strict=True) if is_held]
    (here.photos / held[0]).unlink()
    capsys.readouterr()
    assert "held_out" in refused(capsys, *argv)


def test_too_few_photos_are_refused_before_anything_is_written(place, tmp_path, capsys):
    write_photos(tmp_path / "photos", 1)
    argv = command(place, tmp_path / "run")
    argv[argv.index("--images") + 1] = str(tmp_path / "photos")
    assert "got 1 photo in" in refused(capsys, *argv) and not (tmp_path / "run").exists()


def test_a_network_trained_on_procedural_scenes_is_watched_on_both(run, place, tmp_path):
    from test_train import TINY, go, log, parts
    assert "--eval-every" in TINY
    go(tmp_path, *parts(run), "--bank", place / "bank", "--images", place / "photos", "--stop-at", 2)
    row = log(tmp_path / "photos")[1]
    assert {"photos/reward/albedo", "synthetic/depth/abs_rel", "wild/depth/pairs"} <= row.keys()
    best = json.loads((tmp_path / "photos" / "best.json").read_text())
    assert best["score"] == pytest.approx(mean_accuracy({k: v for k, v in row.items() if k.startswith("photos/")}))


def test_procedural_photos_may_have_another_size_than_the_judge(run, tmp_path):
    from test_train import go, log, parts
    go(tmp_path, *parts(run), "--bank", tmp_path / "bank", "--size", "24")
    rows = log(tmp_path / "grpo")
    assert len(rows) == 4 and all(row["policy/ratio_max"] == 1 for row in rows)
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(0 <= report["tables"][0]["judge"][f"{who}/depth"] <= 1 for who in ("judge", "predictor", "heuristic"))
