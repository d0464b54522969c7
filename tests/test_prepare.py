"""data.prepare: small files in HyperSim's and InteriorVerse's own formats become true scene folders."""
import csv
import struct
import zlib

import numpy as np
import pytest
import torch
from rooms import write_scene

from data import pools, prepare, questions

H, W = 48, 64
TILTED = np.array([[.6, .02, .03], [.01, .45, -.04], [.002, .05, -1.0]])       # tilt and shift: no two axes alone
PLAIN = np.diag([.57735, .43301, -1.0])
PLANE = np.array([.3, .8, .52]) / np.linalg.norm([.3, .8, .52])                 # of a floor: x right, y up, z to viewer


def surface(camera):
    """Distance, planar z and rays of a plane below the camera."""
    v, u = np.meshgrid(1 - (2 * np.arange(H) + 1) / H, (2 * np.arange(W) + 1) / W - 1, indexing="ij")
    rays = np.stack([u, v, np.ones_like(u)], -1) @ camera.T
    unit = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    distance = -3.0 / (unit @ PLANE)
    distance = np.where(distance > 0, distance, np.nan)
    return distance, distance * np.abs(unit[..., 2]), unit


def hdf5(path, array):
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        f["dataset"] = array.astype(np.float16)


def write_hypersim(root, scene="ai_001_001", camera=PLAIN, frame="0000", **changes):
    """One frame in the downloaded layout, with a NaN corner, normals turned away in one column, bright light."""
    distance, z, rays = surface(camera)
    rng = np.random.default_rng(0)
    distance[:4, :4] = np.nan
    normal = np.broadcast_to(PLANE, (H, W, 3)).copy()
    normal[:, 10] *= -1                                                         # the mesh's other side
    normal[20, 20] = 0
    albedo, light = rng.uniform(.1, .9, (H, W, 3)), rng.uniform(.5, 30, (H, W, 3))
    maps = dict(color=albedo * light, diffuse_reflectance=albedo, diffuse_illumination=light, depth_meters=distance,
                normal_cam=normal) | changes
    for m, x in maps.items():
        part = prepare.FRAME[m]
        if x is not None:
            hdf5(root / scene / "images" / f"scene_cam_00_{part}_hdf5" / f"frame.{frame}.{m}.hdf5", x)
    names = ["scene_name", *(f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3))]
    with open(root / "metadata_camera_parameters.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(names)
        rows.writerow([scene, *camera.flatten()])
    return maps


@pytest.mark.parametrize("camera", [PLAIN, TILTED], ids=["plain", "tilt-shift"])
def test_hypersim_distance_becomes_planar_depth(tmp_path, camera, capsys):
    write_hypersim(tmp_path / "raw", camera=camera)
    prepare.main(["hypersim", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", str(H)])
    assert "1 frames written" in capsys.readouterr().out
    (name, got), = pools.read_scene_folder(tmp_path / "out")
    assert name == "ai_001_001.cam_00.0000"
    distance, z, _ = surface(camera)
    crop = slice((W - H) // 2, (W + H) // 2)
    z, distance, mask = z[:, crop], distance[:, crop], got["mask"][0].numpy()
    assert not mask[20, 20 - crop.start] and mask.mean() > 0.4
    depth = got["depth"][0].numpy()
    inner = mask & (depth > .01) & (depth < .99)
    error = [np.abs(depth[inner] - np.polyval(np.polyfit(x[inner], depth[inner], 1), x[inner])).max()
             for x in (z, distance)]
    assert error[0] < 2e-3 < error[1]                                           # affine in z (fp16), not in distance
    assert (depth[~mask] == 0).all()


def test_hypersim_normals_face_the_camera_and_invalid_ones_are_zero(tmp_path):
    write_hypersim(tmp_path / "raw")
    prepare.main(["hypersim", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", str(H)])
    (_, got), = pools.read_scene_folder(tmp_path / "out")
    normal, mask = got["normal"].numpy(), got["mask"][0].numpy()
    assert np.abs(normal[:, mask] - PLANE[:, None]).max() < 0.02                # also in the column that was turned
    assert (normal[:, ~mask] == 0).all()


def test_hypersim_colours_are_encoded(tmp_path):
    maps = write_hypersim(tmp_path / "raw")
    prepare.main(["hypersim", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", str(H)])
    (_, got), = pools.read_scene_folder(tmp_path / "out")
    crop = slice((W - H) // 2, (W + H) // 2)
    a = maps["diffuse_reflectance"][:, crop].transpose(2, 0, 1)
    want = np.where(a <= .0031308, 12.92 * a, 1.055 * a ** (1 / 2.4) - .055)
    assert np.abs(got["albedo"].numpy() - want).max() < 0.005
    assert got["irradiance"].max() == 1 and 0.5 < got["irradiance"].mean() < 0.9
    bright = (got["rgb"].numpy() * np.array([.299, .587, .114])[:, None, None]).sum(0)[got["mask"][0].numpy()]
    assert abs(np.quantile(bright, .9) - prepare.BRIGHT) < 0.05


@pytest.mark.parametrize("change, words", [
    (dict(depth_meters=None), "no frame.0000.depth_meters.hdf5"),
    (dict(normal_cam=np.zeros((H, W, 3))), "valid pixels|black image"),
    (dict(depth_meters=np.full((H, W), np.nan)), "valid pixels|black image"),
    (dict(diffuse_reflectance=np.ones((H, W // 2, 3))), "got diffuse_reflectance of 32 x 48 px, want 64 x 48"),
    (dict(normal_cam=np.broadcast_to(PLANE * [1, -1, 1], (H, W, 3))), r"signs \(1, -1, 1\) of x, y, z")])
def test_a_bad_hypersim_frame_is_named_and_leaves_nothing(tmp_path, capsys, change, words):
    write_hypersim(tmp_path / "raw", **change)
    with pytest.raises(ValueError, match=words):
        prepare.main(["hypersim", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", str(H)])
    assert "skipped: " in capsys.readouterr().err and not list((tmp_path).glob("out/*"))


def spoiled(value, share):
    """Some illumination, a share of it `value`."""
    rng = np.random.default_rng(1)
    light = rng.uniform(.5, 30, (H, W, 3))
    bad = rng.random((H, W)) < share
    bad[30, 30] = True
    light[bad, 1] = value
    return light, bad


@pytest.mark.parametrize("name", ["diffuse_illumination", "diffuse_reflectance", "color"])
@pytest.mark.parametrize("value, share", [(np.nan, 0), (np.inf, .03), (-np.inf, .03)])
def test_pixels_that_are_no_number_are_masked_and_darken_no_other(tmp_path, name, value, share):
    light, bad = spoiled(value, share)
    write_hypersim(tmp_path / "raw", **{name: light})
    prepare.main(["hypersim", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", str(H)])
    (_, got), = pools.read_scene_folder(tmp_path / "out")
    crop = slice((W - H) // 2, (W + H) // 2)
    assert not got["mask"][0].numpy()[bad[:, crop]].any() and got["mask"].float().mean() > 0.4
    ok = got["mask"][0]
    assert got["irradiance"][:, ok].mean() > 0.4 and got["irradiance"].max() == 1


@pytest.mark.parametrize("change, words", [
    (dict(diffuse_illumination=spoiled(np.nan, 1)[0]), "0.0 % valid|black image"),
    (dict(diffuse_illumination=spoiled(np.nan, .95)[0]), "% valid pixels, want 10"),
    (dict(diffuse_illumination=np.zeros((H, W, 3))), "one irradiance everywhere")])
def test_a_frame_without_enough_light_is_refused_by_name(tmp_path, capsys, change, words):
    write_hypersim(tmp_path / "raw", **change)
    with pytest.raises(ValueError, match=words):
        prepare.main(["hypersim", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", str(H)])
    assert "ai_001_001 cam_00 frame 0000" in capsys.readouterr().err and not list(tmp_path.glob("out/*"))


def cameras(tmp_path, change=lambda text: text):
    """Cameras read from a table of one camera, changed as bytes."""
    names = ["scene_name", "more", *(f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3))]
    text = ",".join(names) + "\n" + ",".join(["ai_001_001", "x", *map(str, TILTED.flatten())]) + "\n"
    (tmp_path / "c.csv").write_bytes(change(text.encode()))
    return prepare.read_cameras(tmp_path / "c.csv")


@pytest.mark.parametrize("change", [lambda t: t, lambda t: b"\xef\xbb\xbf" + t, lambda t: t.replace(b"\n", b"\r\n"),
                                    lambda t: t.replace(b"x", b'"a, b"'), lambda t: b"\n" + t.strip()])
def test_a_camera_table_from_a_spreadsheet_is_read(tmp_path, change):
    got = cameras(tmp_path, change)
    assert list(got) == ["ai_001_001"] and np.array_equal(got["ai_001_001"], TILTED)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.replace(b",", b";"), "separated by semicolons, want commas"),
    (lambda t: t.replace(b",", b"\t"), "separated by tabs, want commas"),
    (lambda t: t.decode().encode("utf-16"), "no table .*want UTF-8"), (lambda t: b"", "no column 'scene_name'"),
    (lambda t: t.replace(b"uv_11", b"vu_11"), "no column 'M_cam_from_uv_11'"),
    (lambda t: t.replace(b"0.45", b"much"), "row 2: got no number .*much")])
def test_another_table_of_cameras_is_refused_with_what_is_wrong(tmp_path, change, words):
    with pytest.raises(ValueError, match=f"c.csv'.*{words}"):
        cameras(tmp_path, change)


def test_a_short_row_of_cameras_is_no_camera(tmp_path):
    got = cameras(tmp_path, lambda t: t.replace(b",-1.0", b""))
    assert np.isnan(got["ai_001_001"][2, 2])


def test_constant_depth_is_named():
    with pytest.raises(ValueError, match="x: got one depth"):
        prepare.depth_levels(np.ones((4, 4)), np.ones((4, 4), bool), "x")


def test_a_good_frame_beside_a_bad_one_is_kept_and_a_second_run_does_only_the_rest(tmp_path, capsys):
    write_hypersim(tmp_path / "raw", frame="0000")
    write_hypersim(tmp_path / "raw", frame="0001", depth_meters=None)
    command = ["hypersim", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", "32"]
    prepare.main(command)
    assert "1 frames written" in capsys.readouterr().out
    prepare.main(command)
    assert "0 frames written" in capsys.readouterr().out
    assert pools.list_scenes(tmp_path / "out") == ["ai_001_001.cam_00.0000"]


def test_missing_cameras_h5py_and_folders_are_named(tmp_path, monkeypatch):
    import sys
    write_hypersim(tmp_path)
    (tmp_path / "metadata_camera_parameters.csv").rename(tmp_path / "c.csv")
    with pytest.raises(FileNotFoundError, match="metadata_camera_parameters.csv.*--cameras"):
        prepare.main(["hypersim", str(tmp_path), str(tmp_path / "out")])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(prepare.UserError, match="pip install h5py"):
        prepare.main(["hypersim", str(tmp_path), str(tmp_path / "out"), "--cameras", str(tmp_path / "c.csv")])
    with pytest.raises(FileNotFoundError, match="no interiorverse frame"):
        prepare.main(["interiorverse", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="no folder"):
        prepare.main(["jsonl", str(tmp_path / "nowhere"), str(tmp_path / "out")])


def exr(path, pixels, names="BGR"):
    """A scan-line OpenEXR file, ZIP, float: (H, W, 3), or one channel."""
    def field(key, kind, value):
        return key.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<i", len(value)) + value
    h, w = pixels.shape[:2]
    channels = b"".join(n.encode() + b"\0" + struct.pack("<iiii", 2, 0, 1, 1) for n in names) + b"\0"
    box = struct.pack("<4i", 0, 0, w - 1, h - 1)
    head = struct.pack("<ii", 20000630, 2) + b"".join([
        field("channels", "chlist", channels), field("compression", "compression", b"\3"),
        field("dataWindow", "box2i", box), field("displayWindow", "box2i", box), field("lineOrder", "lineOrder", b"\0"),
        field("pixelAspectRatio", "float", struct.pack("<f", 1)),
        field("screenWindowCenter", "v2f", struct.pack("<ff", 0, 0)),
        field("screenWindowWidth", "float", struct.pack("<f", 1))]) + b"\0"
    order = {"B": 2, "G": 1, "R": 0, "Y": 0}
    blocks = []
    for y in range(0, h, 16):
        raw = b"".join(pixels[k, :, order[n]].astype("<f4").tobytes() for k in range(y, min(y + 16, h)) for n in names)
        part = np.frombuffer(raw, np.uint8)
        part = np.concatenate([part[0::2], part[1::2]])
        part = np.concatenate([part[:1], (np.diff(part.astype(int)) + 128).astype(np.uint8)]).tobytes()
        packed = zlib.compress(part)
        packed = packed if len(packed) < len(raw) else raw
        blocks.append(struct.pack("<ii", y, len(packed)) + packed)
    start = len(head) + 8 * len(blocks)
    offsets = [start + sum(map(len, blocks[:i])) for i in range(len(blocks))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + struct.pack(f"<{len(blocks)}Q", *offsets) + b"".join(blocks))


def write_interiorverse(root, flip=(1, 1, 1)):
    """One frame as published: mm along z, infinite where invalid, normals in OpenGL axes."""
    half = np.tan(np.radians(85) / 2)
    _, z, _ = surface(np.diag([half, half * H / W, -1.0]))
    bad = ~np.isfinite(z)
    rng = np.random.default_rng(1)
    albedo, light = rng.uniform(.2, .9, (H, W, 3)), rng.uniform(.2, .8, (H, W, 1))
    albedo[30:, 40:] = 0
    folder = root / "dataset_85" / "L3D124"
    put = lambda m, x, names="BGR": exr(folder / f"000_{m}.exr", x, names)      # noqa: E731
    put("im", albedo * light)
    put("albedo", albedo)
    put("depth", np.repeat(np.where(bad, np.inf, 1000 * z)[..., None], 3, -1))
    put("normal", np.broadcast_to(PLANE * flip, (H, W, 3)))
    put("mask", np.where(bad, 0., 1.)[..., None], "Y")
    return z, light, bad


def test_interiorverse_frames_become_a_scene(tmp_path, capsys):
    z, light, bad = write_interiorverse(tmp_path / "raw")
    prepare.main(["interiorverse", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", str(H)])
    (name, got), = pools.read_scene_folder(tmp_path / "out")
    crop = slice((W - H) // 2, (W + H) // 2)
    assert name == "L3D124.000"
    depth, mask, z = got["depth"][0].numpy(), got["mask"][0].numpy(), z[:, crop]
    assert (mask == ~bad[:, crop]).all()
    inner = mask & (depth > .01) & (depth < .99)
    assert np.abs(depth[inner] - np.polyval(np.polyfit(z[inner], depth[inner], 1), z[inner])).max() < 1e-3
    assert np.abs(got["normal"].numpy()[:, mask] - PLANE[:, None]).max() < 0.02
    shade = got["irradiance"][0].numpy()
    lit = mask & (got["albedo"][0].numpy() > 0)
    assert np.corrcoef(shade[lit], light[:, crop, 0][lit])[0, 1] > 0.97 and (shade[30:, 40 - crop.start:] == 0).all()
    rows = questions.draw_questions(tmp_path / "out", name, 8, H, 0)
    asked = [p for r in rows if r["modality"] == "irradiance" for p in r["pts"]]
    assert asked and not [p for p in asked if p[0] >= 30 and p[1] >= 40 - crop.start]


def test_interiorverse_normals_in_other_axes_are_refused(tmp_path):
    write_interiorverse(tmp_path / "raw", flip=(-1, 1, 1))
    with pytest.raises(ValueError, match=r"signs \(-1, 1, 1\)"):
        prepare.main(["interiorverse", str(tmp_path / "raw"), str(tmp_path / "out")])


def test_jsonl_splits_rooms_and_counts(tmp_path, capsys):
    rooms = [f"room_{i}" for i in range(40)]
    chosen = [r for r in rooms if questions.split_of(r) == "val"][:2] + [
        r for r in rooms if questions.split_of(r) == "train"][:3]
    for i, room in enumerate(chosen):
        write_scene(tmp_path / "scenes", f"{room}.cam.0", i)
    prepare.main(["jsonl", str(tmp_path / "scenes"), str(tmp_path / "out"), "--size", "64"])
    out = capsys.readouterr().out
    assert "depth 6" in out and "depth 4" in out
    sides = {s: {r["scene"] for r in questions.read_jsonl(tmp_path / "out" / name)} for s, name in
             questions.JSONL.items()}
    assert len(sides["train"]) == 3 and len(sides["val"]) == 2 and not sides["train"] & sides["val"]
    rows = questions.read_jsonl(tmp_path / "out" / questions.JSONL["val"])
    assert torch.isfinite(questions.marked_photos(rows, "", 56)).all()
