"""train.py --stage judge with --scenes: adapters learn, resume, merge, export; any number of processes."""
import json
from pathlib import Path

import chat
import faults
import pytest
import torch
from rooms import write_scene
from safetensors.torch import load_file

import judge as judging
import train
from data import questions
from judge import load_judge
from models.finetune import LORA_TARGETS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny judge in the original format and six scenes."""
    path = tmp_path_factory.mktemp("tune")
    chat.write_original(path / "base", size=56)
    for i in range(6):
        write_scene(path / "scenes", f"room_{i}", i)
    return path


def flags(place, out, *more):
    return ["--stage", "judge", "--preset", "paper", "--scenes", str(place / "scenes"), "--judge", str(place / "base"),
            "--size", "56", "--out", str(out), "--judge-passes", "2", "--device", "cpu",
            "--judge-batch", "8", "--micro", "4", "--judge-lr", "3e-2", *more]


@pytest.fixture(scope="module")
def tuned(place):
    train.main(flags(place, place / "one"))
    return place / "one" / "judge"


def adapter(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def test_the_loss_falls_and_only_adapters_are_kept(tuned, place):
    rows = [json.loads(x) for x in (tuned / "metrics.jsonl").read_text().splitlines()]
    third = len(rows) // 3
    mean = lambda part: sum(r["loss"] for r in part) / len(part)                # noqa: E731
    assert mean(rows[-third:]) < 0.9 * mean(rows[:third])
    kept = load_file(tuned / "checkpoint.safetensors")
    assert all(".lora_" in k.replace("|", ".") or k.startswith("opt0/") for k in kept)


def test_the_export_is_the_base_plus_the_adapter(tuned, place):
    images = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    merged, peft, base = (load_judge(p) for p in (tuned, tuned / "adapter", place / "base"))
    for m in ("depth", "albedo"):
        assert (merged.score(images, m) - peft.score(images, m)).abs().max() < 1e-5
    assert (merged.score(images, "depth") - base.score(images, "depth")).abs().max() > 1e-3
    about = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["lora_dropout"], about["peft_type"]) == (16, 32.0, 0.05, "LORA")
    assert judging.LazyJudge(tuned / "adapter").digest() == load_judge(tuned / "adapter").digest()


def test_a_stopped_run_resumes_to_the_same_weights(tuned, place):
    out = place / "stopped"
    train.main(flags(place, out, "--stop-at", "3"))
    assert not (out / "judge" / "model.safetensors").exists()
    train.main(flags(place, out))
    a, b = adapter(tuned), adapter(out / "judge")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_take_the_same_steps(tuned, place):
    """Bit for bit apart from the order in which gradients are added."""
    done = faults.ranks(2, "train", flags(place, place / "two", ), place / "log")
    assert done == [0, 0], (place / "log.0").read_text()[-2000:]
    a, b = adapter(tuned), adapter(place / "two" / "judge")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_json_lines_can_be_trained_on(place, tmp_path):
    rows = questions.build_questions(place / "scenes", 1, 56, 0)
    path = questions.write_jsonl(rows[:8], place / "scenes", tmp_path / "lines", 56, questions.JSONL["train"])
    train.main(flags(place, tmp_path / "run", "--scenes", str(path), "--judge-passes", "1"))
    assert (tmp_path / "run" / "judge" / "model.safetensors").is_file()


@pytest.mark.parametrize("argv, words", [
    (["--stage", "judge", "--judge", "X"], "both --judge MODEL"),
    (["--stage", "judge", "--scenes", "X"], "both --judge MODEL"),
    (["--stage", "judge", "--preset", "paper"], "InternVL2_5-4B"), (["--scenes", "X"], "only --stage judge"),
    (["--stage", "judge", "--scenes", "X", "--judge", "Y", "--micro", "5"], "--micro 5")])
def test_settings_of_tuning_that_do_not_add_up_are_refused(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_the_paper_preset_is_the_judge_release():
    from models import finetune
    from runtime.config import MICRO
    from runtime.flags import parse
    cfg = parse(["--stage", "judge", "--preset", "paper", "--scenes", "DIR", "--judge", "MODEL"])[1]
    want = dict(judge_lr=4e-5, judge_batch=16, judge_passes=5.0, size=512)
    assert {k: getattr(cfg, k) for k in want} == want
    assert (finetune.RANK, finetune.ALPHA, finetune.DROPOUT, finetune.WARMUP, MICRO) == (16, 32.0, 0.05, 0.03, 4)
    assert sorted(LORA_TARGETS) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
