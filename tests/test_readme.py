"""README and docs: short, every link leads somewhere, every command is accepted; the README's run at toy size."""
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import chat
import official
import pytest
import test_marigold as tiny
import tiny_depth
from PIL import Image
from test_layout import LEVEL, ROOT, top
from test_train import TINY
from torch.distributed.run import get_args_parser

from data.pools import ScenePool
from evaluation import benchmarks
from models.diffusers_files import EMPTY, embed_prompts
from models.marigold import Marigold
from models.schedule import Schedule
from models.sd2 import VAE, UNet
from runtime import flags

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "RESULTS.md"]
OTHERS = ("python3 -m venv", "pip install", "python -m pytest")                 # commands that are not ours
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


# pages and their links --------------------------------------------------------------------------------------------

def test_the_readme_is_read_to_the_end():
    text = README.read_text()
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 14_000


def test_ci_finds_the_set_up_and_the_tests():
    code = re.search(r"<<'PY'\n(.*?)\nPY", (ROOT / ".ci" / "run").read_text(), re.S)[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["python3 -m venv .venv && source .venv/bin/activate",
                                  "pip install -r requirements.txt", "python -m pytest -q -n auto"]


def without_code(text):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


@functools.cache
def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", without_code(page.read_text()), re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{name}-{n}" if (n := sum(re.fullmatch(rf"{name}(-\d+)?", x) is not None for x in found))
                     else name)
    return found


def links(page):
    """(path, anchor) of every link and picture of a page that stays in the repository; "": the page itself."""
    found = re.findall(r"\]\(([^()\s]+)\)", without_code(page.read_text()))
    return [x.partition("#")[::2] for x in found if "://" not in x]


@every_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    lost = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT) or anchor and anchor not in anchors(target):
            lost.append(f"{path}#{anchor}")
    assert lost == []


def test_the_readme_leads_to_every_page_once():
    linked = [path for path, anchor in links(README) if path.endswith(".md") and not anchor]
    assert sorted(linked) == sorted(f"docs/{page.name}" for page in PAGES if page.parent.name == "docs")


# commands ---------------------------------------------------------------------------------------------------------

def commands(page):
    """The commands of a page's bash blocks as lists of words, continuation lines joined, comments dropped."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def program(words):
    """(module with a main, its arguments) of `python X.py`, `python -m X` or `torchrun ... X.py`; else None."""
    for i, word in enumerate(words):
        if word.endswith(".py") and (ROOT / word).is_file():
            return word[:-3].replace("/", "."), words[i + 1:]
        if word == "-m" and i + 1 < len(words) and top(words[i + 1]) in LEVEL:
            return words[i + 1], words[i + 2:]
    return None


SHOWN = [(page.name, words) for page in PAGES for words in commands(page)]
ADDED = {"rooms"}                 # a data set that docs/extend.md adds; test_extend.py runs its command
OURS = [(name, words) for name, words in SHOWN if program(words) and not ADDED & set(words)]
RUN = [program(words) for name, words in OURS if name == "README.md"]


class Accepted(BaseException):
    """Raised in place of what a program does after it has read its command line."""


def accept(name, argv, monkeypatch):
    """Read a command line as its program does, and stop there."""
    module = importlib.import_module(name)
    if name == "train":
        return flags.parse(argv)
    if hasattr(module, "arguments"):
        return module.arguments(argv)
    read = flags.Parser.parse_args

    def stop(parser, *args):
        read(parser, *args)
        raise Accepted
    monkeypatch.setattr(flags.Parser, "parse_args", stop)
    with pytest.raises(Accepted):
        module.main(argv)


@pytest.mark.parametrize("page, words", OURS, ids=[f"{p}: {shlex.join(w)[:60]}" for p, w in OURS])
def test_every_command_is_accepted_by_its_program(page, words, monkeypatch):
    name, argv = program(words)
    accept(name, argv, monkeypatch)                                             # exits 2 on anything it would refuse
    if words[0] == "torchrun":
        read = get_args_parser().parse_args(words[1:])
        assert read.training_script == f"{name}.py" and read.training_script_args == argv


def test_every_python_command_is_one_of_our_programs_or_known():
    other = [shlex.join(words) for _, words in SHOWN if not program(words)]
    assert [x for x in other if x.startswith(("python", "torchrun", "pip")) and not x.startswith(OTHERS)] == []


def test_the_readme_shows_how_to_train_evaluate_predict_and_ask():
    assert {name for name, _ in RUN} == {"train", "eval", "predictor", "judge"}


# the README's commands at toy size ---------------------------------------------------------------------------------

MARIGOLD, JUDGE, SIDE = "prs-eth/marigold-iid-lighting-v1-1", "adirik/InternVL2_5-4B-Intrinsic-Judge", 56
SMALL = {"train": TINY, "judge": ["--device", "cpu"],
         "predictor": ["--device", "cpu", "--denoise-steps", "1", "--processing-res", "64"],
         "eval": ["--images", "4", "--denoise-steps", "1"]}
PAPER = ["--size", SIDE, "--photos", 2, "--steps", 1, "--sample-steps", 3, "--precision", "fp32"]


def write_marigold(folder, kind):
    """A tiny random Marigold in the published layout."""
    tiny.text_parts(folder / "text")
    config = tiny.unet_config(len(tiny.TARGETS[kind])) | tiny.SMALL
    parts = tiny.fill(UNet(config)), tiny.fill(VAE(tiny.VAE_CONFIG | dict(layers_per_block=1)))
    text = embed_prompts(folder / "text", EMPTY, 12)
    Marigold(*parts, Schedule(tiny.ZERO_SNR), text, tiny.index_of(kind), folder / "text").save(folder)


@pytest.fixture(scope="module")
def place(run, tmp_path_factory):
    """A folder with what the commands name: a finished run, photos, a benchmark, tiny weights under the hub's names."""
    here = tmp_path_factory.mktemp("readme")
    shutil.copytree(run, here / "out" / "mini")
    rgb = ScenePool("wild", "val", 10, 16).all()["rgb"]
    for folder in ("photos", "coco/train2017"):
        (here / folder).mkdir(parents=True)
        for i, x in enumerate(rgb):
            Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy()).resize((90, 70)).save(here / folder / f"{i}.jpg")
    Image.open(here / "photos" / "0.jpg").resize((320, 240)).save(here / "photo.jpg")
    write_marigold(here / MARIGOLD, "lighting")
    write_marigold(here / "prs-eth/marigold-depth-v1-1", "depth")
    shutil.copytree(tiny_depth.folder("anything"), here / "depth-anything/Depth-Anything-V2-Small-hf")
    chat.write_original(here / JUDGE, size=SIDE)
    official.make(official.bench_of("eth3d"), here / "benchmarks")
    return here


@pytest.mark.parametrize("name, argv", RUN, ids=[f"{n} {shlex.join(a)[:60]}" for n, a in RUN])
def test_a_command_of_the_readme_runs(place, name, argv, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(benchmarks, "ETH3D_SIZE", (official.SIDE, official.SIDE))
    more = [*SMALL[name], *(PAPER if "paper" in argv else []), *(["--limit", "2"] if "benchmarks" in argv else [])]
    needs_data = name == "eval" and "eth3d" in argv and "--data" not in argv
    with pytest.raises(SystemExit, match="2") if needs_data else monkeypatch.context():
        importlib.import_module(name).main([*argv, *map(str, more)])
    said = capsys.readouterr()
    assert "454 images are expected" in said.err if needs_data else said.out


def test_torchrun_of_the_readme_runs_with_two_processes(place, tmp_path):
    words = next(words for page, words in OURS if page == "README.md" and words[0] == "torchrun")
    for part in ("base", "judge"):
        shutil.copytree(place / "out" / "mini" / part, tmp_path / "out" / "mini" / part)
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, *argv, *words[words.index("train.py") + 1:], *TINY], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "out/mini/grpo/metrics.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "out/mini/report.json").is_file()
