"""benchmarks.py: official lists and counts, decoding and masks of every layout, refusals, the missing-data page."""
import json
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from official import bench_of, pool

from data import formats
from data.photos import read_rgb
from evaluation import benchmark_table, benchmarks, predictions
from evaluation.benchmark_table import BENCHMARKS, MissingData

SHARED = Path(__file__).parents[2] / "shared" / "data"
every = pytest.mark.parametrize("bench", BENCHMARKS, ids=lambda b: f"{b.dataset}-{b.task}")


@pytest.fixture(autouse=True)
def small_eth3d(monkeypatch):
    monkeypatch.setattr(benchmarks, "ETH3D_SIZE", (official.SIDE, official.SIDE))


def first(bench, root):
    """The only image of a data set of one, read."""
    files, items, _ = benchmarks.find_data(bench, root)
    item = next(i for i in items if benchmarks.is_complete(files, i))
    return benchmarks.load_sample(bench, files, item, axes=True)


# lists ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, lines, known", [
    ("nyuv2_depth", 654, 654), ("kitti", 697, 652), ("eth3d", 454, 454), ("scannet_depth", 800, 800),
    ("diode", 771, 771), ("nyuv2_normal", 654, 654), ("scannet_normal", 300, 300), ("ibims_normal", 100, 100),
    ("iiw", 1046, 1046), ("hypersim", 5238, 5238), ("interiorverse", 2672, 2672)])
def test_an_official_list_has_its_count_and_no_name_twice(name, lines, known):
    found = benchmarks.read_list(f"{name}.txt")
    assert len(found) == len({n for n, _ in found}) == lines and sum(has for _, has in found) == known


def test_the_diode_list_is_325_indoor_and_446_outdoor():
    names = [n for n, _ in benchmarks.read_list("diode.txt")]
    assert sum(n.startswith("indoors/") for n in names) == 325 and sum(n.startswith("outdoor/") for n in names) == 446


def test_eth3d_has_13_scenes():
    assert len({n.split("/")[1] for n, _ in benchmarks.read_list("eth3d.txt")}) == 13


@pytest.mark.parametrize("dataset, task, name, role, want", [
    ("nyuv2", "depth", "test/kitchen_0004/rgb_0001.png", "depth", "test/kitchen_0004/depth_0001.png"),
    ("kitti", "", "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png", "depth",
     "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png"),
    ("eth3d", "", "rgb/office/images/dslr_images/DSC_0219.JPG", "depth",
     "depth/office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG"),
    ("scannet", "depth", "scene0406_02/color/000300.jpg", "depth", "scene0406_02/depth/000300.png"),
    ("hypersim", "", "test/ai_001_010/rgb_cam_00_fr0000.png", "shading",
     "test/ai_001_010/shading_cam_00_fr0000.npy"),
    ("ibims", "", "corridor_01_img.png", "normal", "corridor_01_normal.npy"),
    ("iiw", "", "63508.png", "judgements", "63508.json")])
def test_the_other_columns_of_a_list_follow_from_the_photo(dataset, task, name, role, want):
    items = {i["rgb"]: i for i in benchmarks.list_items(bench_of(dataset, task), None)}
    assert items[name][role] == want


def test_the_iiw_list_is_every_fifth_id_sorted_as_strings():
    folder = SHARED / "iiw_splits" / "iiw_experiments"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    ids = [*np.load(folder / "iiw_train_ids.npy"), *np.load(folder / "iiw_test_ids.npy")]
    assert len(ids) == 5230
    assert [n for n, _ in benchmarks.read_list("iiw.txt")] == [f"{i}.png" for i in sorted(map(str, ids))[::5]]


def test_the_lists_together_stay_small():
    assert sum(p.stat().st_size for p in benchmarks.LISTS.iterdir()) < 200_000


@pytest.mark.parametrize("dataset, task, name, modality, want", [
    ("nyuv2", "depth", "test/a/rgb_0001.png", "depth", "test/a/pred_0001.npy"),
    ("kitti", "", "d/image_02/data/0000000069.png", "depth", "d/image_02/data/pred_0000000069.npy"),
    ("eth3d", "", "rgb/office/images/dslr_images/DSC_0219.JPG", "depth",
     "rgb/office/images/dslr_images/pred_DSC_0219.npy"),
    ("diode", "normal", "indoors/x_000.png", "normal", "indoors/x_000.npy"),
    ("hypersim", "", "test/ai_001_010/rgb_cam_00_fr0000.png", "irradiance",
     "test/ai_001_010/rgb_cam_00_fr0000_shading.npy"),
    ("iiw", "", "63508.png", "albedo", "63508_albedo.npy"), ("iiw", "", "7.png", "albedo", "7-r.png"),
    ("photos", "", "a/b.jpg", "depth", "a/b_depth.npy")])
def test_saved_maps_are_looked_for_under_marigolds_names(tmp_path, dataset, task, name, modality, want):
    (tmp_path / "7-r.png").touch()
    assert predictions.prediction_file(bench_of(dataset, task), formats.Files(tmp_path), name, modality) == want


# layouts ----------------------------------------------------------------------------------------------------------

@every
def test_a_data_set_reads_the_same_from_a_folder_and_from_a_tar(bench, tmp_path):
    if bench.dataset == "photos":
        pytest.skip("photos are a folder")
    items = official.make(bench, tmp_path / "data", 2)
    tar = official.tar_of(tmp_path / "data", tmp_path / "data.tar")
    for path in (tmp_path / "data", tar):
        files, found, missing = benchmarks.find_data(bench, path)
        assert len(found) == (bench.count or 2) and [i["name"] for i in found[:2]] == [i["name"] for i in items[:2]]
        assert bool(missing) == (len(found) > len(items))
    a, b = (benchmarks.load_sample(bench, benchmarks.find_data(bench, p)[0], found[0])
            for p in (tmp_path / "data", tar))
    assert a.keys() == b.keys() and np.array_equal(a["photos"][0], b["photos"][0])
    for key in a.keys() - {"photos", "name", "size", "judgements"}:
        np.testing.assert_array_equal(a[key], b[key])


def test_data_may_lie_in_its_official_place_below_the_folder(tmp_path):
    bench = bench_of("diode")
    official.make(bench, tmp_path / "diode" / "val", 1)
    (tmp_path / "marigold" / "diode").mkdir(parents=True)
    official.tar_of(tmp_path / "diode" / "val", tmp_path / "marigold" / "diode" / "diode_val.tar")
    a, b = (first(bench, tmp_path / where) for where in (".", "marigold"))
    np.testing.assert_array_equal(a["depth"], b["depth"])


@pytest.mark.parametrize("dataset", ["nyuv2", "kitti", "eth3d", "scannet", "diode"])
def test_depth_comes_back_in_metres(tmp_path, dataset):
    bench = bench_of(dataset)
    official.make(bench, tmp_path, 1)
    want = official.depth_of(bench, 0)
    want = want[-352:, 13:1229] if dataset == "kitti" else want
    sample = first(bench, tmp_path)
    np.testing.assert_allclose(sample["depth"], want, rtol=1e-6)
    assert sample["photos"][0].shape[1:] == want.shape == sample["mask"].shape


def test_the_range_is_strict_and_nyuv2_counts_inside_rows_45_471_and_columns_41_601():
    depth = np.full((480, 640), 2.0, np.float32)
    depth[100, 100], depth[100, 101], depth[100, 102] = 10.0, 0.001, 9.999
    mask = benchmarks.valid_depth(bench_of("nyuv2"), depth)
    rows, cols = np.nonzero(mask)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (45, 470, 41, 600)
    assert mask.sum() == 426 * 560 - 2 and mask[100, 102]


def test_kitti_counts_inside_the_eigen_crop():
    rows, cols = np.nonzero(benchmarks.valid_depth(bench_of("kitti"), np.full((352, 1216), 5.0)))
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (117, 321, 43, 1172)


def test_infinite_eth3d_depth_is_invalid(tmp_path):
    bench = bench_of("eth3d")
    official.make(bench, tmp_path, 1)
    sample = first(bench, tmp_path)
    assert not sample["mask"].all() and (sample["mask"] == (pool()["depth"][0] > 0)).all()


def test_diode_counts_what_its_mask_file_says(tmp_path):
    bench = bench_of("diode")
    item = official.make(bench, tmp_path, 1)[0]
    mask = np.zeros((official.SIDE, official.SIDE), np.float32)
    mask[13, 15] = 1
    official.save(tmp_path / item["mask"], mask)
    assert np.argwhere(first(bench, tmp_path)["mask"]).tolist() == [[13, 15]]


def test_hypersim_masks_black_albedo_and_divides_by_the_larger_quantile(tmp_path):
    bench = bench_of("hypersim")
    official.make(bench, tmp_path, 1)
    sample, truth = first(bench, tmp_path), official.iid_truth(0)
    assert not sample["albedo_mask"][:, :9, :5].any() and sample["shading_mask"].all()
    top = max(np.quantile(truth[m], 0.98) for m in ("shading", "residual"))
    np.testing.assert_allclose(sample["shading"], truth["shading"].clip(0, top) / top, rtol=1e-5)
    np.testing.assert_allclose(sample["residual"], truth["residual"].clip(0, top) / top, rtol=1e-5)


def test_interiorverse_accepts_an_npy_beside_the_exr(tmp_path):
    bench = bench_of("interiorverse")
    item = official.make(bench, tmp_path, 1)[0]
    a = first(bench, tmp_path)
    other = official.linear(pool()["albedo"][0]).transpose(1, 2, 0)
    other[3, 4], a["albedo"][:, 3, 4] = 1.6, 1                                  # clipped as an .exr is
    (tmp_path / item["albedo"]).unlink()
    official.save(tmp_path / item["albedo"].replace(".exr", ".npy"), other)
    np.testing.assert_allclose(first(bench, tmp_path)["albedo"], a["albedo"], atol=1e-6)


def test_mit_photos_keep_16_bits_and_are_shown_srgb_encoded(tmp_path):
    bench = bench_of("mit")
    official.make(bench, tmp_path)
    sample = first(bench, tmp_path)
    reflectance, shading = official.lit(0, 0)
    np.testing.assert_allclose(sample["albedo"], reflectance.transpose(2, 0, 1), atol=1 / 65535)
    photo = reflectance * shading[..., None]
    top = np.quantile(photo[sample["mask"]], 0.99)
    want = official.encode(np.minimum(photo / top, 1))
    np.testing.assert_allclose(sample["photos"][0].permute(1, 2, 0), want, atol=2e-3)   # sRGB is steep near black


# missing ----------------------------------------------------------------------------------------------------------

@every
def test_the_page_names_layout_source_licence_and_count(bench):
    text = benchmark_table.missing_page(bench, ["a/b.png", "c.png"])
    source, licence, _ = benchmark_table.ABOUT[bench.dataset, bench.task]
    count = str(bench.count or f"every image of {bench.tree[0].split('  ')[0]} is")
    for part in (bench.dataset, *bench.tree, source, licence, count, "2 files", "a/b.png"):
        assert part in text
    assert ("uncompressed .tar" in text) == (bench.dataset != "photos")


@every
def test_an_empty_folder_is_missing_data(bench, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((MissingData, FileNotFoundError), match="empty"):
        benchmarks.find_data(bench, tmp_path / "empty")


def test_one_photo_is_a_data_set_of_its_own(tmp_path):
    bench = bench_of("photos")
    items = official.make(bench, tmp_path, 2)
    files, found, missing = benchmarks.find_data(bench, tmp_path / items[1]["rgb"])
    assert [item["rgb"] for item in found] == [Path(items[1]["rgb"]).name] and missing == []
    sample = benchmarks.load_sample(bench, files, found[0])
    assert torch.equal(sample["photos"][0], read_rgb(tmp_path / items[1]["rgb"]))


def test_the_first_missing_file_is_named_in_list_order(tmp_path):
    bench = bench_of("scannet")
    items = official.make(bench, tmp_path, 3)
    (tmp_path / items[1]["depth"]).unlink()
    _, _, missing = benchmarks.find_data(bench, tmp_path)
    assert missing[0] == items[1]["depth"] and len(missing) == 2 * 797 + 1


# refusals ---------------------------------------------------------------------------------------------------------

def broken(bench, root, change, word):
    """One image, damaged by change(root, item): reading it must name `word`."""
    item = official.make(bench, root, 1)[0]
    change(root, item)
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        first(bench, root)


def put(role, content):
    return lambda root, item: official.save(root / item[role], content)


SMALL = np.zeros((8, 8), np.float32)


@pytest.mark.parametrize("dataset, task, change, word", [
    ("eth3d", "", put("depth", b"\0" * 100), "got 100 bytes, want 16384"),
    ("eth3d", "", put("depth", b"\0" * 16384), "empty mask"),
    ("diode", "", put("mask", np.full((64, 64), np.nan)), "_mask.npy: got non-finite"),
    ("diode", "", put("depth", np.full((64, 64), np.nan)), "_depth.npy: got a depth in the mask"),
    ("diode", "", put("depth", np.full((64, 64), -1.0)), "_depth.npy: got a depth in the mask"),
    ("nyuv2", "", put("depth", official.Image.new("L", (64, 64), 3)), "8-bit depth, want 16 bits, 1000 a metre"),
    ("iiw", "", put("judgements", b"[1, 2]"), "63508.json|json: metrics.whdr failed"),
    ("iiw", "", put("judgements", b"{\"intrinsic_points\": [{\"x\": null}], \"intrinsic_comparisons\": []}"),
     "json: .*another form"),
    ("maw", "", lambda root, item: np.save(root / "labels/scene_0/photo_colors.npy", np.ones((9, 3))), "9 colours"),
    ("mit", "", put("albedo", official.sixteen(np.zeros((64, 64, 3)))), "reflectance.png: .*true energy"),
    ("hypersim", "", put("albedo", np.full((64, 64, 3), -0.1)), "albedo.*12288 values that are negative"),
    ("interiorverse", "", put("albedo", official.exr(np.full((64, 64, 3), np.nan))), "albedo.exr: got 12288 values"),
    ("diode", "", put("mask", np.zeros((64, 64), np.float32)), "empty mask"),
    ("diode", "", put("mask", SMALL), "8 x 8 pixels, want 64 x 64"),
    ("diode", "", put("depth", b"junk"), "damaged .npy"),
    ("nyuv2", "", put("depth", official.Image.new("RGB", (64, 64))), "want 8- or 16-bit gray"),
    ("nyuv2", "", put("depth", official.Image.new("I;16", (64, 64))), "empty mask"),
    ("nyuv2", "", put("rgb", official.Image.new("RGBA", (64, 64))), "a RGBA image"),
    ("nyuv2", "", put("rgb", official.png16(np.zeros((64, 64, 3), np.uint16))), "16-bit RGB"),
    ("nyuv2", "", put("rgb", official.Image.new("RGB", (32, 32))), "64 x 64 pixels, want 32 x 32"),
    ("kitti", "", put("depth", official.Image.new("I;16", (64, 64))), "pixels, want"),
    ("nyuv2", "normal", put("normal", np.zeros((64, 64, 3), np.float32)), "empty mask"),
    ("nyuv2", "normal", put("normal", np.full((64, 64, 3), np.nan, np.float32)), "non-finite normals"),
    ("nyuv2", "normal", put("normal", SMALL), "want .H, W, 3."),
    ("iiw", "", put("judgements", b"{"), "not JSON"),
    ("hypersim", "", put("albedo", np.zeros((64, 64, 3))), "empty mask"),
    ("hypersim", "", put("shading", np.zeros((8, 8, 3))), "8 x 8 pixels"),
    ("mit", "", put("mask", official.Image.new("L", (64, 64))), "empty mask")])
def test_a_bad_file_is_refused_by_name(tmp_path, dataset, task, change, word):
    broken(bench_of(dataset, task), tmp_path, change, word)


def test_a_meta_csv_without_six_columns_is_refused_with_its_line(tmp_path):
    bench = bench_of("maw")
    official.make(bench, tmp_path, 2)
    with open(tmp_path / "labels/meta.csv", "a") as f:
        f.write("a,b,c\n")
    with pytest.raises(ValueError, match="line 3: got 1 columns, want 6"):
        benchmarks.find_data(bench, tmp_path)


@pytest.mark.parametrize("content, word", [(b"", "got no line"), (b"\xff\xfe\0", "got no table"),
                                           (b"a\tb\tc\t" + b"n" * 5000 + b"\te\tNone\n", "got none of the 1 images")])
def test_a_meta_csv_that_is_empty_or_no_text_or_names_the_impossible_is_refused(tmp_path, content, word):
    official.make(bench_of("maw"), tmp_path, 1)
    (tmp_path / "labels/meta.csv").write_bytes(content)
    with pytest.raises((ValueError, MissingData), match=word):
        benchmarks.find_data(bench_of("maw"), tmp_path)


def test_diode_depth_of_another_size_beside_normals_is_refused_by_name(tmp_path):
    bench = bench_of("diode", "normal")
    item = official.make(bench, tmp_path, 1)[0]
    for ending in ("_depth.npy", "_depth_mask.npy"):
        official.save(tmp_path / item["rgb"].replace(".png", ending), np.ones((10, 12), np.float32))
    with pytest.raises(ValueError, match="_depth.npy: got 12 x 10 pixels, want 64 x 64"):
        first(bench, tmp_path)


def test_two_maw_labellings_of_one_photo_have_two_names(tmp_path):
    bench = bench_of("maw")
    official.make(bench, tmp_path, 2)
    with open(tmp_path / "labels/meta.csv", "a") as f:
        f.write("other.npy\tscene_1/photo_mask.png\tscene_1\tphoto\tscene_1/gt.png\tNone\n")
    names = [i["name"] for i in benchmarks.list_items(bench, formats.Files(tmp_path))]
    assert len(set(names)) == 3 and names[0] == "images_png/scene_0/photo.png" and "other.npy" in names[2]


def plane(signs=(1, 1, 1)):
    """A tilted plane seen by DIODE's camera: depth (768, 1024) and its normal, both exact, the normal in a frame."""
    n = np.array([0.3, 0.5, 0.81])
    n /= np.linalg.norm(n)
    fx, fy, cx, cy = benchmarks.DIODE_CAMERA
    x, y = (np.arange(1024) - cx) / fx, (cy - np.arange(768)[:, None]) / fy
    depth = 3 / (n[2] - n[0] * x - n[1] * y)
    return depth.astype(np.float32), np.broadcast_to(n * signs, (768, 1024, 3)).astype(np.float32)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_diode_normals_in_another_frame_than_its_depth_are_refused(tmp_path, signs):
    bench = bench_of("diode", "normal")
    item = official.make(bench, tmp_path, 1)[0]
    depth, normal = plane(signs)
    official.save(tmp_path / item["rgb"], official.Image.new("RGB", (1024, 768)))
    official.save(tmp_path / item["normal"], normal)
    official.save(tmp_path / item["rgb"].replace(".png", "_depth.npy"), depth[..., None])
    official.save(tmp_path / item["rgb"].replace(".png", "_depth_mask.npy"), np.ones_like(depth))
    if signs == (1, 1, 1):
        assert first(bench, tmp_path)["normal"].shape == (3, 768, 1024)
        return
    with pytest.raises(ValueError, match="wrong normal axes") as error:
        first(bench, tmp_path)
    x, y, z = ("-" if s < 0 else "+" for s in signs)
    assert f"({x}x, {y}y, {z}z) fits the normals of its depth at 0.0" in str(error.value)


# real files -------------------------------------------------------------------------------------------------------

def test_the_real_diode_frame_is_read(tmp_path):
    folder = SHARED / "diode"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    sample = first(bench_of("diode"), folder)
    assert sample["depth"].shape == (768, 1024) and 0.99 < sample["mask"].mean() < 1
    assert sample["photos"][0].shape == (3, 768, 1024)
    assert 0 < sample["depth"][sample["mask"]].min() < 0.6              # the range clips predictions, not truth


def test_real_eth3d_depth_in_headerless_form_is_read(tmp_path, monkeypatch):
    """The two-view frame's depth (f B / disparity), written as the DSLR benchmark stores it."""
    source = SHARED / "eth3d_two_view" / "playground"
    if not source.is_dir():
        pytest.skip(f"no {source}")
    head = (source / "disp0.pfm").read_bytes().split(b"\n", 3)
    w, h = map(int, head[1].split())
    disparity = np.frombuffer(head[3], "<f4").reshape(h, w)[::-1]              # rows bottom-up; +inf is invalid
    known = np.isfinite(disparity)
    depth = np.where(known, 542.019 * 59.5549 / np.where(known, disparity, 1) / 1000, np.inf).astype("<f4")
    monkeypatch.setattr(benchmarks, "ETH3D_SIZE", (h, w))
    bench = bench_of("eth3d")
    item = benchmarks.list_items(bench, None)[0]
    official.save(tmp_path / item["depth"], depth.tobytes())
    official.save(tmp_path / item["rgb"], official.Image.open(source / "im0.png").convert("RGB"))
    sample = first(bench, tmp_path)
    assert (sample["mask"] == known).all() and 0.4 < known.mean() < 0.6
    np.testing.assert_array_equal(sample["depth"][known], depth[known])


def test_the_iiw_fixture_is_read(tmp_path):
    folder = SHARED / "iiw_fixture"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    sample = first(bench_of("iiw"), folder)
    assert sample["name"] == "63508.png"
    assert sample["judgements"] == json.loads((folder / "63508.json").read_text())
