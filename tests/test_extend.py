"""docs/extend.md as the page prints it: a user's predictor, judge and benchmark, in a copy of the project."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rooms
import torch
from PIL import Image
from safetensors import safe_open

import train
from predictor import load_predictor
from runtime.files import read_log

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text()
TOY = {
    "train.py": "--size 32 --steps 2 --photos 4 --pairs 8 --bank-pairs 8 --group 2 --batch 2 --sample-steps 3 "
                "--eval-images 2 --eval-steps 2 --eval-every 1 --save-every 1",
    "predictor.py": "--device cpu", "judge.py": "--device cpu", "eval.py": "--pairs 2"}
# of a ramp from black to white, at every 64th pixel from 16 on: the published ONNX graph by onnxruntime 1.32
METRES = ((1.0994, 1.0352, 1.0000, 0.9879),
          (1.2011, 1.0840, 1.0245, 0.9888),
          (1.2325, 1.2289, 1.1273, 0.9762),
          (1.2458, 1.2477, 1.1957, 1.0719))
RUNNER = """
import sys, json, importlib
for line in json.load(open(sys.argv[1])):
    print("$", *line, flush=True)
    sys.argv = line
    importlib.import_module(line[0].removesuffix(".py")).main(line[1:])
"""


def blocks(kind):
    """Fenced blocks of the page in a language."""
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S)


def command_lines(text):
    """The command lines of a bash block with the toy flags of their program: lists of words."""
    lines = [shlex.split(line)[1:] for line in text.splitlines()]
    return [[*words, *TOY[words[0]].split()] for words in lines]


def picture(path, size=(40, 40), seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)).save(path)


def run_lines(folder, lines):
    """Run command lines in one fresh process, in a folder; returns what they print."""
    (folder / "lines.json").write_text(json.dumps(lines))
    (folder / "runner.py").write_text(RUNNER)
    done = subprocess.run([sys.executable, "runner.py", "lines.json"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the page's files and edits, photos, scenes and the benchmark's images."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("kernels", "runtime", "data", "models", "evaluation"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    row, about = "", ""
    for block in blocks("python"):
        head, _, code = block.partition("\n")
        if re.fullmatch(r"# my_\w+\.py", head):
            (folder / head[2:]).write_text(block)
        elif head == "# evaluation/benchmark_table.py":
            row = code
        elif head == "# evaluation/benchmark_table.py, ABOUT":
            about = code
    table = folder / "evaluation" / "benchmark_table.py"
    text = table.read_text()
    text = text.replace("\n)\nDATASETS", f"\n{row})\nDATASETS").replace("\n}\nABOUT[", f"\n{about}}}\nABOUT[")
    table.write_text(text)
    listed, = blocks("text")
    (folder / "evaluation" / "lists" / "rooms.txt").write_text(listed)
    for name in ("photos", "rooms"):
        (folder / name).mkdir()
    for i in range(12):
        picture(folder / "photos" / f"{i}.jpg", seed=i)
    picture(folder / "photo.jpg")
    for name in ("0001", "0002"):
        picture(folder / "rooms" / f"{name}_rgb.png")
        depth = np.random.default_rng(1).integers(500, 5000, (40, 40)).astype(np.uint16)
        Image.fromarray(depth).save(folder / "rooms" / f"{name}_depth.png")
    for i in range(2):
        rooms.write_scene(folder / "scenes", f"room{i}.0", seed=i)
    return folder


@pytest.fixture(scope="module")
def printed(project):
    """What the page's commands print."""
    predictor, judge = blocks("bash")[:2]
    return run_lines(project, command_lines(predictor) + command_lines(judge))


def test_a_predictor_of_the_page_is_tuned_saved_opened_and_scored(project, printed):
    result = project / "out" / "mine" / "photos"
    about = json.loads((result / "predictor.json").read_text())
    assert about["architecture"] == "own" and about["made_by"] == "my_depth:Depth"
    with safe_open(result / "predictor.safetensors", "pt") as f:
        assert "net.0.weight" in f.keys()  # noqa: SIM118
    log = read_log(result / "metrics.jsonl")
    assert all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 and row["policy/gap"] == 0 for row in log)
    assert log[0]["grad/norm"] > 0 and "reward/depth" in log[0] and "reward/albedo" not in log[0]
    depth = np.load(project / "out" / "maps" / "photo_depth.npy")
    assert depth.shape == (1, 40, 40) and np.isfinite(depth).all()
    assert "rooms, depth: 2 images evaluated of 2 expected" in printed and "AbsRel" in printed


FASTDEPTH = ROOT.parent / "shared" / "data" / "fastdepth" / "fastdepth_folded.npz"


@pytest.mark.skipif(not FASTDEPTH.is_file(), reason="shared data is absent")
def test_the_worked_example_is_the_published_network_and_is_tuned_on_maps(tmp_path, monkeypatch):
    code, = (b for b in blocks("python") if b.startswith("# my_fastdepth.py"))
    (tmp_path / "my_fastdepth.py").write_text(code)
    shutil.copy(FASTDEPTH, tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "maps").mkdir()
    for i in range(10):
        picture(tmp_path / "photos" / f"{i}.jpg", seed=i)
        np.save(tmp_path / "maps" / f"{i}_depth.npy", np.tile(np.arange(1, 33, dtype=np.float32), (32, 1)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = load_predictor("my_fastdepth:FastDepth")
    assert sum(p.numel() for p in network.parameters()) == 1_352_225
    ramp = torch.linspace(0, 1, 224).expand(1, 3, 224, 224)
    with torch.no_grad():
        metres = network.network.predict(ramp, "depth")[0, 0, 16::64, 16::64]
    torch.testing.assert_close(metres, torch.tensor(METRES), atol=1e-4, rtol=0)
    train.main([*command_lines(blocks("bash")[2].splitlines()[0])[0][1:], "--replay", "0"])
    log = read_log(tmp_path / "out" / "fast" / "photos" / "metrics.jsonl")
    assert all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 for row in log) and log[0]["grad/norm"] > 0


def test_a_judge_of_the_page_answers_fills_a_bank_and_is_scored(printed):
    assert "depth: Based on visual depth cues in the image, the red point appears closer" in printed
    assert "bank: 192 pairs asked, 0 already known" in printed
    assert re.search(r"depth +lower pixel is closer +4 +0", printed)
    assert not re.search(r"albedo +close chromaticity", printed)               # asked of none, in no figure


def test_the_flow_network_of_the_page_is_tuned_too(project):
    """Two modalities of one network, LoRA and a resumed run; the page's own command with another class."""
    words = command_lines(blocks("bash")[0].splitlines()[0])[0]
    words[words.index("my_depth:Depth")] = "my_flow:Flow"
    words[words.index("out/mine")] = "out/flow"
    printed = run_lines(project, [[*words, "--stop-at", "1"], words])
    log = read_log(project / "out" / "flow" / "photos" / "metrics.jsonl")
    assert [row["step"] for row in log] == [0, 1] and all(row["policy/ratio_max"] == 1 for row in log)
    assert {"reward/depth", "reward/normal"} <= log[0].keys()
    assert "already known" in printed
