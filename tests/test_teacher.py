"""data/teacher.py: maps of a teacher or a sensor as a judge, found by the names of photos, refused in one line."""
import shutil

import numpy as np
import pytest
import torch
from expect import enter, refused, seeded
from PIL import Image

import judge as judging
import train
from data import formats, teacher
from data.pictures import save_maps
from data.questions import true_relations
from data.scenes import render_scenes, scene_ids
from data.teacher import MapsJudge
from judge import load_judge, open_judge
from relations import MODALITIES, NAMES, margin, sample_pairs
from runtime.config import UserError
from runtime.weights import read_spec

S = 32
DEPTH = NAMES.index("depth")


def photo(path, width=S, height=S):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(path.name.encode())).integers(0, 255, (height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


def depth(folder, name="a", value=None, ending="depth"):
    """Write a depth map: the column it is at, from 1 on."""
    folder.mkdir(parents=True, exist_ok=True)
    value = np.tile(np.arange(1.0, S + 1), (S, 1)) if value is None else value
    (folder / name).parent.mkdir(exist_ok=True)
    np.save(folder / f"{name}_{ending}.npy", value.astype(np.float32))
    return folder


def columns(*pairs):
    """Pairs of points (1, P, 2, 2) in row 5 and these columns."""
    return torch.tensor([[[5, a], [5, b]] for a, b in pairs])[None]


def ask(judge, name, pts, side=S):
    return judge.ask(torch.zeros(1, 3, side, side), pts, [name])[0]


# what it answers --------------------------------------------------------------------------------------------------

def test_true_maps_give_the_relation_and_tau_s_probability(tmp_path):
    maps = render_scenes("wild", scene_ids("val", 3), S)
    for i in range(3):
        one = {m: maps[m][i].masked_fill(~maps["mask"][i], 0.0) for m in NAMES}
        one["depth"] = one["depth"].masked_fill(~maps["mask"][i], 9.0)          # predictors' maps have no holes
        save_maps(tmp_path / "maps", str(i), maps["rgb"][i], one, one)
    pts = sample_pairs(3, (S, S), 40, seeded(), mask=maps["mask"])
    prob = load_judge(f"maps:{tmp_path / 'maps'}").ask(maps["rgb"], pts, [f"photos/{i}.jpg" for i in range(3)])
    assert prob.shape == (3, 40, len(NAMES)) and prob.dtype == torch.float32
    truth = true_relations(maps, pts)
    by = margin(maps["normal"], pts, "normal")
    torch.testing.assert_close(prob[..., NAMES.index("normal")], (2 * by / MODALITIES["normal"].tau).sigmoid())
    for k, m in enumerate(NAMES):
        known = (truth[..., k] != 0) & prob[..., k].isfinite()
        tight = (margin(maps[m], pts, m).abs() < 2 / 255) & (MODALITIES[m].kind == "colour")     # 8-bit pictures
        right = torch.sign(prob[..., k] - 0.5) == truth[..., k]
        assert known.sum() > 40 and (right | tight)[known].all(), m


@pytest.mark.parametrize("hole", [0, np.nan, np.inf])
def test_a_pair_with_a_point_in_a_hole_is_not_known(tmp_path, hole):
    value = np.tile(np.arange(1.0, S + 1), (S, 1))
    value[:, 3:6] = hole
    prob = ask(MapsJudge(depth(tmp_path, value=value)), "a.jpg", columns((1, 20), (4, 20), (20, 5), (20, 6)))
    assert prob[:, DEPTH].isnan().tolist() == [False, True, True, False]
    assert prob[0, DEPTH] > 0.5 > prob[3, DEPTH]                                # smaller is closer; the range has no 0
    assert prob[:, 1:].isnan().all()                                            # modalities without a map


def test_zero_is_a_value_in_a_map_with_negative_numbers(tmp_path):
    value = np.minimum(np.tile(np.arange(-20.0, S - 20), (S, 1)), 0)            # minus a disparity; 0 is the sky
    prob = ask(MapsJudge(depth(tmp_path, value=value)), "a.jpg", columns((1, 31)))
    assert prob[0, DEPTH] > 0.9


def test_a_disparity_is_turned_round(tmp_path):
    prob = ask(MapsJudge(depth(tmp_path, ending="disparity")), "a.jpg", columns((1, 20), (20, 1)))
    assert prob[0, DEPTH] < 0.5 < prob[1, DEPTH]


def test_a_map_is_cut_as_its_photo_is(tmp_path):
    wide = np.tile(np.arange(1.0, 65), (S, 1))                                  # the centred square: columns 17 to 48
    name = photo(tmp_path / "a.png", 64, S)
    judge = MapsJudge(depth(tmp_path / "maps", value=wide))
    cut = torch.from_numpy(wide[None, :, 16:48]).float()
    pts = sample_pairs(1, (S, S), 16, seeded())
    assert judge.size == S
    want = (2 * margin(cut, pts, "depth")[0] / MODALITIES["depth"].tau).sigmoid()
    torch.testing.assert_close(ask(judge, name, pts)[:, DEPTH], want)
    shrunk = ask(judge, name, pts // 2, side=16)[:, DEPTH]                      # photos of another size
    assert ((shrunk - want).abs() < 0.1).all()


def test_only_what_is_asked_is_read(tmp_path, monkeypatch):
    for name in "abc":
        depth(tmp_path, name)
        np.save(tmp_path / f"{name}_normal.npy", np.tile([[[0.0]], [[0.0]], [[1.0]]], (1, S, S)))
    read = []
    real = formats.read_map
    monkeypatch.setattr(formats, "read_map", lambda files, name, n: read.append(name) or real(files, name, n))
    judge = open_judge(f"maps:{tmp_path}")
    judge.digest()
    assert len(read) == 1                                                       # for the size
    judge.ask(torch.zeros(1, 3, S, S), columns((1, 20)), ["b.jpg"], ["normal"])
    assert read[1:] == ["b_normal.npy"]


# which map is a photo's -------------------------------------------------------------------------------------------

def test_names_as_predictor_py_gives_them(tmp_path):
    for name in ("b", "sub/c", "x_d", "e", "e_png"):
        depth(tmp_path / "maps", name)
    for name in ("e.jpg", "e.png"):
        photo(tmp_path / "photos" / name)
    judge = MapsJudge(tmp_path / "maps")
    found = {name: judge._find(name).get("depth") for name in (
        "b.jpg", "photos/b.PNG", "/data/photos/b.webp", "photos/sub/c.jpg", "photos/x/d.jpg", "y/d.jpg",
        str(tmp_path / "photos/e.jpg"), str(tmp_path / "photos/e.png"))}
    assert list(found.values()) == ["b_depth.npy"] * 3 + ["sub/c_depth.npy", "x_d_depth.npy", None, "e_depth.npy",
                                                          "e_png_depth.npy"]


def test_a_colour_is_read_from_its_picture_which_is_always_encoded(tmp_path):
    colour = np.zeros((3, S, S)) + np.linspace(0.2, 0.9, S)
    save_maps(tmp_path, "a", torch.rand(3, S, S), dict(irradiance=torch.from_numpy(colour)),
              dict(irradiance=torch.from_numpy(colour**2.2)))
    pts = columns((1, 10), (30, 5))
    want = (2 * margin(torch.from_numpy(colour).float(), pts[0], "irradiance") / 0.25).sigmoid()
    got = ask(MapsJudge(tmp_path), "a.jpg", pts)[:, NAMES.index("irradiance")]
    torch.testing.assert_close(got, want, atol=0.01, rtol=0)                    # 8 bits


def test_the_digest_follows_the_maps_and_not_their_place(tmp_path, monkeypatch):
    one = MapsJudge(depth(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = MapsJudge(tmp_path / "two")
    for whole in (teacher.WHOLE, 0):
        monkeypatch.setattr(teacher, "WHOLE", whole)
        assert one.digest() == two.digest()
        depth(tmp_path / "two", value=np.eye(S) + 1)
        assert one.digest() != two.digest()
        depth(tmp_path / "two")
    depth(tmp_path / "two", "b")
    assert one.digest() != MapsJudge(tmp_path / "two").digest()


# what is refused, in one line -------------------------------------------------------------------------------------

def test_folders_without_maps(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, word in (("empty", "no map in"), ("nowhere", "no folder")):
        refused(FileNotFoundError, lambda name=name: open_judge(f"maps:{tmp_path / name}"), word, name)


def test_two_maps_for_one_photo(tmp_path):
    depth(tmp_path / "a")
    refused(ValueError, lambda: MapsJudge(depth(tmp_path / "a", ending="disparity")), "a_depth.npy", "a_disparity.npy")
    depth(tmp_path / "b", "x_y")
    refused(ValueError, lambda: MapsJudge(depth(tmp_path / "b", "x/y")), "x_y_depth.npy", "x/y_depth.npy")


def test_one_map_for_two_photos(tmp_path):
    names = [photo(tmp_path / f"a.{ending}") for ending in ("jpg", "png")]
    judge = MapsJudge(depth(tmp_path / "maps"))
    for name in names:
        refused(ValueError, lambda name=name: ask(judge, name, columns((1, 2))), "a.jpg, a.png", "rename")


def test_a_map_of_other_proportions_than_its_photo(tmp_path):
    judge = MapsJudge(depth(tmp_path / "maps"))
    name = photo(tmp_path / "a.jpg", 64, S)
    refused(ValueError, lambda: ask(judge, name, columns((1, 2))), "a_depth.npy", "32 x 32", "64 x 32")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, S)).save(tmp_path / "b.jpg", exif=exif)               # upright it is 32 x 64
    depth(tmp_path / "maps", "b", value=np.ones((64, S)))
    assert ask(MapsJudge(tmp_path / "maps"), str(tmp_path / "b.jpg"), columns((1, 2)))[0, DEPTH] == 0.5


@pytest.mark.parametrize("modality, value, word", [
    ("normal", np.full((3, S, S), 0.5) + [[[0.0]], [[0.0]], [[0.5]]], "length 1"),
    ("albedo", np.full((3, S, S), 99.0), "99"),
    ("depth", np.ones((2, S, S)), "(2, 32, 32)"), ("depth", np.ones((0, S)), "(1, 0, 32)")])
def test_maps_of_other_values(tmp_path, modality, value, word):
    np.save(tmp_path / f"a_{modality}.npy", value.astype(np.float32))
    refused(ValueError, lambda: MapsJudge(tmp_path), f"a_{modality}.npy", word)


def test_maps_without_a_value_and_photos_without_a_map_are_said_once(tmp_path, capsys):
    judge = MapsJudge(depth(tmp_path, value=np.full((S, S), np.nan)))
    for _ in range(2):
        assert ask(judge, "a.jpg", columns((1, 2))).isnan().all() and ask(judge, "b.jpg", columns((1, 2))).isnan().all()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "a_depth.npy" in lines[0] and "b_depth.npy" in lines[1]


# commands ---------------------------------------------------------------------------------------------------------

POLICY = '''
import torch, torch.nn as nn
class Depth(nn.Module):
    modalities, size = ("depth",), 32
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 1, 3, padding=1)
    def predict(self, rgb, modality):
        return self.net(rgb)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with twelve photos, maps of all but one, and a module of the user's."""
    enter(monkeypatch, tmp_path, taught=POLICY)
    more = [f"d{i}" for i in range(9)]
    for name in ("a", "x/b", "c", *more):
        photo(tmp_path / "photos" / f"{name}.jpg", 48)
    value = np.tile(np.arange(1.0, 49), (S, 1))
    for name in ("a", "x_b", *more):
        depth(tmp_path / "maps", name, value)
    return tmp_path


TRAIN = ("--stage grpo --policy taught:Depth --images photos --replay 0 --size 32 --steps 2 --pairs 8 --bank-pairs 8 "
         "--group 2 --batch 3 --eval-images 2 --eval-every 1 --save-every 1 --device cpu --judge ").split()


def test_a_bank_is_filled_train_learns_from_it_and_one_photo_is_asked(place, capsys):
    judging.main(["photos", "--bank", "out/bank", "--pairs", "8", "--model", "maps:maps", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert "96 pairs asked" in out and "photos/c.jpg" in err and "photos/a.jpg" not in err
    train.main([*TRAIN, "maps:maps", "--out", "out", "--stop-at", "1"])
    train.main([*TRAIN, "maps:maps", "--out", "out"])                           # resumes
    out = capsys.readouterr().out
    assert out.count("judgement bank") == out.count("0 pairs asked, 96 already known") > 1      # of the same photos
    judging.main(["photos/x/b.jpg", "--red", "2", "3", "--green", "40", "9", "--model", "maps:maps", "--device", "cpu"])
    assert "the red point appears closer" in capsys.readouterr().out            # also outside the centred square
    depth(place / "maps", "a", np.ones((S, 48)))
    with pytest.raises((UserError, ValueError), match="judge"):                 # the run began with other maps
        train.main([*TRAIN, "maps:maps", "--out", "out", "--steps", "3"])


def test_maps_of_other_photos_are_refused_and_cannot_be_tuned(place):
    depth(place / "other", "z")
    refused(UserError, lambda: train.main([*TRAIN, "maps:other", "--out", "out"]), "knows no answer", "12 photos")
    refused(ValueError, lambda: train.add_lora(load_judge("maps:maps"), seeded()), "MapsJudge")


def test_another_spec_names_the_schemes(place):
    refused(FileNotFoundError, lambda: load_judge("./nothing"), "or maps:PLACE")
    (place / "maps:maps").mkdir()
    assert read_spec("maps:maps", ("maps",)).folder                             # a folder that exists comes first
