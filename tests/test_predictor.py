"""predictor.py: interface and shapes, preconditioning, sampling, loss, files and their refusals, the command."""
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import seeded
from PIL import Image
from safetensors.torch import load_file, save_file

import predictor
from data import pictures, pools
from models.dit import DATA_STD, DiT, DiTConfig, flow_loss, to_state
from predictor import load_predictor, predict_photo, sample_ode
from relations import MODALITIES, NAMES
from runtime.command import run_command
from runtime.ranks import Draw

ROOT = Path(__file__).resolve().parents[1]
SIZES = DiTConfig(size=16, patch=4, width=32, encoder_layers=1, layers=2, heads=2)
ROUNDING = 1e-5                    # fp32, matrix products of another batch size


def randomised(cfg=SIZES, seed=0):
    """A network whose zero-initialised layers are random, so that every part acts on the output."""
    model = DiT(cfg, seed)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if not p.any():
                p.normal_(std=0.2, generator=seeded(100 + i))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return randomised()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictor")
    model.save(path)
    return path


@pytest.fixture(scope="module")
def maps():
    return pools.ScenePool("wild", "train", 6, 16).all()


def inputs(B=3, H=16, W=16):
    return torch.rand(B, 3, H, W, generator=seeded(1)), torch.randn(B, 3, H, W, generator=seeded(2))


# interface --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, W", [(16, 16), (8, 24), (20, 12)])
@pytest.mark.parametrize("m", NAMES)
def test_shapes_for_any_multiple_of_the_patch(model, H, W, m):
    rgb, x = inputs(2, H, W)
    cond = model.encode(rgb)
    assert len(cond) == 2 and model.shape(rgb) == (3, H, W)
    v = model.velocity(x, torch.full((2,), 0.5), cond, m)
    assert v.shape == x.shape and v.isfinite().all()
    assert model.decode(x, m).shape == (2, MODALITIES[m].channels, H, W)


def test_other_sides_are_refused_with_the_multiple(model):
    with pytest.raises(ValueError, match="14 x 16 px.*multiple of 4"):
        model.encode(torch.rand(1, 3, 14, 16))


def test_every_input_moves_the_velocity(model):
    rgb, x = inputs(2)
    t, cond = torch.tensor([0.3, 0.7]), model.encode(rgb)
    v = model.velocity(x, t, cond, "depth")
    for other in (model.velocity(x + 0.1, t, cond, "depth"), model.velocity(x, t + 0.1, cond, "depth"),
                  model.velocity(x, t, model.encode(1 - rgb), "depth"), model.velocity(x, t, cond, "normal")):
        assert ((other - v).abs().amax((1, 2, 3)) > 1e-3).all()


def test_a_modality_is_a_name_or_an_index_per_row(model):
    rgb, x = inputs(4)
    t, cond = torch.full((4,), 0.4), model.encode(rgb)
    mixed = model.velocity(x, t, cond, torch.arange(4))
    for k, m in enumerate(NAMES):
        assert (mixed[k] - model.velocity(x, t, cond, m)[k]).abs().max() < ROUNDING


def test_position_matters(model):
    """A photo of one colour and a constant state still give tokens that differ."""
    cond = model.encode(torch.full((1, 3, 16, 16), 0.5))
    assert (cond[0, 0] - cond[0, 5]).abs().max() > 1e-3 and (cond[0, 1] - cond[0, 4]).abs().max() > 1e-3


@pytest.mark.parametrize("m", NAMES)
def test_velocity_is_bitwise_equal_with_and_without_gradient(model, m):
    rgb, x = inputs(4)
    t = torch.full((4,), 0.6)
    with torch.no_grad():
        quiet = model.velocity(x, t, model.encode(rgb), m)
    loud = model.velocity(x, t, model.encode(rgb), m)
    assert loud.requires_grad and torch.equal(quiet, loud.detach())


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_with_a_zero_head_the_velocity_is_c_skip_x(t):
    """c_skip = (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2), the best linear guess for data of standard deviation s."""
    rgb, x = inputs()
    fresh = DiT(SIZES)
    v = fresh.velocity(x, torch.full((3,), t), fresh.encode(rgb), "depth")
    c_skip = (t - (1 - t) * DATA_STD**2) / ((1 - t) ** 2 * DATA_STD**2 + t**2)
    torch.testing.assert_close(v, c_skip * x, rtol=1e-5, atol=1e-6)


def test_the_linear_part_is_the_conditional_mean_for_gaussian_data():
    """Regress v = x_1 - x_0 on x_t for x_0 of standard deviation s: the slope is c_skip within its standard error."""
    n, t = 200_000, 0.35
    x0, x1 = DATA_STD * torch.randn(n, generator=seeded(3)), torch.randn(n, generator=seeded(4))
    x = (1 - t) * x0 + t * x1
    slope = (x * (x1 - x0)).mean() / x.square().mean()
    fresh = DiT(SIZES)
    one = torch.ones(1, 3, 16, 16)
    got = fresh.velocity(one, torch.tensor([t]), fresh.encode(one), "depth")[0, 0, 0, 0]
    assert abs(slope - got) < 0.02                                              # about four standard errors


def test_building_is_seeded_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    a, b, c = DiT(SIZES, 0).state_dict(), DiT(SIZES, 0).state_dict(), DiT(SIZES, 1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


# maps and states --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m", NAMES)
def test_decoded_maps_are_in_range(model, m):
    out = model.decode(3 * torch.randn(4, 3, 16, 16, generator=seeded(5)), m)
    if m == "normal":
        assert (out.norm(dim=1) - 1).abs().max() < 1e-5
    else:
        assert out.min() == 0 and out.max() == 1


@pytest.mark.parametrize("m", ["normal", "albedo", "irradiance"])
def test_a_true_map_survives_the_way_to_a_state_and_back(model, maps, m):
    state = to_state(maps, maps["mask"], m)
    assert state.shape == (6, 3, 16, 16) and state.abs().max() <= 1 + 1e-3      # maps are kept in fp16
    error = (model.decode(state, m) - maps[m]) * maps["mask"]
    assert maps["mask"].any() and error.abs().max() < 1e-3


def test_true_depth_survives_up_to_scale_shift_and_the_clipped_ends(model, maps):
    """0 and 1 are the 2 % and 98 % quantiles of the valid pixels; in between it is affine."""
    back = model.decode(to_state(maps, maps["mask"], "depth"), "depth")
    for i in range(6):
        z, got = maps["depth"][i][maps["mask"][i]], back[i][maps["mask"][i]]
        low, high = z.quantile(0.02), z.quantile(0.98)
        torch.testing.assert_close(got, ((z - low) / (high - low)).clamp(0, 1), rtol=0, atol=1e-5)
        assert (got[z <= low] == 0).all() and (got[z >= high] == 1).all()


@pytest.mark.parametrize("m", NAMES)
def test_states_are_zero_at_invalid_pixels_and_finite(maps, m):
    assert not maps["mask"].all()
    state = to_state(maps, maps["mask"], m)
    assert state.isfinite().all() and (state * ~maps["mask"] == 0).all()


def test_a_scene_without_a_valid_pixel_gives_a_zero_state(maps):
    assert not any(to_state(maps, torch.zeros_like(maps["mask"]), m).any() for m in NAMES)


# sampling and loss ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [1, 2, 15])
def test_times_walk_uniformly_from_one_to_zero(T):
    grid = DiT.times(None, T)
    assert len(grid) == T + 1 and grid[0] == 1 and grid[-1] == 0
    np.testing.assert_allclose(np.diff(grid), -1 / T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", NAMES)
def test_sampling_is_deterministic_given_noise(model, m):
    rgb, noise = inputs()
    one, two = (sample_ode(model, rgb, m, 3, noise=noise) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, sample_ode(model, rgb, m, 3, noise=-noise))


def test_sampling_draws_its_noise_from_the_generator(model):
    rgb, _ = inputs()
    before = torch.get_rng_state()
    one, two, other = (sample_ode(model, rgb, "depth", 2, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("m", NAMES)
def test_a_batch_equals_its_photos_alone(model, m):
    rgb, noise = inputs()
    alone = torch.cat([sample_ode(model, rgb[i:i + 1], m, 4, noise=noise[i:i + 1]) for i in range(3)])
    assert (sample_ode(model, rgb, m, 4, noise=noise) - alone).abs().max() < ROUNDING


def test_the_condition_may_be_computed_once(model):
    rgb, noise = inputs()
    given = sample_ode(model, rgb, "albedo", 2, noise=noise, cond=model.encode(rgb))
    assert torch.equal(given, sample_ode(model, rgb, "albedo", 2, noise=noise))


class Straight:
    """The exact velocity of a single known map: every straight path ends at it."""

    def __init__(self, x0):
        self.x0 = x0

    def encode(self, rgb):
        return rgb.flatten(2)

    def shape(self, rgb):
        return 3, *rgb.shape[-2:]

    def times(self, T):
        return DiT.times(self, T)

    def start(self, noise, T):
        return noise

    def velocity(self, x, t, cond, m):
        return (x - self.x0) / t.view(-1, 1, 1, 1)

    def decode(self, x, m, cond=None):
        return x


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_exact_velocity_of_one_map_is_walked_to_that_map(steps):
    rgb, noise = inputs()
    x0 = torch.randn(3, 3, 16, 16, generator=seeded(6))
    torch.testing.assert_close(sample_ode(Straight(x0), rgb, "depth", steps, noise=noise), x0, rtol=0, atol=1e-5)


def test_the_exact_velocity_has_no_flow_loss(maps):
    """flow_loss draws x_t = (1 - t) x_0 + t x_1 and wants x_1 - x_0 = (x_t - x_0) / t: sign and direction of time."""
    x0 = torch.cat([to_state(maps, maps["mask"], m) for m in NAMES])
    exact = Straight(x0)
    assert flow_loss(exact, maps, NAMES, Draw(seeded(), len(maps["rgb"]))) < 1e-6
    exact.x0 = -x0
    assert flow_loss(exact, maps, NAMES, Draw(seeded(), len(maps["rgb"]))) > 0.1


def test_flow_loss_ignores_what_stands_at_invalid_pixels(model, maps):
    other = {k: v.clone() for k, v in maps.items()}
    assert not maps["mask"].all()
    for m in NAMES:
        other[m] = torch.where(maps["mask"], maps[m], 0.123)
    a, b = (flow_loss(model, x, NAMES, Draw(seeded(), len(x["rgb"]))) for x in (maps, other))
    assert torch.equal(a, b) and a > 0


def test_flow_loss_sees_valid_pixels(model, maps):
    other = {k: v.clone() for k, v in maps.items()}
    other["albedo"] = torch.where(maps["mask"], 1 - maps["albedo"], maps["albedo"])
    losses = [flow_loss(model, x, NAMES, Draw(seeded(), len(maps["rgb"]))) for x in (maps, other)]
    assert losses[0] != losses[1]


def test_a_few_steps_of_flow_matching_reduce_the_loss(maps):
    fresh = DiT(SIZES)
    opt = torch.optim.AdamW(fresh.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = flow_loss(fresh, maps, NAMES, Draw(seeded(7), len(maps["rgb"])))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# files ------------------------------------------------------------------------------------------------------------

def test_saving_and_loading_is_bitwise(model, folder):
    loaded = load_predictor(folder)
    rgb, noise = inputs()
    assert loaded.cfg == SIZES and not loaded.training
    for m in NAMES:
        assert torch.equal(sample_ode(loaded, rgb, m, 2, noise=noise), sample_ode(model, rgb, m, 2, noise=noise))


def test_what_is_said_about_a_predictor_is_kept(model, tmp_path):
    model.save(tmp_path, trained_on="cats")
    assert json.loads((tmp_path / "predictor.json").read_text())["trained_on"] == "cats"


def damaged(folder, tmp_path, change):
    """A copy of a predictor folder with its weights changed by `change(state)` and its description by `about`."""
    about, state = json.loads((folder / "predictor.json").read_text()), load_file(folder / "predictor.safetensors")
    change(about, state)
    (tmp_path / "predictor.json").write_text(json.dumps(about))
    save_file(state, tmp_path / "predictor.safetensors")
    with pytest.raises(ValueError) as error:
        load_predictor(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    return str(error.value)


def test_another_architecture_is_refused_by_name(folder, tmp_path):
    assert "'unet'" in damaged(folder, tmp_path, lambda about, state: about.update(architecture="unet"))


def test_a_missing_key_is_named(folder, tmp_path):
    assert "head.bias" in damaged(folder, tmp_path, lambda about, state: state.pop("head.bias"))


def test_a_surplus_key_is_named(folder, tmp_path):
    assert "tail.weight" in damaged(folder, tmp_path,
                                    lambda about, state: state.update({"tail.weight": torch.zeros(2)}))


def test_a_misshapen_key_is_named_with_both_shapes(folder, tmp_path):
    text = damaged(folder, tmp_path, lambda about, state: state.update({"head.bias": torch.zeros(2)}))
    assert "head.bias" in text and "(2,)" in text and "(48,)" in text


@pytest.mark.parametrize("change", [lambda about: about["config"].update(depth=3), lambda about: about.pop("config")])
def test_a_description_that_does_not_fit_is_refused(folder, tmp_path, change):
    damaged(folder, tmp_path, lambda about, state: change(about))


@pytest.mark.parametrize("name", ["predictor.json", "predictor.safetensors"])
def test_a_missing_file_is_named(folder, tmp_path, name):
    for p in folder.iterdir():
        if p.name != name:
            (tmp_path / p.name).write_bytes(p.read_bytes())
    with pytest.raises(FileNotFoundError, match=name) as error:
        load_predictor(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["predictor.json", "predictor.safetensors"])
def test_a_cut_off_file_is_refused_in_one_line(folder, tmp_path, capsys, name):
    for p in folder.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes()[:60] if p.name == name else p.read_bytes())
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: load_predictor(tmp_path), "predictor.py")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1


# command ----------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 37, 3), dtype=np.uint8)  # odd sides, no multiple of the patch
PHOTOS = {
    "colour.jpg": lambda p: Image.fromarray(PIXELS).save(p, quality=90),
    "colour.png": lambda p: Image.fromarray(PIXELS).save(p),
    "gray.png": lambda p: Image.fromarray(PIXELS[..., 0]).save(p),
    "palette.png": lambda p: Image.fromarray(PIXELS).convert("P").save(p),
    "alpha.png": lambda p: Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]])).save(p),
    "deep.png": lambda p: Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(p),
    "tall.png": lambda p: Image.fromarray(PIXELS.transpose(1, 0, 2)).save(p),
}


def run(folder, images, out, *extra):
    predictor.main([str(images), "--checkpoint", str(folder), "--out", str(out), "--denoise-steps", "1", *extra])


def complete(out, name, H, W):
    """Every file of one photo is there, at the photo's size, finite, in the native range."""
    for m in NAMES:
        x = np.load(out / f"{name}_{m}.npy")
        assert x.dtype == np.float32 and x.shape == (MODALITIES[m].channels, H, W) and np.isfinite(x).all()
        if m == "normal":
            np.testing.assert_allclose(np.linalg.norm(x, axis=0), 1, atol=1e-5)
        else:
            assert x.min() >= 0 and x.max() <= 1
        with Image.open(out / f"{name}_{m}.png") as image:
            assert image.size == (W, H)
    with Image.open(out / f"{name}_panel.png") as image:
        assert image.size[0] > W


@pytest.mark.parametrize("name", PHOTOS)
def test_maps_come_at_the_size_of_any_photo(folder, tmp_path, name):
    PHOTOS[name](tmp_path / name)
    run(folder, tmp_path / name, tmp_path / "out")
    H, W = (37, 21) if name == "tall.png" else (21, 37)
    complete(tmp_path / "out", Path(name).stem, H, W)


def test_a_folder_gives_a_panel_per_photo_and_counts(folder, tmp_path, capsys):
    for name in ("gray.png", "palette.png"):
        PHOTOS[name](tmp_path / name)
    (tmp_path / "in").mkdir()
    PHOTOS["tall.png"](tmp_path / "in" / "tall.png")
    run(folder, tmp_path, tmp_path.parent / f"{tmp_path.name}_out")
    out = tmp_path.parent / f"{tmp_path.name}_out"
    assert len(list(out.rglob("*_panel.png"))) == 3 and "3 photos" in capsys.readouterr().out


def test_photos_that_differ_only_in_their_suffix_do_not_overwrite_each_other(folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    PHOTOS["colour.png"](photos / "a.png")
    PHOTOS["gray.png"](photos / "a.jpg")
    run(folder, photos, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*_panel.png"))) == 2


def test_a_bad_file_among_good_ones_is_named_and_counted(folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("gray.png", "palette.png"):
        PHOTOS[name](photos / name)
    (photos / "broken.jpg").write_bytes(b"no image at all")
    run(folder, photos, tmp_path / "out")
    said = capsys.readouterr()
    assert "broken.jpg" in said.err and "2 of 3" in said.out and "1 skipped" in said.out
    assert len(list((tmp_path / "out").glob("*_panel.png"))) == 2


def test_a_folder_of_bad_files_is_refused(folder, tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"no image at all")
    with pytest.raises(ValueError, match="none of 2"):
        run(folder, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("make", [
    lambda p: p / "nowhere.png", lambda p: p / "nowhere",
    lambda p: (Image.fromarray(PIXELS[:1, :1]).save(p / "one.png"), p / "one.png")[1],
    lambda p: ((p / "text.jpg").write_text("hello"), p / "text.jpg")[1],
    lambda p: ((p / "text.txt").write_text("hello"), p / "text.txt")[1],
    lambda p: ((p / "empty").mkdir(), p / "empty")[1]])
def test_a_bad_path_is_one_line_and_exit_code_two(folder, tmp_path, capsys, make):
    path = make(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: run(folder, path, tmp_path / "out"), "predictor.py")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and path.name in err and not (tmp_path / "out").exists()


def test_as_a_script_a_bad_path_has_no_traceback(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["predictor.py", "nowhere.png", "--checkpoint", str(folder)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "predictor.py"), run_name="__main__")
    said = capfd.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and "nowhere.png" in said.err


@pytest.mark.parametrize("flag, count", [("--denoise-steps", "-1"), ("--ensemble-size", "0"),
                                         ("--processing-res", "-8"), ("--vae-tile", "-1")])
def test_a_count_out_of_range_is_refused(folder, tmp_path, capsys, flag, count):
    PHOTOS["gray.png"](tmp_path / "a.png")
    with pytest.raises(SystemExit) as stop:
        predictor.main([str(tmp_path / "a.png"), "--checkpoint", str(folder), flag, count])
    assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_the_seed_decides_the_maps(model):
    rgb = torch.rand(3, 21, 37, generator=seeded())
    one, two, other = (predict_photo(model, rgb, 16, 2, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[m], two[m]) for m in NAMES) and not torch.equal(one["depth"], other["depth"])


def test_an_ensemble_is_the_mean_of_its_draws(model):
    rgb = torch.rand(3, 16, 16, generator=seeded())
    noise = torch.randn(3, 3, 16, 16, generator=seeded(5))
    want = torch.cat([sample_ode(model, rgb[None], "albedo", 2, noise=noise[i:i + 1]) for i in range(3)]).mean(0)
    assert (predict_photo(model, rgb, 16, 2, seed=5, ensemble=3)["albedo"] - want).abs().max() < ROUNDING


def test_the_panel_of_a_large_photo_shows_the_whole_range_of_normals(folder, tmp_path, monkeypatch):
    """Shrinking a map for the panel must not clip normals that point left, down or away."""
    Image.fromarray(PIXELS).resize((600, 400)).save(tmp_path / "large.png")
    seen = []
    real = pictures.panel
    monkeypatch.setattr(pictures, "panel", lambda tiles, *rest: (seen.append(dict(tiles)), real(tiles, *rest))[1])
    run(folder, tmp_path / "large.png", tmp_path / "out")
    truth = np.load(tmp_path / "out" / "large_normal.npy")
    assert truth.min() < -0.5 and np.asarray(seen[0]["normal"]).min() < 0.3
