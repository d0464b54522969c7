"""formats.py: decoders give back what was written, tars are read in place, damage and foreign formats are refused."""
import io
import os
import tarfile

import numpy as np
import official
import pytest
from PIL import Image

from data import formats
from data.formats import Files
from runtime.files import decode_json

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 65536, (13, 9, 3), dtype=np.uint16)


def png(array, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


# images -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)])
def test_a_16_bit_rgb_png_keeps_all_its_bits_under_every_filter(filters):
    got = formats.decode_png_linear(official.png16(WIDE, filters), "x")
    np.testing.assert_array_equal(np.round(got * 65535), WIDE)


def test_a_16_bit_gray_and_an_8_bit_png_are_scaled_by_their_own_range():
    np.testing.assert_allclose(formats.decode_png_linear(official.png16(WIDE[..., 0]), "x"), WIDE[..., 0] / 65535,
                               rtol=1e-6)
    small = (WIDE >> 8).astype(np.uint8)
    np.testing.assert_allclose(formats.decode_png_linear(png(small), "x"), small / 255, rtol=1e-6)


@pytest.mark.parametrize("compression", [0, 2, 3])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("height", [1, 16, 37])
def test_an_exr_gives_back_its_pixels(compression, half, height):
    pixels = np.linspace(-2, 9, height * 11 * 3).reshape(height, 11, 3).astype(np.float16 if half else np.float32)
    np.testing.assert_array_equal(formats.decode_exr(official.exr(pixels, compression, half), "x"), pixels)


def test_an_exr_block_that_does_not_shrink_is_read_as_stored():
    noise = RNG.integers(0, 2**16, (16, 8, 3)).astype(np.uint16).view(np.float16)
    noise = np.where(np.isfinite(noise), noise, 0)
    np.testing.assert_array_equal(formats.decode_exr(official.exr(noise, 3, True), "x"), noise)


@pytest.mark.parametrize("change, word", [
    (lambda c: b"no" + c[2:], "no OpenEXR"), (lambda c: c[:-9], "damaged EXR"), (lambda c: c[:200], "damaged EXR"),
    (lambda c: c[:4] + b"\x02\x02\0\0" + c[8:], "tiles"),
    (lambda c: c.replace(b"compression\0compression\0\x01\0\0\0\x03", b"compression\0compression\0\x01\0\0\0\x04"),
     "compression 4")])
def test_a_foreign_or_damaged_exr_is_refused(change, word):
    content = official.exr(np.ones((20, 5, 3), np.float32))
    with pytest.raises(ValueError, match=word):
        formats.decode_exr(change(content), "x.exr")


@pytest.mark.parametrize("content, word", [
    (png(np.zeros((9, 9, 4), np.uint8)), "RGBA"), (official.png16(WIDE), "16-bit RGB"), (b"junk", "damaged"),
    (png(np.zeros((9, 9, 3), np.uint8))[:46], "damaged")],
    ids=["alpha", "wide", "junk", "cut"])
def test_a_photo_with_alpha_or_16_bits_or_damage_is_refused(content, word):
    with pytest.raises(ValueError, match=f"x.png: got .*{word}"):
        formats.decode_rgb(content, "x.png")


def test_gray_depth_keeps_16_bits_and_refuses_colour():
    np.testing.assert_array_equal(formats.decode_gray(official.png16(WIDE[..., 0]), "x"), WIDE[..., 0])
    with pytest.raises(ValueError, match="got a RGB image, want 8- or 16-bit gray"):
        formats.decode_gray(png((WIDE >> 8).astype(np.uint8)), "x")


# raw and npy ------------------------------------------------------------------------------------------------------

def test_headerless_floats_are_little_endian_rows():
    depth = np.arange(6, dtype="<f4").reshape(2, 3)
    np.testing.assert_array_equal(formats.decode_floats(depth.tobytes(), "x", (2, 3)), depth)


@pytest.mark.parametrize("extra", [-1, 1, 4])
def test_a_wrong_byte_count_is_refused_with_both_counts(extra):
    with pytest.raises(ValueError, match=f"X.JPG: got {24 + extra} bytes, want 24 "):
        formats.decode_floats(b"\0" * (24 + extra), "X.JPG", (2, 3))


@pytest.mark.parametrize("header", [
    "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000000000000,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-5,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': ((((((,), }", "\"\"\" {[", "(" * 3000,
    "{'descr': 5, 'fortran_order': False, 'shape': (5,), }", "{'descr': {}, 'fortran_order': False, 'shape': (5,), }",
    "{1: 2, 'descr': '<f8', 'fortran_order': False, 'shape': (5,), }"])
def test_an_npy_header_that_lies_or_is_none_is_refused(header):
    head = header.encode() + b"\n"
    with pytest.raises(ValueError, match="x.npy: got"):
        formats.decode_npy(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + b"0" * 16, "x.npy")


@pytest.mark.parametrize("array", [np.asfortranarray(WIDE), WIDE.astype(">f4"), WIDE[:, ::2], np.float64(3),
                                   np.zeros((0, 3))])
def test_an_npy_gives_back_its_array(array):
    np.save(buffer := io.BytesIO(), array)
    np.testing.assert_array_equal(formats.decode_npy(buffer.getvalue(), "x"), array)


@pytest.mark.parametrize("content", [b"PK\x03\x04junk", b"[" * 100_000])
def test_an_archive_or_a_deep_json_is_refused(content):
    for decode in (formats.decode_npy, decode_json):
        with pytest.raises(ValueError, match="x: got"):
            decode(content, "x")


def test_no_byte_of_an_exr_can_be_changed_into_anything_but_a_refusal_or_pixels():
    content, rng = official.exr(RNG.random((20, 9, 3)).astype(np.float32)), np.random.default_rng(1)
    for _ in range(600):
        other = bytearray(content)
        for place in rng.integers(0, 420, 3):
            other[place] = rng.integers(0, 256)
        try:
            formats.decode_exr(bytes(other), "x")
        except ValueError as error:
            assert str(error).startswith("x: got")


def test_a_transparent_colour_is_alpha_and_wide_integers_are_no_labels():
    Image.new("RGB", (9, 9)).save(buffer := io.BytesIO(), "PNG", transparency=(0, 0, 0))
    with pytest.raises(ValueError, match="RGB image with a transparent colour"):
        formats.decode_rgb(buffer.getvalue(), "x")
    Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(buffer := io.BytesIO(), "TIFF")
    with pytest.raises(ValueError, match="70000"):
        formats.decode_gray(buffer.getvalue(), "x")


def test_pickled_and_damaged_npy_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], object), allow_pickle=True)
    for content in (buffer.getvalue(), b"\x93NUMPY\x01\x00", b""):
        with pytest.raises(ValueError, match="x.npy: got"):
            formats.decode_npy(content, "x.npy")


# folder or tar ----------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/one.bin").write_bytes(b"first")
    (tmp_path / "data/two.bin").write_bytes(b"second" * 1000)
    return tmp_path / "data"


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_tar_reads_as_the_folder_it_was_made_from(folder, tmp_path, prefix):
    tar = Files(official.tar_of(folder, tmp_path / "t.tar", prefix))
    for name in ("a/one.bin", "two.bin", "./two.bin", "none.bin"):
        assert tar.size(name) == Files(folder).size(name)
    assert tar.read("two.bin") == b"second" * 1000 and tar.under("a").read("one.bin") == b"first"
    with pytest.raises(FileNotFoundError, match="none.bin"):
        tar.read("none.bin")


def test_members_that_climb_or_link_do_not_exist_and_nothing_is_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("keep out")
    inside = tmp_path / "inside"
    inside.mkdir()
    with tarfile.open(inside / "evil.tar", "w") as tar:
        for name in ("../climbed.txt", "/absolute.txt", "a/../../climbed.txt", "good.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
        for name, kind in (("soft.txt", tarfile.SYMTYPE), ("hard.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    before = sorted(p for p in tmp_path.rglob("*"))
    files = Files(inside / "evil.tar")
    assert list(files.index) == ["good.txt"] and files.read("good.txt") == b"text"
    for name in ("soft.txt", "hard.txt"):
        with pytest.raises(FileNotFoundError):
            files.read(name)
    for name in ("../climbed.txt", "/absolute.txt", "a/../../climbed.txt"):
        with pytest.raises(ValueError, match="leaves the folder"):
            files.read(name)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_folder_is_not_left_by_name(folder):
    (folder.parent / "outside").write_text("x")
    with pytest.raises(ValueError, match="leaves the folder"):
        Files(folder).read("../outside")


def test_a_compressed_or_cut_off_tar_is_refused(folder, tmp_path):
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as tar:
        tar.add(folder / "two.bin", "two.bin")
    with pytest.raises(ValueError, match="uncompressed .tar"):
        Files(tmp_path / "t.tar.gz")
    path = official.tar_of(folder, tmp_path / "t.tar")
    files = Files(path)
    os.truncate(path, files.index["two.bin"][0] + 10)
    with pytest.raises(ValueError, match="10 bytes before the tar ends, want 6000"):
        files.read("two.bin")


def test_a_missing_path_is_refused():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Files("nowhere")
