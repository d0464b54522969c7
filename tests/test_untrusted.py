"""Real attacks: pickles, code beside a config, bombs, names that leave their folder, names that only look hostile."""
import functools
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import chat
import fuzz
import numpy as np
import official
import pytest
import torch
from expect import edit
from PIL import Image
from safetensors.torch import save_file

import judge
import predictor
from data import formats, photos, pictures, questions
from data.pictures import output_name
from evaluation import benchmarks
from models import lora
from models.dit import DiT, DiTConfig
from predictor import load_predictor
from runtime import files
from runtime.command import run_command

EVIL = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\nclass Evil: pass\n"


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "ran")


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code of the file ran"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A predictor of ours, an original InternVL judge, a Qwen judge."""
    root = tmp_path_factory.mktemp("tiny")
    DiT(DiTConfig(16, 8, 16, 1, 1, 2)).save(root / "predictor")
    chat.write_original(root / "original")
    chat.write_qwen(root / "qwen", "qwen3_vl")
    return root


@pytest.fixture
def copy(tiny, tmp_path):
    return lambda name: Path(shutil.copytree(tiny / name, tmp_path / name))


@pytest.fixture(autouse=True)
def usual_limit():
    yield
    files.set_max_pixels(files.PIXELS)


def refused(call, *words):
    """One line, within the fuzz test's bounds on time and memory."""
    errors = []

    def caught():
        try:
            call()
        except (ValueError, FileNotFoundError) as error:
            errors.append(str(error))
            raise
    with fuzz.bounded():
        found = fuzz.outcome(caught)
    assert found == "refused", found
    assert all(word in errors[0] for word in words), errors[0]


# pickles ----------------------------------------------------------------------------------------------------------

def test_the_payload_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_pickle_in_an_npy_is_not_opened(tmp_path, marker):
    np.save(tmp_path / "a.npy", np.array([Payload(marker)], object), allow_pickle=True)
    refused(lambda: formats.decode_npy((tmp_path / "a.npy").read_bytes(), "a.npy"), "object")
    refused(lambda: formats.read_map(formats.Files(tmp_path), "a.npy", 1), "object")


@pytest.mark.parametrize("name", ["original", "qwen"])
@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.bin", "model.pt", "model.safetensors"])
def test_a_pickled_checkpoint_of_a_judge_is_not_opened(copy, marker, name, pickled):
    folder = copy(name)
    (folder / "model.safetensors").unlink()
    torch.save({"a": Payload(marker)}, folder / pickled)
    refused(lambda: judge.load_judge(folder), "safetensors")


def test_a_pickled_predictor_or_adapter_is_not_opened(copy, tmp_path, marker):
    folder = copy("predictor")
    torch.save(Payload(marker), folder / "predictor.safetensors")
    refused(lambda: load_predictor(folder), "predictor.safetensors")
    fuzz.make_adapter(tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink(missing_ok=True)
        torch.save(Payload(marker), tmp_path / "adapter" / name)
        refused(lambda: lora.load_adapter(fuzz.linears(), tmp_path / "adapter"), "adapter_model.safetensors")


# code of others ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["original", "qwen"])
def test_code_beside_a_config_does_not_run(copy, marker, name):
    folder = copy(name)
    for module in ("evil", "tokenization_remote", "custom_generate/generate"):
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / f"{module}.py").write_text(EVIL.format(marker=str(marker)))
    auto = {k: "evil.Evil" for k in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")}
    edit(folder / "config.json", auto_map=auto | {"AutoTokenizer": ["tokenization_remote.Evil", None]},
         trust_remote_code=True)
    (folder / "generation_config.json").write_text(json.dumps(dict(custom_generate="custom_generate")))
    opened = judge.load_judge(folder)
    assert type(opened.model).__module__.startswith("transformers.models.") and "evil" not in sys.modules


def test_a_config_cannot_send_transformers_elsewhere(copy, tiny, tmp_path, marker, monkeypatch):
    """Kernels of the hub, another weights file, an adapter beside config.json that names another base."""
    want = judge.load_judge(tiny / "qwen").model.state_dict()
    folder = copy("qwen")
    torch.save({"a": Payload(marker)}, tmp_path / "evil.bin")
    config = json.loads((folder / "config.json").read_text())
    elsewhere = dict(attn_implementation="evil/kernels", _attn_implementation="evil/kernels", fusion_config=dict(a=1),
                     transformers_weights="../evil.bin")
    config |= elsewhere | dict(text_config=config["text_config"] | elsewhere,
                               vision_config=config["vision_config"] | elsewhere)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").write_text(json.dumps(dict(
        peft_type="LORA", base_model_name_or_path="evil/base", r=1, target_modules=["q_proj"])))
    opened = judge.load_judge(folder)
    got = opened.model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert "evil" not in str(opened.model.config)


def test_quantised_weights_are_refused(copy):
    folder = copy("qwen")
    edit(folder / "config.json", quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True))
    refused(lambda: judge.load_judge(folder), "quantization_config")


def test_postscript_under_the_name_of_a_photo_is_not_given_to_its_interpreter(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    refused(lambda: photos.read_rgb(tmp_path / "a.png"), "PostScript")


# bombs ------------------------------------------------------------------------------------------------------------

def png_of(width, height, body=b""):
    return (b"\x89PNG\r\n\x1a\n" + fuzz.chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + body
            + fuzz.chunk(b"IDAT", zlib.compress(bytes(100))) + fuzz.chunk(b"IEND", b""))


@functools.cache
def bombs():
    """Name -> bytes of files that announce or unfold to far more than they hold."""
    image = Image.new("L", (1600, 1600), 7)
    jpeg = fuzz.encoded(image, "JPEG", progressive=True)
    scan = jpeg.rindex(b"\xff\xda")
    profile = fuzz.chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8)))
    sof = jpeg.index(b"\xff\xc2") + 5
    return {
        "sides.png": png_of(60_000, 60_000), "line.png": png_of(2**31 - 1, 9),
        "profile.png": png_of(2**15, 2**15, profile), "chunk.png": png_of(8, 8, b"\x7f\xff\xff\xffIDAT"),
        "sides.jpg": jpeg[:sof] + b"\xff\xff\xff\xff" + jpeg[sof + 4:],
        "scans.jpg": jpeg[:-2] + 20_000 * jpeg[scan:-2] + jpeg[-2:],
        "sides.gif": b"GIF89a\xff\xff\xff\xff\0\0\0" + fuzz.encoded(Image.new("P", (9, 9)), "GIF")[13:],
        "sides.bmp": (lambda b: b[:18] + struct.pack("<ii", 2**30, 2**30) + b[26:])(fuzz.encoded(image, "BMP"))}


@pytest.mark.parametrize("name", ["sides.png", "line.png", "profile.png", "chunk.png", "sides.jpg",
                                  "scans.jpg", "sides.gif", "sides.bmp"])
def test_a_picture_that_announces_or_repeats_too_much_is_refused(tmp_path, name):
    content = bombs()[name]
    (tmp_path / name).write_bytes(content)
    assert len(content) < 4 << 20
    refused(lambda: photos.read_rgb(tmp_path / name), repr(str(tmp_path / name)))
    for decode in (formats.decode_rgb, formats.decode_gray, formats.decode_png_linear):
        refused(lambda d=decode: d(content, "here"), "here: got")


def test_a_photo_at_the_limit_stays_below_two_gigabytes(tmp_path, monkeypatch):
    """A quarter of the limit in a quarter of the memory; the process itself needs less than half a gigabyte."""
    Image.new("RGB", (5000, 4000)).save(tmp_path / "a.png", compress_level=1)
    monkeypatch.setattr(fuzz, "MEMORY", 3 * fuzz.MEMORY // 16)
    assert 4 * 5000 * 4000 == files.PIXELS
    with fuzz.bounded():
        assert fuzz.outcome(lambda: photos.read_rgb(tmp_path / "a.png")) == "valid"


def npy(header):
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header


def test_an_array_that_announces_too_much_is_refused():
    for shape in ("(1000000000000,)", "(99999, 99999, 3)", "(2147483647, 2147483647, 2147483647, 9)", "(-1,)"):
        head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        refused(lambda head=head: formats.decode_npy(npy(head) + bytes(64), "a.npy"), "a.npy: got")
    refused(lambda: formats.decode_npy(b"\x93NUMPY\x02\0\xff\xff\xff\xff{}", "a.npy"), "a.npy: got")


def test_an_exr_that_announces_too_much_is_refused():
    content = official.exr(np.ones((20, 9, 3), np.float32))
    at = content.index(b"box2i\0") + 10
    for x1, y1 in ((2**31 - 1, 30), (30_000, 30_000), (9, 2**31 - 1), (2**24, 8)):
        huge = content[:at + 8] + struct.pack("<2i", x1, y1) + content[at + 16:] + bytes(1 << 20)
        refused(lambda huge=huge: formats.decode_exr(huge, "a.exr"), "a.exr: got")


@pytest.mark.parametrize("head", [
    struct.pack("<Q", 2**63), struct.pack("<Q", 10**8) + b"{}", struct.pack("<Q", 2) + b"{}" + bytes(8),
    *(struct.pack("<Q", len(x)) + x + bytes(8) for x in (
        b'{"a":{"dtype":"F32","shape":[999999999999],"data_offsets":[0,3999999999996]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967297],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"[" * 100_000))])
def test_a_safetensors_file_with_absurd_lengths_or_offsets_is_refused(tmp_path, head):
    (tmp_path / "a.safetensors").write_bytes(head)
    refused(lambda: files.read_tensors(tmp_path / "a.safetensors"), str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("dtype, bits", [("F4", 4), ("F8_E4M3", 8), ("F8_E8M0", 8), ("F6_E2M3", 6), ("C64", 64)])
def test_a_dtype_that_torch_cannot_convert_is_refused(tmp_path, dtype, bits):
    head = json.dumps(dict(a=dict(dtype=dtype, shape=[8], data_offsets=[0, bits]))).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(bits))
    refused(lambda: files.read_tensors(path), f"{path}: got ")
    refused(lambda: files.Tensors(path), f"{path}: got ")


def test_no_memory_is_not_taken_for_damage():
    with pytest.raises(MemoryError), files.DamageGuard("a.png", "a damaged image", "a whole one"):
        raise MemoryError


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**6, b"1" * 10**6, b'"\xff"', b"{}  x", b"", b"[1]"])
def test_a_json_that_is_deep_or_no_json_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    refused(lambda: files.read_json(tmp_path / "config.json"), str(tmp_path / "config.json"))


def test_a_json_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as f:
        f.truncate(files.JSON_BYTES + 1)                                    # a hole: it takes no disk
    refused(lambda: files.read_json(tmp_path / "config.json"), "bytes of JSON")


@pytest.mark.parametrize("name, value", [("width", 10**9), ("width", 16.0), ("layers", 10**7), ("patch", 0),
                                         ("size", 10**6), ("heads", 3), ("heads", True)])
def test_sizes_of_a_predictor_are_refused_before_it_is_built(copy, name, value):
    folder = copy("predictor")
    about = json.loads((folder / "predictor.json").read_text())
    edit(folder / "predictor.json", config=about["config"] | {name: value})
    refused(lambda: load_predictor(folder), name)


@pytest.mark.parametrize("folder, part, name, value", [
    ("qwen", "text_config", "num_hidden_layers", 10**7), ("qwen", "text_config", "vocab_size", 2**24),
    ("qwen", "vision_config", "depth", 10**6), ("qwen", "text_config", "intermediate_size", 2**24),
    ("original", "llm_config", "num_hidden_layers", 10**7), ("original", "vision_config", "image_size", 10**6),
    ("original", "llm_config", "vocab_size", 2**40), ("original", "", "downsample_ratio", 1e9),
    ("original", "", "force_image_size", 10**9)])
def test_sizes_of_a_judge_are_refused_before_it_is_built(copy, folder, part, name, value):
    folder = copy(folder)
    config = json.loads((folder / "config.json").read_text())
    if name == "image_size":
        del config["force_image_size"]
    change = {name: value}
    (folder / "config.json").write_text(json.dumps(config | ({part: config[part] | change} if part else change)))
    refused(lambda: judge.load_judge(folder))
    if folder.name == "original" or value != 2**24:
        refused(lambda: judge.LazyJudge(folder))


def tar_with(path, **fields):
    """A tar whose second header has its fields overwritten, the checksum mended."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.txt", "b.txt", "c.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    b = bytearray(path.read_bytes())
    for start, value in fields.values():
        b[512 + start:512 + start + len(value)] = value
    b[512 + 148:512 + 156] = b" " * 8
    b[512 + 148:512 + 156] = b"%06o\0 " % sum(b[512:1024])
    path.write_bytes(b)
    return path


def test_a_tar_that_leads_back_to_itself_ends(tmp_path):
    back = tar_with(tmp_path / "a.tar", size=(124, b"\xff" * 10 + b"\xfc\x00"))     # a size of -1024 bytes
    refused(lambda: formats.Files(back), str(back))
    large = tar_with(tmp_path / "b.tar", size=(124, b"\x80" + bytes(3) + b"\x7f" + bytes(7)))
    refused(lambda: formats.Files(large), str(large))


# --max-pixels -----------------------------------------------------------------------------------------------------

@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 12), "red").save(tmp_path / "photos" / "a.png")
    return tmp_path / "photos" / "a.png"


def test_every_command_takes_the_pixel_cap(photo, tiny, tmp_path):
    import eval as evaluation
    from data import prepare
    from runtime.flags import parse
    point = ["--red", "1", "1", "--green", "9", "9"]
    opened = [str(photo), "--checkpoint", str(tiny / "predictor"), "--out", str(tmp_path / "o")]
    commands = [
        lambda *cap: predictor.main([*opened, *cap]),
        lambda *cap: judge.main([str(photo), *point, "--model", str(tiny / "original"), *cap]),
        lambda *cap: evaluation.main(["--dataset", "photos", "--data", str(photo.parent), "--check-data", *cap])]
    for command in commands:
        with pytest.raises(ValueError, match=r"got 20 x 12 pixels.*at most 239 pixels.*--max-pixels"):
            command("--max-pixels", "239")
        command("--max-pixels", "240")
        command()
    fuzz.scene(tmp_path / "scenes")
    with pytest.raises(ValueError, match="24 x 24 pixels.*at most 575"):
        prepare.main(["jsonl", str(tmp_path / "scenes"), str(tmp_path / "o"), "--size", "24", "--max-pixels", "575"])
    parse(["--max-pixels", "7"])
    assert files.limit["pixels"] == 7
    parse([])
    assert files.limit["pixels"] == files.PIXELS
    for main in (predictor.main, judge.main):
        with pytest.raises(SystemExit):
            main([str(photo), *point, "--max-pixels", "0"])


# names that leave their folder ------------------------------------------------------------------------------------

def test_a_jsonl_cannot_name_a_picture_outside_its_folder(tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (24, 24)).save(outside)
    root = tmp_path / "root"
    fuzz.scene(root / "scenes")
    rows = questions.build_questions(root / "scenes", 1, 24, 0)
    questions.write_jsonl(rows[:1], root / "scenes", root, 24, "q.jsonl")
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    for name in ("loop", "pool"):
        (root / name).symlink_to(root / ("pool" if name == "loop" else "loop"))
    for name in ("../outside.png", str(outside), "scenes/../../outside.png", "link.png", "folder/outside.png",
                 "a\0.png", 7, None, "loop/a.png"):
        edit(root / "q.jsonl", image=name)
        refused(lambda: questions.read_jsonl(root / "q.jsonl"), "q.jsonl' line 1", "inside")


def test_a_table_or_index_cannot_name_a_file_outside_its_folder(tmp_path):
    official.make_maw(tmp_path, 1)
    meta = tmp_path / "labels" / "meta.csv"
    whole = meta.read_text()
    meta.write_text(whole.replace("scene_0/photo_colors.npy", "../../climbed.npy"))
    refused(lambda: benchmarks.find_data(official.bench_of("maw"), tmp_path), "climbed.npy", "leaves the folder")


# names that only look hostile -------------------------------------------------------------------------------------

NAMES = ["two words.png", "naïve 写真.png", "line\nbreak.png", "tab\tquote'\"\\.png", "per%cent {x}.png", "-rf.png",
         "\u2028 separator\x85.png", os.fsdecode(b"not utf-8 \xff.png")]


@pytest.fixture
def odd_names(tmp_path):
    root = tmp_path / "odd \n写真"
    root.mkdir()
    for k, name in enumerate(NAMES):
        Image.new("RGB", (16, 16), (30 * k, 99, 7)).save(root / name, "PNG")
    (root / "loop").symlink_to(root)
    return root


def test_maps_of_photos_with_odd_names_are_written_under_their_names(odd_names, tiny, tmp_path):
    predictor.main([str(odd_names), "--checkpoint", str(tiny / "predictor"), "--out", str(tmp_path / "out \n写真")])
    found = {os.fsencode(p.name) for p in (tmp_path / "out \n写真").iterdir()}
    assert {os.fsencode(n[:-4] + "_depth.npy") for n in NAMES} <= found and len(found) == 10 * len(NAMES)


def test_photos_with_odd_names_are_judged_evaluated_and_trained_on(odd_names, tiny, tmp_path, capsys):
    import eval as evaluation
    assert sorted(photos.Photos(odd_names, 8).names) == sorted(NAMES)
    judge.main([str(odd_names), "--bank", str(tmp_path / "bank"), "--pairs", "2", "--model", str(tiny / "original")])
    assert f"{2 * len(NAMES)} pairs asked" in capsys.readouterr().out
    args = ["--dataset", "photos", "--data", str(odd_names), "--checkpoint", str(tiny / "predictor"),
            "--out", str(tmp_path)]
    for _ in range(2):
        evaluation.main(args)
        out = capsys.readouterr().out
        assert f"{len(NAMES)} images evaluated of {len(NAMES)}" in out
    assert f"{len(NAMES)} of {len(NAMES)} images are already in" in out
    evaluation.main([*args, "--panels", "2", "--json", str(tmp_path / "odd \n.json")])
    assert json.loads((tmp_path / "odd \n.json").read_text())["n"] == len(NAMES)


def test_a_bad_photo_with_an_odd_name_is_one_line(odd_names, tiny, tmp_path, capsys):
    for name in NAMES:
        (odd_names / name).write_bytes(b"junk")
    with pytest.raises(SystemExit) as stop:
        run_command(
            lambda: predictor.main([str(odd_names), "--checkpoint", str(tiny / "predictor")]), "predictor.py")
    lines = [x for x in capsys.readouterr().err.split("\n") if "cannot read" in x]
    assert stop.value.code == 2 and len(lines) == len(NAMES) and all("not an image" in x for x in lines)
    (odd_names / "gone.png").symlink_to("nowhere")
    pictures.save_png(odd_names / "good.png", np.zeros((3, 16, 16)))
    predictor.main([str(odd_names), "--checkpoint", str(tiny / "predictor"), "--out", str(tmp_path / "o")])
    assert len(list((tmp_path / "o").iterdir())) == 10


def test_scenes_with_odd_names_become_questions_and_back(tmp_path):
    for name in ("two words.0", "naïve 写真.1", "line\nbreak\u2028.2"):
        fuzz.scene(tmp_path / "scenes", name)
    rows = questions.build_questions(tmp_path / "scenes", 1, 24, 0)
    path = questions.write_jsonl(rows, tmp_path / "scenes", tmp_path / "out", 24, "q.jsonl")
    text = "\n".join(json.dumps(json.loads(line), ensure_ascii=False) for line in path.read_text().splitlines())
    path.write_text(text)                                                       # as another program may write it
    again = questions.read_jsonl(path)
    assert [(r["scene"], r["first"]) for r in again] == [(r["scene"], r["first"]) for r in rows]
    assert questions.marked_photos(again, None, 24).shape == (len(rows), 3, 24, 24)


def test_every_photo_has_maps_of_its_own():
    done = set()
    paths = ["a.jpg", "a.png", "b_a.jpg", "b/a.jpg", "b/a.png", "b_a.png",
             *(f"{'deep/' * 60}{k}.png" for k in range(3))]
    for path in map(Path, paths):
        name = output_name(path, done)
        assert len(os.fsencode(name)) < 220 and "/" not in name
        done.add(name)
    assert len(done) == len(paths) and {"a", "a_png", "b_a", "b_a_jpg", "b_a_png"} <= done


def test_a_bank_with_false_entries_asks_again(tmp_path):
    fuzz.make_bank(tmp_path)
    entry = next(p for p in tmp_path.rglob("*.safetensors") if not p.name.startswith("pack-"))
    for pts, prob in ((torch.zeros(4, 2, 2, dtype=torch.int16), torch.full((4, 4), torch.nan)),
                      (torch.full((4, 2, 2), 99, dtype=torch.int16), torch.zeros(4, 4)),
                      (torch.zeros(4, 2, 2, dtype=torch.int16), torch.zeros(9, 4))):
        save_file(dict(pts=pts, prob=prob), entry)
        fuzz.read_bank(tmp_path, entry)[0]()
