"""Folders written by an earlier version still open, and give the numbers that they gave then."""
import shutil
from pathlib import Path

import pytest
import test_train
import torch
from expect import seeded
from safetensors.torch import load_file

import train
from data.bank import Bank
from judge import load_judge
from predictor import load_predictor, predict_photo
from runtime.config import UserError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "expected.safetensors")


@pytest.mark.parametrize("name, size", [("predictor", (16, 16)), ("marigold", (48, 40))])
def test_a_predictor_gives_the_same_maps(expected, name, size):
    policy = load_predictor(FIXTURES / name)
    maps = predict_photo(policy, torch.rand(3, *size, generator=seeded(0)), steps=2)
    assert {f"{name}/{m}" for m in maps} == {k for k in expected if k.startswith(f"{name}/")}
    for m, value in maps.items():
        torch.testing.assert_close(value, expected[f"{name}/{m}"], rtol=0, atol=1e-4)


def test_a_judge_gives_the_same_answers(expected):
    rgb = torch.rand(3, 16, 16, generator=seeded(0))
    pts = torch.tensor([[[[2, 2], [10, 6]], [[6, 14], [2, 6]]]])
    answers = load_judge(FIXTURES / "judge").ask(rgb[None], pts)
    torch.testing.assert_close(answers, expected["judge/ask"], rtol=0, atol=1e-5)


def test_a_bank_is_found_and_nothing_is_asked_again(expected, tmp_path):
    class Silent:
        def __init__(self, judge):
            self.size, self.grid, self.digest = judge.size, judge.grid, judge.digest

    folder = shutil.copytree(FIXTURES / "bank", tmp_path / "bank")
    bank = Bank(folder, Silent(load_judge(FIXTURES / "judge")))
    pts, prob = bank.fill(expected["bank/photos"], 16)
    assert bank.asked == 0 and torch.equal(pts, expected["bank/pts"]) and torch.equal(prob, expected["bank/prob"])


def test_judgements_of_one_question_alone_are_nan_elsewhere(expected):
    judge = load_judge(FIXTURES / "judge")
    rgb = torch.rand(1, 3, 16, 16, generator=seeded(0))
    pts = torch.tensor([[[[2, 2], [10, 6]], [[6, 14], [2, 6]]]])
    some = judge.ask(rgb, pts, modalities=("depth", "irradiance"))
    assert some[..., 1:3].isnan().all()
    torch.testing.assert_close(some[..., [0, 3]], judge.ask(rgb, pts)[..., [0, 3]], rtol=0, atol=1e-5)


def test_a_half_done_run_is_refused_in_one_line(tmp_path, monkeypatch):
    """Its settings have other names: it could only go on as another run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "predictor", "run/base")
    shutil.copytree(FIXTURES / "judge", "run/judge")
    shutil.copytree(FIXTURES / "half", "half")
    flags = [*test_train.TINY, "--width", "16", "--judge-width", "16", "--precision", "fp32", "--out", "half",
             "--stage", "grpo", "--policy", "run/base", "--judge", "run/judge", "--bank", str(FIXTURES / "bank")]
    before = (tmp_path / "half/grpo/checkpoint.safetensors").read_bytes()
    with pytest.raises(UserError, match="half/grpo holds a run with other settings .*use another --out") as caught:
        train.main(flags)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "half/grpo/checkpoint.safetensors").read_bytes() == before
