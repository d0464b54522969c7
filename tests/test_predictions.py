"""predictions.py and eval.py on benchmarks: perfect maps score perfectly, results resume, bad maps are refused."""
import json
import os
import threading

import numpy as np
import official
import pytest
import torch
from official import bench_of

import eval as evaluation
from data.pictures import panel
from evaluation import benchmark_report, benchmark_table, benchmarks, metrics, predictions, protocols
from models import marigold
from models.dit import DiT, DiTConfig
from models.schedule import Schedule
from models.sd2 import VAE, UNet
from predictor import load_predictor, predict_photo
from runtime.command import run_command

every = pytest.mark.parametrize("bench", benchmark_table.BENCHMARKS, ids=lambda b: f"{b.dataset}-{b.task}")


@pytest.fixture(autouse=True)
def small_eth3d(monkeypatch):
    monkeypatch.setattr(benchmarks, "ETH3D_SIZE", (official.SIDE, official.SIDE))


def prepare(bench, root, n=3):
    """Data and perfect predictions; returns (items, flags of the command)."""
    items = official.make(bench, root / "data", n)
    files, found, _ = benchmarks.find_data(bench, root / "data")
    items = [i for i in found if benchmarks.is_complete(files, i)]
    official.answer(bench, root / "maps", items)
    flags = ["--dataset", bench.dataset, "--data", root / "data", "--pred-dir", root / "maps", "--out", root / "out",
             "--task", bench.task]
    flags += ["--limit", n] if bench.count > 100 else []
    return items, flags + (["--pred-space", "linear"] if bench.dataset == "mit" else [])


def numbers(tmp_path, *argv):
    evaluation.main([*map(str, argv), "--json", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


def refusal(capsys, *argv):
    """The line that a bad command prints; exit code 2, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: evaluation.main([*map(str, argv)]), "eval.py")
    text = capsys.readouterr().err
    lines = [line for line in text.split("\r")[-1].splitlines() if line.startswith("eval.py: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in text
    return lines[0]


PERFECT = {"abs_rel": 0, "delta1": 1, "rmse": 0, "mean": 0, "pooled": 0, "within_11.25": 100, "whdr10_linear": 0,
           "intensity": 0, "chromaticity": 0, "lmse": 0, "consistency": 0, "albedo_ssim": 1, "shading_ssim": 1,
           "residual_ssim": 1}


# whole evaluations of saved maps ----------------------------------------------------------------------------------

@every
def test_perfect_maps_score_perfectly_on_every_benchmark(bench, tmp_path, capsys):
    n = 100 if bench.dataset == "ibims" else 3
    items, flags = prepare(bench, tmp_path, n)
    got = numbers(tmp_path, *flags)
    printed = capsys.readouterr().out
    assert got["n"] == len(items) and got["expected"] == (bench.count or len(items))
    assert got["partial"] == (bench.count > 100) == ("PARTIAL" in printed) and got["warnings"] == []
    for name, row in got["metrics"].items():
        if name in PERFECT and bench.task != "surface":                         # central differences are not exact
            assert row["value"] == pytest.approx(PERFECT[name], abs=2e-3), name
        assert protocols.MEASURES[bench.task][name][0] in printed
    assert bench.protocol in printed and f"{len(items)} images evaluated of {got['expected']} expected" in printed
    assert set(PERFECT) & set(got["metrics"]) or bench.task == "surface"


def test_a_tar_gives_the_same_numbers_as_its_folder(tmp_path):
    bench = bench_of("nyuv2")
    _, flags = prepare(bench, tmp_path)
    one = numbers(tmp_path, *flags)
    tar = official.tar_of(tmp_path / "data", tmp_path / "data.tar")
    maps = official.tar_of(tmp_path / "maps", tmp_path / "maps.tar")
    flags[flags.index("--data") + 1], flags[flags.index("--pred-dir") + 1] = tar, maps
    assert numbers(tmp_path, *flags)["metrics"] == one["metrics"]


def test_saved_colours_are_read_in_the_space_that_is_named(tmp_path):
    bench = bench_of("interiorverse")
    items, flags = prepare(bench, tmp_path)
    for item in items:
        path = tmp_path / "maps" / predictions.prediction_file(bench, benchmarks.formats.Files(tmp_path / "maps"),
                                                              item["rgb"], "albedo")
        np.save(path, official.linear(np.load(path)).astype(np.float32))
    assert numbers(tmp_path, *flags, "--pred-space", "linear")["metrics"]["albedo_ssim"]["value"] > 0.999
    assert numbers(tmp_path, *flags)["metrics"]["albedo_ssim"]["value"] < 0.99


def test_the_papers_numbers_stand_beside_ours_and_say_whose_they_are(tmp_path, capsys):
    _, flags = prepare(bench_of("eth3d"), tmp_path)
    got = numbers(tmp_path, *flags)
    assert got["metrics"]["abs_rel"]["paper"] == [dict(base="PRISM", value=.142, x=.077)]
    out = capsys.readouterr().out
    assert "the paper's base -> X" in out and "PRISM 0.142 -> 0.077" in out


def test_two_folders_are_compared_image_by_image(tmp_path, capsys):
    bench = bench_of("scannet")
    items, flags = prepare(bench, tmp_path, 3)
    rng = np.random.default_rng(0)
    for item in items:
        name = predictions.prediction_file(bench, benchmarks.formats.Files(tmp_path / "maps"), item["rgb"], "depth")
        noisy = np.load(tmp_path / "maps" / name)
        official.save(tmp_path / "noisy" / name, (noisy + 0.05 * rng.standard_normal(noisy.shape)).astype(np.float32))
    got = numbers(tmp_path, *flags, "--compare", tmp_path / "noisy")
    row = got["metrics"]["abs_rel"]
    assert row["base"] > 0.02 > row["value"] and row["verdict"] == "better" and row["change"] < -0.9
    rest = [f for k, f in enumerate(flags) if "--pred-dir" not in flags[max(0, k - 1):k + 1]]
    both = numbers(tmp_path, *rest, "--compare", tmp_path / "noisy", tmp_path / "maps")
    assert both["metrics"] == got["metrics"]
    same = numbers(tmp_path, *flags, "--compare", tmp_path / "maps")
    assert {r["verdict"] for r in same["metrics"].values()} == {"same"}


def test_pictures_show_best_and_worst_first(tmp_path, capsys, monkeypatch):
    bench = bench_of("scannet")
    items, flags = prepare(bench, tmp_path, 3)
    rng = np.random.default_rng(0)
    for amount, item in zip((0.02, 0.0, 0.1), items, strict=True):
        path = tmp_path / "maps" / predictions.prediction_file(bench, benchmarks.formats.Files(tmp_path / "maps"),
                                                              item["rgb"], "depth")
        depth = np.load(path)
        np.save(path, (depth + amount * rng.standard_normal(depth.shape)).astype(np.float32))
    shown = []
    real = benchmark_report.panel
    monkeypatch.setattr(benchmark_report, "panel", lambda tiles, columns: shown.extend(tiles) or real(tiles, columns))
    numbers(tmp_path, *flags, "--panels", 3)
    titles = [label for label, _ in shown[::4]]
    assert [t.split(":")[0] for t in titles] == ["best", "worst", "best"]
    for title, i in zip(titles, (1, 2, 0), strict=True):
        assert items[i]["name"] in title
    assert (tmp_path / "out/eval/scannet-depth.png").is_file() and all(np.isfinite(x).all() for _, x in shown)


@every
def test_every_task_has_a_picture(bench, tmp_path):
    items, _ = prepare(bench, tmp_path, 1)
    files, _, _ = benchmarks.find_data(bench, tmp_path / "data")
    args = evaluation.arguments(["--dataset", bench.dataset])
    source = predictions.saved_source(tmp_path / "maps", args)
    sample = source.read(bench, files, items[0])
    tiles = protocols.result_pictures(bench, source.predict(bench, sample), sample)
    assert len(tiles) >= 2 and all(x.shape[0] == 3 and np.isfinite(x).all() for _, x in map(
        lambda t: (t[0], np.asarray(t[1])), tiles))
    panel(tiles)


# networks ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset", ["diode", "iiw", "maw", "mit", "photos", "hypersim", "interiorverse", "ibims"])
def test_a_network_is_evaluated_on_every_kind_of_benchmark(run, tmp_path, dataset, capsys):
    bench = bench_of(dataset)
    for b in benchmark_table.choose_benchmarks(dataset):
        official.make(b, tmp_path / "data", 2)
    got = numbers(tmp_path, "--dataset", dataset, "--data", tmp_path / "data", "--out", tmp_path / "o", "--checkpoint",
                  run / "grpo", "--compare", run / "base", "--denoise-steps", 1, "--limit", 2)
    tables = got.get("tables", [got])
    assert [t["task"] for t in tables] == [b.task for b in benchmark_table.choose_benchmarks(dataset)]
    for t in tables:
        assert t["n"] == 2 and t["partial"] == bool(bench.count)
        assert all(np.isfinite([r["value"], r["base"]]).all() for r in t["metrics"].values())
    assert "1 steps, ensemble 1, seed 0, long edge 16 px" in capsys.readouterr().out


def test_the_photo_is_predicted_at_the_processing_resolution_and_enlarged_to_the_truth(run, tmp_path):
    policy, bench = load_predictor(run / "base"), bench_of("diode")
    items = official.make(bench, tmp_path, 1)
    files, _, _ = benchmarks.find_data(bench, tmp_path)
    args = evaluation.arguments(["--dataset", "diode", "--denoise-steps", "2", "--processing-res", "32"])
    source = predictions.network_source(run / "base", args)
    sample = source.read(bench, files, items[0])
    assert sample["photos"][0].shape == (3, 32, 32)
    got = source.predict(bench, sample)[0]
    want = predict_photo(policy, sample["photos"][0], 32, 2, 0)["depth"][None]
    want = torch.nn.functional.interpolate(want, (64, 64), mode="bilinear", align_corners=False)[0, 0]
    assert list(got) == ["depth"]
    np.testing.assert_array_equal(got["depth"], want.detach().numpy())


def test_albedo_of_a_network_is_made_linear():
    maps = predictions.linear_arrays(dict(albedo=np.full((3, 2, 2), 0.5), depth=np.ones((1, 2, 2))), "srgb")
    assert maps["albedo"][0, 0, 0] == pytest.approx(0.21404, abs=1e-5) and maps["depth"].shape == (2, 2)


def test_a_network_without_the_modality_is_refused_and_mit_keeps_the_table_it_can_fill(run, tmp_path, capsys,
                                                                                       monkeypatch):
    monkeypatch.setattr(DiT, "modalities", ("albedo",))
    for b in benchmark_table.choose_benchmarks("mit"):
        official.make(b, tmp_path / "data")
    flags = ["--data", tmp_path / "data", "--out", tmp_path / "o", "--checkpoint", run / "base", "--denoise-steps", 1]
    got = numbers(tmp_path, "--dataset", "mit", *flags)
    assert got["task"] == "lights" and got["n"] == 16 and not got["partial"]
    assert "left out" in capsys.readouterr().out
    official.make(bench_of("diode"), tmp_path / "data", 1)
    line = refusal(capsys, "--dataset", "diode", "--limit", 1, *flags)
    assert "predicts albedo; want depth too" in line


def test_the_weights_key_sees_a_small_change():
    a = DiT(DiTConfig(size=16, width=32, encoder_layers=1, layers=1, heads=2))
    before = predictions.weights_key(a)
    assert before == predictions.weights_key(a)
    with torch.no_grad():
        a.head.bias += 1e-3
    assert predictions.weights_key(a) != before


def test_the_weights_key_sees_what_no_weight_shows():
    config = dict(width=32, encoder_layers=1, layers=1)
    a, b = (DiT(DiTConfig(size=size, heads=heads, **config)) for size, heads in ((16, 2), (16, 4)))
    b.load_state_dict(a.state_dict())
    assert predictions.weights_key(a) != predictions.weights_key(b)
    with torch.random.fork_rng():
        model, keys = tiny_marigold(), []
    keys.append(predictions.weights_key(model))
    model.schedule = Schedule({**model.schedule.config, "timestep_spacing": "leading"})
    keys.append(predictions.weights_key(model))
    model.about["target_properties"]["albedo"]["prediction_space"] = "srgb"
    keys.append(predictions.weights_key(model))
    model.text += 1
    assert len({*keys, predictions.weights_key(model)}) == 4


# resuming ---------------------------------------------------------------------------------------------------------

def results(tmp_path):
    return sorted((tmp_path / "out/eval").glob("*.jsonl"))


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(tmp_path, monkeypatch, capsys):
    bench = bench_of("ibims")
    _, flags = prepare(bench, tmp_path, 100)
    whole = numbers(tmp_path, *flags)
    path, = results(tmp_path)
    lines = path.read_text().splitlines()
    assert len(lines) == 100
    path.write_text("\n".join(lines[:60]) + "\n" + lines[60][:25])                # killed while writing line 61
    scored = []
    real = protocols.score_prediction
    monkeypatch.setattr(protocols, "score_prediction", lambda *a: scored.append(a[2]["name"]) or real(*a))
    capsys.readouterr()
    again = numbers(tmp_path, *flags)
    assert again == whole and len(scored) == 40 and scored[0] == json.loads(lines[60])["name"]
    assert "60 of 100 images are already in" in capsys.readouterr().out
    assert results(tmp_path) == [path] and path.read_text().splitlines() == lines


@pytest.mark.parametrize("tail", [
    b"\0" * 40, b"\xff\xfe", b"3\n", b'{"abs_rel": 1}\n', b"[" * 100_000, b'{"name": 4}\n',
    b'{"name": "SECOND", "abs_rel": 0.5}\n'])
def test_a_damaged_line_of_the_results_is_scored_again(tmp_path, capsys, tail):
    items, flags = prepare(bench_of("nyuv2"), tmp_path)
    whole = numbers(tmp_path, *flags)
    path, = results(tmp_path)
    good = path.read_bytes()
    path.write_bytes(good.splitlines(True)[0] + tail.replace(b"SECOND", items[1]["name"].encode()))
    capsys.readouterr()
    assert numbers(tmp_path, *flags) == whole and path.read_bytes() == good
    assert f"{path}: got 2 lines, the first 1 whole" in capsys.readouterr().out


def test_an_interruption_keeps_what_was_scored(tmp_path, monkeypatch):
    bench = bench_of("ibims")
    _, flags = prepare(bench, tmp_path, 100)
    real, seen = protocols.score_prediction, []

    def dies(*a):
        seen.append(1)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(protocols, "score_prediction", dies)
    with pytest.raises(KeyboardInterrupt):
        numbers(tmp_path, *flags)
    assert len(results(tmp_path)[0].read_text().splitlines()) == 7


def test_the_digest_covers_all_code_that_makes_a_number_and_no_command():
    used = dict(predictions.CODE)
    assert {"predictions", "protocols", "benchmarks", "benchmark_table", "metrics", "surface", "colour", "formats",
            "predictor", "marigold", "relations"} <= {name.split(".")[-1] for name in used}
    assert not {"eval", "train", "report"} & used.keys() and all(used.values())


@pytest.mark.parametrize("what", ["prediction", "truth", "npy truth", "space"])
def test_other_predictions_data_or_settings_do_not_resume(tmp_path, what):
    bench = bench_of("interiorverse")
    items, flags = prepare(bench, tmp_path, 2)
    if what == "npy truth":
        for item in items:
            path = tmp_path / "data" / item["albedo"]
            np.save(path.with_suffix(".npy"), benchmarks.formats.decode_exr(path.read_bytes(), "x"))
            path.unlink()
            item["albedo"] = item["albedo"].replace(".exr", ".npy")
    numbers(tmp_path, *flags)
    if what == "space":
        flags += ["--pred-space", "linear"]
    else:
        path = tmp_path / ("maps" if what == "prediction" else "data") / (
            items[0]["rgb"].replace(".exr", "_albedo.npy") if what == "prediction" else items[0]["albedo"])
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
    numbers(tmp_path, *flags)
    assert len(results(tmp_path)) == 2


def test_the_next_image_is_read_in_another_thread_while_one_is_scored(tmp_path, monkeypatch):
    bench = bench_of("ibims")
    _, flags = prepare(bench, tmp_path, 100)
    real_load, real_score, started = benchmarks.load_sample, protocols.score_prediction, {}
    monkeypatch.setattr(benchmarks, "load_sample", lambda b, f, item, **k: started.setdefault(
        item["name"], (threading.current_thread(), threading.Event()))[1].set() or real_load(b, f, item, **k))
    names = [i["name"] for i in benchmarks.list_items(bench, None)]

    def score(b, pred, sample):
        after = names.index(sample["name"]) + 1
        if after < 5:                                                           # the next begins before this one ends
            started.setdefault(names[after], (None, threading.Event()))[1].wait(5)
            assert names[after] in started
        return real_score(b, pred, sample)
    monkeypatch.setattr(protocols, "score_prediction", score)
    numbers(tmp_path, *flags)
    assert all(t is not threading.main_thread() for t, _ in started.values())


# refusals ---------------------------------------------------------------------------------------------------------

def damaged(bench, tmp_path, change, n=3):
    items, flags = prepare(bench, tmp_path, n)
    files = benchmarks.formats.Files(tmp_path / "maps")
    for k, item in enumerate(items):
        for m in bench.needs:
            change(k, tmp_path / "maps" / predictions.prediction_file(bench, files, item["rgb"], m))
    return items, flags


def test_one_missing_prediction_among_many_is_refused_before_anything_is_scored(tmp_path, capsys):
    items, flags = damaged(bench_of("ibims"), tmp_path, lambda k, path: path.unlink() if k in (70, 90) else None, 100)
    line = refusal(capsys, *flags)
    assert "no prediction for 2 of 100 maps of ibims" in line and items[70]["rgb"].replace(".png", ".npy") in line
    assert not results(tmp_path)


def test_a_map_that_some_photos_have_is_wanted_of_all(tmp_path, capsys):
    bench = bench_of("hypersim")
    items, flags = prepare(bench, tmp_path, 3)
    saved = benchmarks.formats.Files(tmp_path / "maps")
    shading = [tmp_path / "maps" / predictions.prediction_file(bench, saved, i["rgb"], "irradiance") for i in items]
    shading[1].unlink()
    line = refusal(capsys, *flags)
    assert "no prediction for 1 of 9 maps of hypersim" in line and shading[1].name in line
    for path in (shading[0], shading[2]):                                       # none at all: that map is not scored
        path.unlink()
    assert {k.split("_")[0] for k in numbers(tmp_path, *flags)["metrics"]} == {"albedo", "residual"}


@pytest.mark.parametrize("tar", [False, True])
def test_the_photo_itself_is_no_prediction(tmp_path, capsys, tar):
    items = official.make(bench_of("iiw"), tmp_path / "data", 1)
    place = official.tar_of(tmp_path / "data", tmp_path / "data.tar") if tar else tmp_path / "data"
    line = refusal(capsys, "--dataset", "iiw", "--data", place, "--pred-dir", place, "--limit", 1, "--out", tmp_path)
    assert items[0]["rgb"] in line and "want another folder in --pred-dir" in line


def rewrite(at, make):
    return lambda k, path: np.save(path, make(np.load(path))) if k == at else None


def spoil(x):
    x[..., 2, 2] = np.inf
    return x


@pytest.mark.parametrize("change, word", [
    (rewrite(1, spoil), "got 1 values in the predicted depth that are non-finite"),
    (rewrite(1, lambda x: x * np.nan), "got 4096 values in the predicted depth that are non-finite"),
    (rewrite(1, lambda x: x[..., :8, :8]), "a predicted depth of 8 x 8 pixels, want 64 x 64"),
    (rewrite(1, lambda x: np.stack(3 * [x])), "want (1, H, W)"),
    (rewrite(1, lambda x: np.ones(x.shape, int)), "want floating point"),
    (lambda k, path: path.write_bytes(b"junk"), "damaged .npy")])
def test_a_bad_saved_map_is_refused_by_name(tmp_path, capsys, change, word):
    items, flags = damaged(bench_of("nyuv2"), tmp_path, change)
    line = refusal(capsys, *flags)
    assert word in line and ("rgb_" in line or "pred_" in line)


def test_saved_disparity_is_refused(tmp_path, capsys):
    _, flags = damaged(bench_of("nyuv2"), tmp_path, lambda k, path: np.save(path, -np.load(path)))
    line = refusal(capsys, *flags)
    assert "3 of 3 fitted scales are negative" in line and "inverse depth" in line and "--align disparity" in line


def test_one_inverted_map_is_reported_loudly(tmp_path, capsys):
    items, flags = damaged(bench_of("nyuv2"), tmp_path, rewrite(2, lambda x: -x))
    got = numbers(tmp_path, *flags)
    assert len(got["warnings"]) == 1 and items[2]["name"] in got["warnings"][0]
    assert "!! " + got["warnings"][0] in capsys.readouterr().out


def test_saved_normals_in_another_frame_are_refused_with_the_better_signs(tmp_path, capsys):
    flip = np.array([-1, 1, 1], np.float32).reshape(3, 1, 1)
    _, flags = damaged(bench_of("nyuv2", "normal"), tmp_path, lambda k, path: np.save(path, flip * np.load(path)))
    line = refusal(capsys, *flags)
    assert "wrong normal axes: (-x, +y, +z) fits the ground truth" in line


def test_an_infinite_psnr_is_a_string_in_the_json(tmp_path):
    _, flags = prepare(bench_of("hypersim"), tmp_path)
    metrics = numbers(tmp_path, *flags)["metrics"]
    row = metrics["albedo_psnr"]                                                # the saved maps are the truth
    assert metrics["residual_psnr"]["value"] != "inf" and row["value"] == "inf" and row["low"] is None


def test_judgements_that_never_count_give_no_table(tmp_path, capsys):
    items, flags = prepare(bench_of("iiw"), tmp_path, 2)
    for item in items:
        path = tmp_path / "data" / item["judgements"]
        judged = json.loads(path.read_text())
        judged["intrinsic_comparisons"] = []
        path.write_text(json.dumps(judged))
    assert "got no judgement that counts in any of 2 images" in refusal(capsys, *flags)


@pytest.mark.parametrize("content, word", [
    (official.Image.new("RGBA", (64, 64)), "a RGBA image"),
    (official.png16(np.zeros((64, 64, 3), np.uint16)), "16-bit RGB")])
def test_albedo_with_alpha_or_16_bits_is_refused(tmp_path, capsys, content, word):
    _, flags = damaged(bench_of("iiw"), tmp_path, lambda k, path: official.save(path, content))
    assert word in refusal(capsys, *flags)


# the command ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset", benchmark_table.DATASETS)
def test_a_benchmark_without_data_prints_what_to_fetch_and_exits_2(dataset, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: evaluation.main(["--dataset", dataset]), "eval.py")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[0].startswith(f"eval.py: --dataset {dataset} needs --data")
    assert any(line.startswith("Source:") for line in lines) and any(line.startswith("Licence:") for line in lines)


def test_an_incomplete_benchmark_is_refused_with_the_first_missing_file_unless_a_limit_is_given(tmp_path, capsys):
    items, flags = prepare(bench_of("scannet"), tmp_path, 3)
    (tmp_path / "data" / items[1]["depth"]).unlink()
    line = refusal(capsys, *[f for k, f in enumerate(flags) if "--limit" not in flags[max(0, k - 1):k + 1]])
    assert f"got 2 of 800 images of scannet (first missing: {items[1]['depth']})" in line
    got = numbers(tmp_path, *flags)
    assert got["n"] == 2 and got["partial"] and "*** PARTIAL: 2 of 800" in capsys.readouterr().out
    assert got["warnings"] == [f"798 incomplete images were skipped (first: {items[1]['name']})"]
    flags[flags.index("--limit") + 1] = 2
    assert numbers(tmp_path, *flags)["warnings"] == [f"1 incomplete images were skipped (first: {items[1]['name']})"]
    flags[flags.index("--limit") + 1] = 1
    assert numbers(tmp_path, *flags)["warnings"] == []


def test_check_data_counts_decodes_and_names_the_first_bad_file(tmp_path, capsys):
    bench = bench_of("ibims")
    items = official.make(bench, tmp_path / "data", 100)
    got = numbers(tmp_path, "--dataset", "ibims", "--data", tmp_path / "data", "--check-data")
    assert got.pop("about")["commit"]
    size = sum((tmp_path / "data" / i[r]).stat().st_size for i in items for r in ("rgb", "normal"))
    assert got == dict(dataset="ibims", task="normal", n=100, expected=100, bytes=size)
    assert "100 of 100 images complete" in capsys.readouterr().out
    (tmp_path / "data" / items[40]["normal"]).write_bytes(b"junk")
    line = refusal(capsys, "--dataset", "ibims", "--data", tmp_path / "data", "--check-data")
    assert items[40]["normal"] in line and "damaged .npy" in line
    (tmp_path / "data" / items[40]["normal"]).unlink()
    line = refusal(capsys, "--dataset", "ibims", "--data", tmp_path / "data", "--check-data")
    assert "1 files of ibims are missing" in line and items[40]["normal"] in line


def test_list_datasets_names_every_benchmark(capsys):
    evaluation.main(["--list-datasets"])
    printed = capsys.readouterr().out
    for bench in benchmark_table.BENCHMARKS:
        assert any(bench.dataset in line and bench.task in line and str(bench.count or "-") in line
                   for line in printed.splitlines())


@pytest.mark.parametrize("argv, word", [
    (["--dataset", "eth3d", "--data", "nowhere"], "nowhere"),
    (["--dataset", "eth3d", "--task", "normal"], "--task normal"),
    (["--dataset", "wild", "--limit", "3"], "--limit"), (["--dataset", "wild", "--pred-dir", "x"], "--pred-dir"),
    (["--dataset", "iiw", "--checkpoint", "a", "--pred-dir", "b"], "--pred-dir"),
    (["--dataset", "iiw", "--compare", "a", "b", "c"], "--compare"),
    (["--dataset", "iiw", "--compare", "a", "b", "--checkpoint", "c"], "--compare"),
    (["--dataset", "iiw", "--limit", "-1"], "--limit"),
    (["--dataset", "iiw", "--ensemble-size", "0"], "--ensemble-size")])
def test_a_bad_benchmark_command_is_refused(capsys, argv, word):
    assert word in refusal(capsys, *argv)


def test_metrics_of_a_large_frame_agree_with_small_blocks(monkeypatch):
    """The block size of the depth metrics is not part of the number."""
    rng = np.random.default_rng(0)
    gt, mask = rng.uniform(1, 9, (97, 53)), rng.random((97, 53)) < 0.6
    pred = 0.2 * gt + 0.1 * rng.random((97, 53))
    whole = metrics.align_depth(pred, gt, mask), metrics.depth_metrics(5 * pred, gt, mask)
    monkeypatch.setattr(metrics, "BLOCK", 100)
    small = metrics.align_depth(pred, gt, mask), metrics.depth_metrics(5 * pred, gt, mask)
    np.testing.assert_allclose(small[0], whole[0], rtol=1e-12)
    np.testing.assert_allclose(list(small[1].values()), list(whole[1].values()), rtol=1e-12)
    a = np.stack([pred[mask], np.ones(mask.sum())], 1)
    np.testing.assert_allclose(whole[0], np.linalg.lstsq(a, gt[mask], rcond=None)[0], rtol=1e-9)


def tiny_marigold(kind="MarigoldIntrinsicsPipeline", n=3):
    """A Marigold of the published structure with random weights, two levels wide."""
    unet = dict(in_channels=4 * n + 4, out_channels=4 * n, block_out_channels=[32, 64], layers_per_block=1,
                attention_head_dim=[2, 4], cross_attention_dim=24, norm_num_groups=8, use_linear_projection=True,
                down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
    vae = dict(block_out_channels=[16, 32], layers_per_block=1, latent_channels=4, norm_num_groups=8)
    schedule = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                    rescale_betas_zero_snr=True, set_alpha_to_one=False, timestep_spacing="trailing")
    spaces = dict(albedo=dict(prediction_space="linear", up_to_scale=False),
                  shading=dict(prediction_space="linear", up_to_scale=True),
                  residual=dict(prediction_space="linear", up_to_scale=True))
    about = dict(_class_name=kind, target_properties=dict(target_names=["albedo", "shading", "residual"], **spaces),
                 default_denoising_steps=1)
    torch.manual_seed(0)
    return marigold.Marigold(UNet(unet), VAE(vae), Schedule(schedule),
                             torch.randn(1, 2, 24), about).eval()


@pytest.mark.parametrize("dataset, kind, n, tables", [
    ("iiw", "MarigoldIntrinsicsPipeline", 3, 1), ("mit", "MarigoldIntrinsicsPipeline", 3, 2),
    ("hypersim", "MarigoldIntrinsicsPipeline", 3, 1), ("diode", "MarigoldDepthPipeline", 1, 1),
    ("ibims", "MarigoldNormalsPipeline", 1, 1)])
def test_marigold_is_evaluated_on_what_it_predicts(tmp_path, monkeypatch, capsys, dataset, kind, n, tables):
    with torch.random.fork_rng():
        model = tiny_marigold(kind, n)
    monkeypatch.setattr(predictions, "load_predictor", lambda path: model)
    for b in benchmark_table.choose_benchmarks(dataset):
        official.make(b, tmp_path / "data", 1)
    flags = ["--data", tmp_path / "data", "--out", tmp_path / "o", "--checkpoint", "some/marigold", "--limit", 1]
    flags += ["--processing-res", 16] if dataset != "iiw" else []
    got = numbers(tmp_path, "--dataset", dataset, *flags)
    got = got.get("tables", [got])
    assert len(got) == tables and all(np.isfinite(r["value"]) for t in got for r in t["metrics"].values())
    if dataset == "hypersim":
        assert {"albedo_psnr", "shading_psnr"} <= set(got[0]["metrics"])
    printed = capsys.readouterr().out
    assert ("long edge of the protocol" if dataset == "iiw" else "long edge 16 px") in printed
    other = "ibims" if dataset != "ibims" else "diode"
    official.make(bench_of(other), tmp_path / "data", 1)
    assert "want " + bench_of(other).needs[0] in refusal(capsys, "--dataset", other, *flags)
