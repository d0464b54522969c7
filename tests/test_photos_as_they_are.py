"""Files and folders as real people have them: each is read, or refused in one line that names what it is."""
import io
import re
import shutil
import struct
import tarfile
import tracemalloc
import zlib

import fuzz
import numpy as np
import odd_files
import official
import pytest
import test_predictor
import torch
from odd_files import RGB, encoded
from PIL import Image
from rooms import write_scene

import predictor
from data import bank, formats, headers, photos, pools
from evaluation import benchmark_report, benchmarks
from evaluation.benchmark_table import choose_benchmarks, missing_page
from models.dit import DiT
from relations import NAMES
from runtime.files import find_files, is_twin

PHOTO = Image.fromarray(RGB)
TWIN = bytes.fromhex("00051607") + bytes(78)     # what macOS writes as ._NAME
GRAY = np.linspace(0, 1, 24 * 40).reshape(24, 40)


def read(tmp_path, content, name="a.jpg"):
    (tmp_path / name).write_bytes(content)
    return photos.read_rgb(tmp_path / name)


def one_line(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and "got" in text and "want" in text, text
    for word in words:
        assert re.search(word, text), text


# gray TIFFs of other numbers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("array, photometric", [
    (GRAY.astype(np.float32), 1), ((255 * GRAY).astype(np.float32), 1), ((65535 * GRAY).astype(np.float32), 1),
    ((255 * GRAY).astype(np.int32), 1), ((65535 * GRAY).astype(np.int32), 1), ((2**31 - 129) * GRAY, 1),
    ((255 * GRAY).astype(np.uint32), 1), ((65535 * GRAY).astype(np.uint32), 1),
    (((2**32 - 1) * GRAY).astype(np.uint32), 1), ((32767 * GRAY).astype(np.int16), 1),
    ((127 * GRAY).astype(np.int8), 1), ((255 * GRAY).astype(np.int16), 1), ((65535 * GRAY).astype(np.uint16), 1),
    ((65535 * (1 - GRAY)).astype(np.uint16), 0), ((255 * (1 - GRAY)).astype(np.uint8), 0),
    ((1 - GRAY).astype(np.float32), 0), ((0.01 * GRAY).astype(np.float32), 1)],
    ids=lambda x: x.dtype.name if isinstance(x, np.ndarray) else str(x))
def test_a_gray_tiff_is_as_bright_as_it_was_meant(tmp_path, array, photometric):
    array = array.astype(np.int32) if array.dtype == np.float64 else array
    want = 0.01 * GRAY if array.max() <= 0.01 else GRAY
    got = read(tmp_path, odd_files.tiff(array, photometric), "a.tif")
    assert got.shape == (3, 24, 40) and np.abs(got[1].numpy() - want).max() < 0.01


def test_a_12_bit_tiff_fills_its_12_bits(tmp_path):
    got = read(tmp_path, odd_files.tiff((4095 * GRAY).astype(np.uint16), bits=12), "a.tif")
    assert np.abs(got[0].numpy() - GRAY).max() < 1e-3


@pytest.mark.parametrize("array", [
    (1.3 * GRAY).astype(np.float32), (GRAY - 0.5).astype(np.float32), np.full((9, 9), np.nan, np.float32),
    (1000 * GRAY).astype(np.float32), (7 * GRAY).astype(np.int32), (1e6 * GRAY).astype(np.int32),
    (1000 * GRAY - 500).astype(np.int16), (100 * GRAY - 50).astype(np.int8), (1e6 * GRAY).astype(np.float32)])
def test_a_tiff_whose_range_is_not_clear_is_one_line(tmp_path, array):
    one_line(lambda: read(tmp_path, odd_files.tiff(array), "a.tif"), "a.tif", r"values .*\.\.", "0..")


def test_a_black_tiff_is_black(tmp_path):
    for kind in (np.float32, np.int32, np.uint32, np.int16):
        assert not read(tmp_path, odd_files.tiff(np.zeros((9, 9), kind)), "a.tif").any()


def test_a_tiff_of_floating_point_colour_is_named(tmp_path):
    content = odd_files.tiff(GRAY.astype(np.float32)).replace(struct.pack("<HHII", 277, 3, 1, 1),
                                                              struct.pack("<HHII", 277, 3, 1, 3))
    one_line(lambda: read(tmp_path, content, "a.tif"), "TIFF that Pillow does not read", "16 bits")


# a photo and what follows it --------------------------------------------------------------------------------------

def test_a_motion_photo_is_its_photo(tmp_path):
    large = encoded(Image.fromarray(RGB.repeat(100, 0).repeat(100, 1)), "JPEG")
    assert odd_files.motion_photo(large).count(b"\xff\xda") > 20                 # false marks of the film
    assert torch.equal(read(tmp_path, odd_files.motion_photo(large)), read(tmp_path, large))


def test_an_mpo_of_progressive_pictures_is_its_first(tmp_path):
    large = Image.fromarray(RGB.repeat(30, 0).repeat(30, 1))
    content = odd_files.mpo(large)
    assert content.count(b"\xff\xda") > 20
    got = read(tmp_path, content, "a.mpo")
    assert torch.equal(got, read(tmp_path, encoded(large, "JPEG", progressive=True)))


@pytest.mark.parametrize("options", [{}, dict(progressive=True), dict(restart_marker_blocks=1),
                                     dict(exif=b"Exif\0\0" + encoded(PHOTO, "JPEG", progressive=True))])
def test_scans_are_those_of_the_first_picture(options):
    content = encoded(PHOTO, "JPEG", **options)
    n = content.count(b"\xff\xda") - options.get("exif", b"").count(b"\xff\xda")
    assert headers.count_scans(content) == headers.count_scans(content + content) == n
    scan = content.rindex(b"\xff\xda")
    assert headers.count_scans(content[:-2] + 30 * content[scan:-2] + content[-2:] + content) == n + 30


def test_bytes_behind_a_picture_are_not_read(tmp_path):
    for kind in ("PNG", "WEBP", "BMP", "GIF", "TIFF"):
        content = encoded(PHOTO, kind)
        assert torch.equal(read(tmp_path, content + b"\xff\xda" * 10**5), read(tmp_path, content))


# notes ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_of_a_broken_exif_the_orientation_is_read(tmp_path, kind):
    options = dict(exif=odd_files.broken_exif()) | (dict(lossless=True) if kind == "WEBP" else {})
    got = read(tmp_path, encoded(PHOTO, kind, **options))
    assert got.shape == (3, 40, 24)
    if kind != "JPEG":
        assert torch.equal(got, torch.from_numpy(np.rot90(RGB, -1).copy()).permute(2, 0, 1) / 255)


def test_a_broken_rational_of_a_tiff_does_not_matter(tmp_path):
    content = bytearray(encoded(PHOTO, "TIFF", tiffinfo={odd_files.ORIENTATION: 6}, dpi=(72, 72)))
    start, = struct.unpack_from("<I", content, 4)
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        tag, _, _, place = struct.unpack_from("<HHII", content, at)
        if tag in (282, 283):
            struct.pack_into("<H", content, at + 2, 10)
            struct.pack_into("<ii", content, place, -1, 0)
    assert read(tmp_path, bytes(content)).shape == (3, 40, 24)


@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"\1" * 40, odd_files.broken_exif()[:15], b"Exif\0\0II*\0"])
def test_an_exif_that_cannot_be_read_says_nothing(tmp_path, exif):
    assert read(tmp_path, encoded(PHOTO, "JPEG", exif=exif)).shape == (3, 24, 40)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", odd_files.NOTES)
def test_long_notes_of_a_png_are_passed_over(tmp_path, name, last):
    whole = encoded(PHOTO, "PNG")
    content = odd_files.png_with(whole, (name.encode(), odd_files.NOTES[name]), last=last)
    assert torch.equal(read(tmp_path, content), read(tmp_path, whole))
    assert np.array_equal(formats.decode_rgb(content, "x"), RGB)
    wide = odd_files.png_with(official.png16(RGB.astype(np.uint16) * 257), (name.encode(), odd_files.NOTES[name]))
    assert np.abs(formats.decode_png_linear(wide, "x") - RGB / 255).max() < 1e-6


def test_a_hundred_long_notes_take_no_memory(tmp_path):
    note = b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6))
    content = odd_files.png_with(encoded(PHOTO, "PNG"), *[note] * 100)
    tracemalloc.start()
    read(tmp_path, content)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_a_long_profile_of_another_format_is_no_hindrance(tmp_path, kind):
    assert read(tmp_path, encoded(PHOTO, kind, icc_profile=odd_files.LONG)).shape == (3, 24, 40)


@pytest.mark.parametrize("name, body", [
    (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
    (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n      38\n" + (odd_files.broken_exif()).hex().encode() + b"\n"))])
def test_an_orientation_in_a_note_of_a_png_is_applied(tmp_path, name, body):
    assert read(tmp_path, odd_files.png_with(encoded(PHOTO, "PNG"), (name, body))).shape == (3, 40, 24)


def test_a_png_without_notes_is_not_copied():
    content = encoded(PHOTO, "PNG")
    assert headers.drop_notes(content) is content
    for cut in range(len(content)):
        assert headers.drop_notes(content[:cut]) == content[:cut]


# names and formats ------------------------------------------------------------------------------------------------

def test_every_name_of_a_format_that_is_read_is_found(tmp_path):
    names = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.gif": "GIF", "d.mpo": "MPO"}
    if formats.HAS_AVIF:
        names["e.avif"] = "AVIF"
    for name, kind in names.items():
        (tmp_path / name).write_bytes(encoded(PHOTO, kind))
    assert [p.name for p in photos.find_images(tmp_path)] == sorted(names)
    assert photos.Photos(tmp_path, 16).names == sorted(names)


@pytest.mark.parametrize("head, words", [
    (b"\0\0\0\x18ftypheic", ("HEIC", "pillow-heif")), (b"\0\0\0\x1cftypmif1", ("HEIC", "pillow-heif")),
    (b"\0\0\0\x1cftypavif", ("AVIF", "Pillow 11.3")), (b"\0\0\0\x18ftypcrx ", ("raw", "rawpy")),
    (b"II*\0\x10\0\0\0CR\2\0", ("raw", "rawpy")), (b"\0\0\0\x20ftypisom", ("video", "frame")),
    (b"\xff\x0a", ("JPEG XL", "pillow-jxl")), (b"\0\0\0\x0cjP  \r\n\x87\n", ("JPEG 2000", "PNG")),
    (b"8BPS\0\1", ("Photoshop", "PNG")), (b"%PDF-1.4", ("PDF", "pictures")),
    (b"<!DOCTYPE html>", ("web page", "fetch")),
    (b"<svg xmlns=", ("SVG", "PNG")), (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS", "git lfs pull")),
    (TWIN[:8], ("macOS", "remove")), (b"", ("empty", "fetch")), (bytes(99), ("zeros", "fetch")),
    (b"some words", ("not an image", "remove"))])
def test_a_file_that_is_not_what_its_name_says_is_called_what_it_is(tmp_path, head, words):
    content = head + b"\1" * 200 if head.strip(b"\0") else head
    one_line(lambda: read(tmp_path, content, "photo.jpg"), "photo.jpg", *words)


def test_pictures_of_formats_that_are_not_read_are_counted(tmp_path, capsys):
    PHOTO.save(tmp_path / "a.png")
    for name in ("IMG_1.HEIC", "raw.dng", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in photos.find_images(tmp_path)] == ["a.png"]
    assert "2 pictures of formats that are not read (first: 'IMG_1.HEIC')" in capsys.readouterr().err
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="no image in .*2 pictures of formats that are not read"):
        photos.find_images(tmp_path)
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(FileNotFoundError, match="b.heic' is a HEIC picture"):
        photos.find_images(tmp_path / "b.heic")


# folders ----------------------------------------------------------------------------------------------------------

HIDDEN = (".ipynb_checkpoints/a-checkpoint.png", ".Trash/b.jpg", "@eaDir/c.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/d.jpg",
          ".thumbnails/e.png", "$RECYCLE.BIN/f.png", ".pending-1-g.jpg", "sub/.git/h.png")


def test_hidden_and_system_folders_hold_no_photos(tmp_path, capsys):
    for name in ("a.png", "sub/b.png", *HIDDEN):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(PHOTO, "PNG"))
    (tmp_path / "._a.png").write_bytes(TWIN)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert [str(p.relative_to(tmp_path)) for p in photos.find_images(tmp_path)] == ["a.png", "sub/b.png"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{len(HIDDEN)} hidden or system files and folders" in said
    assert photos.find_images(tmp_path / ".Trash") == [tmp_path / ".Trash" / "b.jpg"]     # one that is named is read
    assert photos.find_images(tmp_path) and capsys.readouterr().err == said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A predictor."""
    path = tmp_path_factory.mktemp("predictor")
    DiT(test_predictor.SIZES).save(path)
    return path


@pytest.mark.parametrize("out", ["maps", "."])
def test_three_runs_into_the_folder_of_the_photos_predict_the_photos(folder, tmp_path, capsys, out):
    for name in ("a.png", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PHOTO.save(tmp_path / name)
    counts = []
    command = ["--checkpoint", str(folder), "--out", str(tmp_path / out), "--denoise-steps", "1"]
    for _ in range(3):
        capsys.readouterr()
        predictor.main([str(tmp_path), *command])
        said = capsys.readouterr()
        assert "2 of 2 photos" in said.out
        counts.append(re.findall(r"(\d+) pictures that this program wrote", said.err))
    assert counts == [[], ["12"], ["12"]]                                        # four maps, colours, panel of each
    names = [str(p.relative_to(tmp_path)) for p in photos.find_images(tmp_path)]    # whatever the --out of the next
    assert names == ["a.png", "sub/b.jpg"]
    assert photos.Photos(tmp_path, 8, out=tmp_path / out).names == names
    items = benchmarks.find_data(choose_benchmarks("photos")[0], tmp_path)[1]
    assert [item["name"] for item in items] == names
    filled = []

    def ask(self, rgb, pts, names, modalities):
        filled.extend(names)
        return torch.full((*pts.shape[:2], len(NAMES)), 0.5)

    judge = type("Judge", (), dict(size=16, grid=1, digest=lambda self: "x", ask=ask))()
    bank.fill_bank(tmp_path / "bank", tmp_path, judge, 2, "cpu")
    assert filled == [str(tmp_path / name) for name in names]


def test_other_pictures_of_ours_are_no_photos(tmp_path):
    PHOTO.save(tmp_path / "a.png")
    for name in ("room_rgb.png", "room_depth.png", "room_albedo.png", "run/panel.png", "run/eval/photos-surface.png",
                 "depth.png", "my_depth.png", "panel.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.save(tmp_path / name)
    (tmp_path / "run" / "report.json").write_text("{}")
    found = [str(p.relative_to(tmp_path)) for p in photos.find_images(tmp_path, tmp_path / "run")]
    assert found == ["a.png", "depth.png", "my_depth.png", "panel.png", "room_rgb.png"]     # without a sign: photos
    assert "run/panel.png" not in [str(p.relative_to(tmp_path)) for p in photos.find_images(tmp_path)]
    assert photos.find_images(tmp_path, tmp_path.parent) == photos.find_images(tmp_path)    # an --out around the photos


def test_a_photo_too_elongated_for_marigold_is_named_skipped_and_counted(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    fuzz.make_marigold(tmp_path / "model")
    (tmp_path / "in").mkdir()
    for name, size in (("a.png", (40, 24)), ("long.png", (4000, 8)), ("z.png", (40, 24))):
        Image.new("RGB", size, "red").save(tmp_path / "in" / name)
    model = str(tmp_path / "model" / "model")
    command = ["--checkpoint", model, "--out", str(tmp_path / "out"), "--denoise-steps", "1", "--processing-res", "32"]
    predictor.main([str(tmp_path / "in"), *command])
    said = capsys.readouterr()
    assert "2 of 3 photos" in said.out and "1 skipped" in said.out
    assert re.search("skipped: .*long.png.*8 x 4000 px photo, whose short side would vanish", said.err)
    one_line(lambda: predictor.main([str(tmp_path / "in" / "long.png"), *command]), "vanish", "--processing-res")


# macOS's twins ----------------------------------------------------------------------------------------------------

def add_twins(folder):
    """Put the twin of every file and folder beside it."""
    for path in sorted(folder.rglob("*")):
        path.with_name(f"._{path.name}").write_bytes(TWIN)


def test_a_twin_is_known_by_its_name():
    assert is_twin("._a") and is_twin("a/._b") and is_twin("._a/b")
    assert not any(map(is_twin, ("a", "a._b", ".a", "_.a", "a/b", "..", "./a")))


def test_files_are_found_without_twins(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.safetensors", "a.safetensors", "sub/c.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    add_twins(tmp_path)
    assert [p.name for p in find_files(tmp_path, "*.safetensors")] == ["a.safetensors", "b.safetensors"]
    assert len(find_files(tmp_path, "**/*.safetensors")) == 3


def test_photos_and_scenes_have_no_twins(tmp_path):
    write_scene(tmp_path, "room_0.cam.0", 0)
    add_twins(tmp_path)
    assert pools.list_scenes(tmp_path) == ["room_0.cam.0"]
    assert not any("._" in str(p) for p in photos.find_images(tmp_path))
    pools.scene_batch(tmp_path, 16)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("dataset", ["diode", "maw", "iiw"])
def test_a_benchmark_has_no_twins(tmp_path, dataset, kind):
    bench = official.bench_of(dataset)
    items = official.make(bench, tmp_path / "data", 1)
    (tmp_path / "data" / "._only.png").write_bytes(TWIN)
    add_twins(tmp_path / "data")
    place = tmp_path / "data"
    if kind == "tar":
        with tarfile.open(tmp_path / "data.tar", "w") as tar:
            tar.add(tmp_path / "data", ".")
        place = tmp_path / "data.tar"
    files, found, _ = benchmarks.find_data(bench, place)
    assert files.size("._only.png") == -1 and files.stamp("._only.png") is None
    assert files.index is None or not any("._" in name for name in files.index)
    there = [item for item in found if benchmarks.is_complete(files, item)]
    assert [item["name"] for item in there] == [items[0]["name"]]
    benchmarks.load_sample(bench, files, there[0])
    with pytest.raises(FileNotFoundError):
        files.read("._only.png")


# tables, and a benchmark that is gone -----------------------------------------------------------------------------

def test_a_meta_csv_from_a_spreadsheet_is_read_and_another_separator_is_named(tmp_path):
    bench = official.bench_of("maw")
    official.make(bench, tmp_path, 1)
    meta = tmp_path / "labels" / "meta.csv"
    whole = meta.read_bytes()
    want = benchmarks.find_data(bench, tmp_path)[1]
    for content in (b"\xef\xbb\xbf" + whole, whole.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + whole.strip()):
        meta.write_bytes(content)
        assert benchmarks.find_data(bench, tmp_path)[1] == want
    for separator, name in ((b";", "semicolons"), (b",", "commas"), (b"|", "bars")):
        meta.write_bytes(whole.replace(b"\t", separator))
        one_line(lambda: benchmarks.find_data(bench, tmp_path), f"separated by {name}, want tabs")
    meta.write_bytes(whole.decode().encode("utf-16"))
    one_line(lambda: benchmarks.find_data(bench, tmp_path), "UTF-8")


def test_the_page_of_a_withdrawn_data_set_says_how_to_evaluate_what_is_left(tmp_path, capsys):
    bench = official.bench_of("interiorverse")
    assert re.search(r"withdrawn most .*--limit 2672 .*PARTIAL", missing_page(bench))
    official.make(bench, tmp_path, 2)
    _, there, expected, _ = benchmark_report.open_benchmark(bench, tmp_path, 2672)
    assert len(there) == 2 and expected == 2672


def test_reading_is_the_same_whatever_stands_beside(tmp_path):
    PHOTO.save(tmp_path / "a.png")
    before = photos.Photos(tmp_path, 16).images
    add_twins(tmp_path)
    shutil.copytree(tmp_path, tmp_path / ".copy")
    assert torch.equal(photos.Photos(tmp_path, 16).images, before)
    assert io.BytesIO(TWIN).read(4) == b"\0\5\x16\7"
