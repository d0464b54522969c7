"""photos.py, pools.py, pictures.py: every photo format, every refusal, the scene folders and the writers."""
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import photos, pictures, pools

DATA = Path(__file__).parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)


def ramp(h=24, w=40):
    """(h, w, 3) uint8: red grows to the right, green grows downwards, blue is constant."""
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // (w - 1), y * 255 // (h - 1), 0 * x + 60], -1).astype(np.uint8)


def close(path, want, atol=1e-6):
    got = photos.read_rgb(path)
    assert got.dtype == torch.float32 and got.shape == (3, *want.shape[:2]) and got.is_contiguous()
    assert np.abs(got.permute(1, 2, 0).numpy() - want).max() <= atol


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and re.match(r"(photos|pools|pictures)\.py: ", text) and "want" in text
    for w in words:
        assert w in text


# formats

@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_rgb_is_exact(tmp_path, suffix):
    Image.fromarray(ramp()).save(tmp_path / f"a.{suffix}", lossless=True)
    close(tmp_path / f"a.{suffix}", ramp() / 255)


def test_gray_and_bilevel(tmp_path):
    gray = ramp()[..., 0]
    Image.fromarray(gray).save(tmp_path / "l.png")
    close(tmp_path / "l.png", gray[..., None].repeat(3, 2) / 255)
    Image.fromarray(gray > 99).save(tmp_path / "1.png")
    close(tmp_path / "1.png", (gray > 99)[..., None].repeat(3, 2))


def test_alpha_is_composited_on_white(tmp_path):
    rgb, alpha = ramp(), np.full((24, 40), 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 128
    a = alpha[..., None] / 255
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    close(tmp_path / "rgba.png", rgb / 255 * a + 1 - a, 1.01 / 255)             # Pillow rounds to 8 bits
    gray = rgb[..., :1].repeat(3, 2)
    Image.merge("LA", [Image.fromarray(gray[..., 0]), Image.fromarray(alpha)]).save(tmp_path / "la.png")
    close(tmp_path / "la.png", gray / 255 * a + 1 - a, 1.01 / 255)


def test_palette_with_and_without_a_transparent_entry(tmp_path):
    blocks = np.zeros((16, 16, 3), np.uint8)
    blocks[:, 8:] = (200, 30, 90)
    image = Image.fromarray(blocks).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    image.save(tmp_path / "p.png")
    close(tmp_path / "p.png", blocks / 255)
    image.save(tmp_path / "t.png", transparency=int(np.asarray(image)[0, 0]))
    blocks[:, :8] = 255
    close(tmp_path / "t.png", blocks / 255)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
    deep = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    close(tmp_path / f"deep.{suffix}", deep[..., None].repeat(3, 2) / 65535)


def test_float_tiff_out_of_range_is_refused(tmp_path):
    Image.fromarray(np.full((9, 9), 1e6, np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError) as e:
        photos.read_rgb(tmp_path / "f.tiff")
    one_line(e, "F values")


def test_cmyk_jpeg_has_its_colours(tmp_path):
    blocks = np.zeros((32, 32, 3), np.uint8)
    blocks[:, :16], blocks[:, 16:] = (220, 40, 40), (30, 160, 200)
    Image.fromarray(blocks).convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    got = photos.read_rgb(tmp_path / "c.jpg").permute(1, 2, 0).numpy()
    assert np.abs(got[8, [4, 28]] - blocks[8, [4, 28]] / 255).max() < 0.05      # JPEG loss


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                             # show it turned 90 degrees clockwise
    Image.fromarray(ramp()).save(tmp_path / "r.png", exif=exif)
    close(tmp_path / "r.png", np.rot90(ramp(), -1) / 255)


def test_names_with_spaces_unicode_and_newlines(tmp_path):
    names = ["a b.png", "наïve 写真.PNG", "line\nbreak.png", "per%cent {x}.Png"]
    for n in names:
        Image.fromarray(ramp()).save(tmp_path / n, format="PNG")
    assert [p.name for p in photos.find_images(tmp_path)] == sorted(names)
    assert sorted(photos.Photos(tmp_path, 16).names) == sorted(names)


# refusals

def broken_files(folder):
    """Name -> word expected in the reason."""
    buffer = folder / "whole.jpg"
    Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer)
    whole = buffer.read_bytes()
    buffer.unlink()
    (folder / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "text.png").write_text("not an image\n")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "dot\nted.png")
    Image.new("RGB", (7, 100)).save(folder / "thin.png")
    return {"cut.jpg": "truncated", "text.png": "not an image", "empty.jpg": "an empty file",
            "dot\nted.png": "1 x 1", "thin.png": "7 x 100"}


def test_each_broken_file_gives_one_clear_line(tmp_path):
    for name, word in broken_files(tmp_path).items():
        with pytest.raises(ValueError) as e:
            photos.read_rgb(tmp_path / name)
        one_line(e, word, repr(str(tmp_path / name)))


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    with pytest.raises(ValueError) as e:
        photos.read_rgb(tmp_path / "a.png", max_pixels=959)
    one_line(e, "40 x 24", "959")
    photos.read_rgb(tmp_path / "a.png", max_pixels=960)
    head = struct.pack(">2I5B", 20000, 20000, 1, 0, 0, 0, 0)      # beyond what Pillow itself will open
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))))
    with pytest.raises(ValueError) as e:
        photos.read_rgb(tmp_path / "bomb.png")
    one_line(e, "pixels")


def test_a_missing_photo_is_named(tmp_path):
    for path in (tmp_path / "no.jpg", tmp_path):
        with pytest.raises(FileNotFoundError) as e:
            photos.read_rgb(path)
        one_line(e, str(path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
def test_a_file_cut_or_damaged_anywhere_is_read_or_refused(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    kwargs = {} if suffix == "bmp" else {"exif": exif}
    Image.fromarray(ramp(16, 16)).save(tmp_path / f"a.{suffix}", **kwargs)
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    for i in range(150):
        broken = bytearray(whole)
        if i % 2:
            broken = broken[:int(RNG.integers(len(whole)))]
        else:
            broken[int(RNG.integers(min(len(whole), 400)))] = int(RNG.integers(256))
        (tmp_path / f"b.{suffix}").write_bytes(broken)
        try:
            rgb = photos.read_rgb(tmp_path / f"b.{suffix}", max_pixels=10**6)
        except ValueError as error:
            assert str(error).startswith("photos.py: ") and "\n" not in str(error)
        else:
            assert 0 <= rgb.min() and rgb.max() <= 1


# folders of photos

def test_find_images_is_recursive_sorted_and_survives_link_loops(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for n in ("z.JPG", "b/a.webp", "b/c/d.TiFf", "b/notes.txt"):
        (tmp_path / n).write_bytes(b"x")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    found = [str(p.relative_to(tmp_path)) for p in photos.find_images(tmp_path)]
    assert found == ["b/a.webp", "b/c/d.TiFf", "z.JPG"]
    assert photos.find_images(tmp_path / "z.JPG") == [tmp_path / "z.JPG"]


def test_missing_empty_and_wrong_folders_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path / "none", tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileNotFoundError) as e:
            photos.find_images(path)
        one_line(e, repr(str(path)), "jpg")


def test_bad_photos_among_good_ones_are_skipped_named_and_counted(tmp_path, capsys):
    bad = broken_files(tmp_path)
    (tmp_path / "sub").mkdir()
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")
    Image.fromarray(ramp()).save(tmp_path / "good.png")
    Image.fromarray(255 - ramp()).save(tmp_path / "sub" / "good.png")
    found = photos.Photos(tmp_path, 12)
    assert found.names == ["good.png", "sub/good.png"] and len(found) == 2
    assert found.images.shape == (2, 3, 12, 12) and found.images.dtype == torch.uint8
    assert {p.name for p, _ in found.skipped} == {*bad, "link.png"}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(bad) + 2 and "skipped 6 of 8" in lines[-1]
    batch = found.batch(torch.tensor([1, 0, 1]))
    assert batch.shape == (3, 3, 12, 12) and batch.dtype == torch.float32
    assert (batch[1] - photos.fit_square(photos.read_rgb(tmp_path / "good.png"), 12)).abs().max() <= 0.5 / 255 + 1e-6


def test_no_readable_photo_is_an_error(tmp_path):
    n = len(broken_files(tmp_path))
    with pytest.raises(ValueError) as e:
        photos.Photos(tmp_path, 12)
    one_line(e, f"none of {n} images")


def test_a_single_photo_makes_a_set_of_one(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "one.png")
    assert photos.Photos(tmp_path / "one.png", 8).names == ["one.png"]


def test_real_photos_are_read():
    if not (DATA / "photos").is_dir():
        pytest.skip("shared data is absent")
    paths = photos.find_images(DATA / "photos")
    assert len(paths) == 102
    for p in paths[::25]:
        rgb = photos.read_rgb(p)
        assert rgb.shape[0] == 3 and min(rgb.shape[1:]) >= 8 and 0 <= rgb.min() < rgb.max() <= 1


# sizes

def test_fit_takes_the_centre_and_averages():
    x = torch.zeros(3, 8, 16)
    x[:, :, 4:12] = torch.tensor([0.0, 1.0]).repeat(4)           # stripes inside the centred square
    out = photos.fit_square(x, 4)
    assert out.shape == (3, 4, 4) and (out - 0.5).abs().max() < 0.2
    assert torch.equal(photos.fit_square(x, 8), x[:, :, 4:12])
    assert photos.fit_square(x, 20).shape == (3, 20, 20)


@pytest.mark.parametrize("shape, long_edge, multiple, want", [
    ((768, 1024), 512, 8, (384, 512)), ((1024, 768), 512, 64, (512, 384)), ((10, 1000), 256, 32, (32, 256)),
    ((100, 100), 100, 1, (100, 100)), ((50, 33), 64, 16, (64, 48)),
])
def test_resize_long_keeps_aspect_and_multiples(shape, long_edge, multiple, want):
    assert photos.resize_long(torch.rand(3, *shape), long_edge, multiple).shape == (3, *want)


# scene folders

def write_scene(folder, name="s1", h=20, w=30):
    """A scene whose maps are written by save_map; returns what was written."""
    normal = RNG.normal(size=(3, h, w))
    normal[2] = np.abs(normal[2]) + 1
    maps = {"depth": RNG.uniform(2, 5, (1, h, w)), "normal": normal / np.linalg.norm(normal, axis=0),
            **{m: RNG.random((3, h, w)) for m in ("rgb", "albedo", "irradiance")}}
    for m, x in maps.items():
        pictures.save_map(folder, name, m, x)
    return maps


def test_a_saved_scene_reads_back(tmp_path):
    maps = write_scene(tmp_path)
    assert pools.list_scenes(tmp_path) == ["s1"]
    (name, sample), = pools.read_scene_folder(tmp_path)
    assert name == "s1" and set(sample) == {*maps, "mask"}
    assert sample["mask"].dtype == torch.bool and sample["mask"].all() and sample["mask"].shape == (1, 20, 30)
    for m in ("rgb", "albedo", "irradiance"):
        assert np.abs(sample[m].numpy() - maps[m]).max() <= 0.5 / 255 + 1e-6
    z = maps["depth"]
    assert np.allclose(sample["depth"], (z - z.min()) / np.ptp(z), atol=1e-5)    # lower stays closer
    assert np.allclose(sample["normal"].norm(dim=0), 1, atol=1e-5)
    assert np.abs(sample["normal"].numpy() - maps["normal"]).max() < 0.02        # 8 bits


def test_zero_normals_are_masked_and_resizing_keeps_them_apart(tmp_path):
    write_scene(tmp_path, h=16, w=24)
    stored = np.array(Image.open(tmp_path / "s1_normal.png"))
    stored[:8, :12], stored[8:, 12:] = 0, 127                    # both spellings of a zero normal
    Image.fromarray(stored).save(tmp_path / "s1_normal.png")
    full = pools.read_scene(tmp_path, "s1")
    want = torch.ones(16, 24, dtype=torch.bool)
    want[:8, :12] = want[8:, 12:] = False
    assert torch.equal(full["mask"][0], want) and not full["normal"][:, ~want].any()
    small = pools.read_scene(tmp_path, "s1", 8)
    assert all(x.shape[1:] == (8, 8) for x in small.values()) and small["mask"].dtype == torch.bool
    assert torch.equal(small["mask"][0], want[:, 4:20][::2, ::2])
    assert np.isin(small["depth"].numpy(), full["depth"].numpy()).all()          # nearest: no new depth
    assert torch.allclose(small["normal"].norm(dim=0), small["mask"][0].float(), atol=1e-5)


def rgb_png_16(h=20, w=30):
    """A 16-bit RGB PNG by hand: Pillow cannot write one."""
    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
    rows = h * (b"\0" + np.full(3 * w, 40000, ">u2").tobytes())
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_scene_refusals(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError) as e:
            pools.list_scenes(path)
        one_line(e, repr(str(path)))
    write_scene(tmp_path)
    whole = {m: (tmp_path / f"s1_{m}.png").read_bytes() for m in pools.MAPS}

    def refuse(name, image, kind, *words):
        if image is None:
            (tmp_path / name).unlink()
        else:
            image.save(tmp_path / name)
        with pytest.raises(kind) as e:
            pools.read_scene(tmp_path, "s1")
        one_line(e, name, *words)
        for m, b in whole.items():
            (tmp_path / f"s1_{m}.png").write_bytes(b)

    refuse("s1_depth.png", None, FileNotFoundError, "no s1_depth.png")
    refuse("s1_rgb.png", None, FileNotFoundError, "no s1_rgb.png")
    refuse("s1_albedo.png", Image.new("RGB", (30, 21)), ValueError, "30 x 21", "30 x 20")
    refuse("s1_depth.png", Image.new("RGB", (30, 20)), ValueError, "mode RGB", "gray")
    refuse("s1_normal.png", Image.new("RGBA", (30, 20)), ValueError, "mode RGBA", "8-bit RGB")
    pools.read_scene(tmp_path, "s1")
    (tmp_path / "s1_albedo.png").write_bytes(rgb_png_16())
    with pytest.raises(ValueError) as e:
        pools.read_scene(tmp_path, "s1")
    one_line(e, "s1_albedo.png", "16-bit RGB")


def test_the_real_scenes():
    folder = DATA / "hypersim_scenes"
    if not folder.is_dir():
        pytest.skip("shared data is absent")
    assert pools.list_scenes(folder) == ["scene_001", "scene_002", "scene_003"]
    s = pools.read_scene(folder, "scene_001", 128)
    assert s["rgb"].shape == (3, 128, 128) and s["mask"].float().mean() > 0.99
    assert s["normal"][2][s["mask"][0]].mean() > 0.2             # surfaces that we see face the camera


# writers

def test_native_values_survive_and_display_follows_the_convention(tmp_path):
    depth = RNG.uniform(-3, 80, (12, 14)).astype(np.float32)
    paths = pictures.save_map(tmp_path / "deep" / "out", "a/b c", "depth", depth)
    assert [p.name for p in paths] == ["b c_depth.npy", "b c_depth.png", "b c_depth_colour.png"]
    assert np.array_equal(np.load(paths[0]), depth[None]) and np.load(paths[0]).dtype == np.float32
    png = np.asarray(Image.open(paths[1]))
    assert png.dtype == np.uint16 and (png.min(), png.max()) == (0, 65535) and png.argmin() == depth.argmin()
    normal = np.zeros((3, 5, 5), np.float32)
    normal[2] = 1
    npy, png = pictures.save_map(tmp_path, "n", "normal", torch.from_numpy(normal))
    assert np.array_equal(np.load(npy), normal)
    assert np.asarray(Image.open(png))[0, 0].tolist() == [128, 128, 255]
    npy, png = pictures.save_map(tmp_path, "x", "albedo", normal * 1.5)
    assert np.load(npy).max() == 1.5 and np.asarray(Image.open(png))[0, 0].tolist() == [0, 0, 255]
    pictures.save_map(tmp_path, "flat", "depth", np.ones((4, 4)))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name, modality, array, word", [
    ("a", "depth", np.ones((3, 4, 4)), "(3, 4, 4)"), ("a", "albedo", np.ones((4, 4)), "(1, 4, 4)"),
    ("a", "heat", np.ones((1, 4, 4)), "heat"), ("a", "depth", np.full((4, 4), np.nan), "non-finite"),
    ("../a", "depth", np.ones((4, 4)), ".."), ("/a", "depth", np.ones((4, 4)), "/a"),
])
def test_save_map_refuses(tmp_path, name, modality, array, word):
    with pytest.raises(ValueError) as e:
        pictures.save_map(tmp_path / "out", name, modality, array)
    one_line(e, word)
    assert not list(tmp_path.rglob("*.npy"))


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    pictures.save_png(tmp_path / "a.png", np.zeros((3, 8, 8)))
    before = (tmp_path / "a.png").read_bytes()

    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pictures.save_png(tmp_path / "a.png", np.ones((3, 8, 8)))
    assert (tmp_path / "a.png").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_colour_map_gets_darker_with_distance():
    rgb = pictures.colour_depth(np.linspace(1, 9, 500)[None])
    luma = np.tensordot([0.299, 0.587, 0.114], rgb, 1)[0]
    assert rgb.shape == (3, 1, 500) and rgb.min() >= 0 and rgb.max() <= 1
    assert (np.diff(luma) <= 1e-6).all() and luma[0] > 0.9 and luma[-1] < 0.1
    assert np.isfinite(pictures.colour_depth(np.ones((1, 4, 4)))).all()


def test_panel_enlarges_tiny_maps_and_survives_any_label():
    tiny = np.zeros((3, 20, 30))
    tiny[0] = 1
    grid = pictures.panel([("a label that is far too long for one tile of this size, really", tiny),
                       ("写真\nx", tiny), ("", np.ones((3, 140, 150)))], columns=2)
    assert grid.size == (2 * (210 + 4) + 4, 2 * (140 + 16 + 4) + 4)             # 30 px * 7 = 210
    assert grid.getpixel((10, 30)) == (255, 0, 0)
    with pytest.raises(ValueError):
        pictures.panel([])


def test_photos_beyond_the_limit_are_neither_read_nor_kept(tmp_path):
    for i in range(5):
        pictures.save_png(tmp_path / f"{i}.png", np.full((3, 16, 16), i / 5))
    (tmp_path / "1.png").write_bytes(b"broken")
    (tmp_path / "4.png").write_bytes(b"broken")
    some = photos.Photos(tmp_path, 8, limit=3)
    assert some.names == ["0.png", "2.png", "3.png"] and some.images.shape == (3, 3, 8, 8)
    assert [path.name for path, _ in some.skipped] == ["1.png"] and some.images.untyped_storage().nbytes() == 3 * 192
