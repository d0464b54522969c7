"""orders.py: exchanging the colours exchanges the answer, the mean hides no preference, banks keep both orders."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import judge as judging
from data.album import judgements
from data.bank import Bank
from data.oracle import Oracle
from data.orders import BothOrders, OtherOrder, open_bank
from evaluation.scores import device_of
from judge import LazyJudge, load_judge
from relations import MODALITIES, NAMES
from runtime.flags import parse

FIXTURE = Path(__file__).parent / "fixtures" / "judge"
LEAN = 0.1                        # of probability, by which Leaning prefers the first answer
YES_NO = torch.tensor([row.yes_no for row in MODALITIES.values()])


class Leaning:
    """Knows that what is lower is closer, leans to the first answer, and knows nothing about normals."""

    size, grid = 32, 4

    def __init__(self):
        self.pairs = 0

    def digest(self):
        return "leaning"

    def ask(self, rgb, pts, names=None, modalities=None):
        self.pairs += pts.shape[1]
        lower = (pts[..., 0, 0] - pts[..., 1, 0]).sign() * 0.3
        prob = torch.where(YES_NO, lower.abs()[..., None], lower[..., None]) + 0.5 + LEAN
        return prob.masked_fill(torch.tensor([m == "normal" or m not in (modalities or NAMES) for m in NAMES]),
                                torch.nan)


class Silent(Leaning):
    """Leaning, when nothing may be asked."""

    def ask(self, *question):
        pytest.fail("asked")


@pytest.fixture
def photos():
    return torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def pairs():
    rng = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 16, 16, generator=rng), torch.randint(0, 16, (2, 5, 2, 2), generator=rng)


def test_the_mean_is_blind_to_a_preference_and_the_difference_is_twice_the_preference():
    pts = torch.randint(0, 32, (2, 9, 2, 2), generator=torch.Generator().manual_seed(0))
    both = BothOrders(Leaning())
    depth, normal, albedo, _ = both.ask(None, pts).unbind(-1)
    lower = (pts[..., 0, 0] - pts[..., 1, 0]).sign() * 0.3
    torch.testing.assert_close(depth, 0.5 + lower)
    torch.testing.assert_close(albedo, 0.5 + lower.abs() + LEAN)                # to "yes": no order can show that
    assert normal.isnan().all() and (both.size, both.grid) == (32, 4)
    p, q = (one.ask(None, pts) for one in both.orders)
    torch.testing.assert_close((p - q)[..., 0], torch.full(pts.shape[:2], 2 * LEAN))
    assert both.ask(None, pts, modalities=("albedo",))[..., 0].isnan().all()
    assert len({one.digest() for one in (both, *both.orders)}) == 3


@pytest.mark.parametrize("opener", [load_judge, LazyJudge])
def test_exchanging_the_points_exchanges_the_answer_of_both_orders(opener, pairs):
    """Of a vision-language model, whose own answers do not do that."""
    judge = opener(FIXTURE)
    rgb, pts = pairs
    both = BothOrders(judge)
    one, other = both.ask(rgb, pts), both.ask(rgb, pts.flip(-2))
    torch.testing.assert_close(other, torch.where(YES_NO, one, 1 - one))
    raw, swapped = judge.ask(rgb, pts), judge.ask(rgb, pts.flip(-2))
    torch.testing.assert_close(one, (raw + torch.where(YES_NO, swapped, 1 - swapped)) / 2)
    assert (raw - one).abs().max() > 1e-4


def test_the_wrapper_lies_where_its_judge_lies():
    assert device_of(BothOrders(load_judge(FIXTURE))) == torch.device("cpu") == device_of(BothOrders(Leaning()))
    judge = load_judge(FIXTURE)
    assert len(list(BothOrders(judge).parameters())) == len(list(judge.parameters()))


def test_a_judge_that_reads_names_gets_them(pairs):
    maps = dict(depth=torch.rand(2, 1, 16, 16), normal=torch.ones(2, 3, 16, 16), albedo=torch.ones(2, 3, 16, 16),
                irradiance=torch.ones(2, 3, 16, 16), mask=torch.ones(2, 1, 16, 16, dtype=torch.bool))
    prob = BothOrders(Oracle(maps, torch.Generator().manual_seed(0))).ask(*pairs, names=["wild 0", "wild 1"])
    assert prob.isfinite().all()


# banks ------------------------------------------------------------------------------------------------------------

def test_the_bank_keeps_both_orders_and_a_later_run_tells_the_same_bias_without_asking(tmp_path, photos):
    bank = open_bank(tmp_path, Leaning(), True)
    pts, prob = bank.fill(photos, 8)
    torch.testing.assert_close(prob[..., 0], 0.5 + (pts[..., 0, 0] - pts[..., 1, 0]).sign() * 0.3)
    assert bank.describe().startswith("80 pairs asked, 0 already known") and prob[..., 1].isnan().all()
    n, mean, size = bank.bias()["depth"]
    assert n == 40 and abs(mean - 2 * LEAN) < 1e-6 and abs(size - 2 * LEAN) < 1e-6
    assert bank.bias()["albedo"][1:] == (0, 0) and "normal" not in bank.bias()
    again = open_bank(tmp_path, Silent(), True)
    assert torch.equal(again.fill(photos, 8)[1].nan_to_num(-1), prob.nan_to_num(-1)) and again.bias() == bank.bias()
    assert again.describe().startswith("0 pairs asked, 80 already known") and "depth +0.200, 0.200 (40)" in (
        again.describe())


def test_a_bank_of_one_order_serves_as_the_first(tmp_path, photos):
    Bank(tmp_path, Leaning()).fill(photos, 8)
    judge = Leaning()
    bank = open_bank(tmp_path, judge, True)
    assert bank.bias() == {} and bank.describe().endswith("not known")
    bank.fill(photos, 6)
    assert "30 pairs asked, 30 already known" in bank.describe()
    assert judge.pairs == 30 and bank.bias()["depth"][0] == 30


def test_a_half_filled_bank_tells_the_bias_of_what_both_orders_know(tmp_path, photos):
    """A killed fill leaves photos and pairs with one order; packs and single files count alike."""
    bank = open_bank(tmp_path, Leaning(), True)
    first, other = bank.banks
    first.fill(photos, 12)
    first.pack()
    other.fill(photos[:3], 8)
    assert bank.bias()["depth"][0] == 24
    assert bank.fill(photos, 12)[1].shape == (5, 12, 4) and bank.bias()["depth"][0] == 60


# commands ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    return path


def test_the_command_says_both_answers_and_their_mean(photo, capsys):
    given = [str(photo), "--red", "3", "4", "--green", "15", "12", "--model", str(FIXTURE), "--all"]
    judging.main(given)
    one = capsys.readouterr().out.splitlines()
    judging.main([*given, "--both-orders"])
    said = capsys.readouterr().out.splitlines()
    assert len(one) == len(said) == 4
    for before, line in zip(one, said, strict=True):
        mean, p, q = (float(x) for x in (line.split("(p = ")[1].split(";")[0], *line.split("; ")[1].replace(
            " with", " as marked, ").split(" as marked, ")[:2]))
        assert abs(mean - (p + q) / 2) < 2e-3 and "colour bias" in line and "colour bias" not in before
        first = float(before.split("(p = ")[1].rstrip(")"))
        assert abs(p - first) < 2e-3 or abs(p - (1 - first)) < 2e-3


def test_the_command_fills_both_banks_and_reports_the_bias_again(photo, tmp_path, capsys):
    command = [str(photo.parent), "--bank", str(tmp_path / "bank"), "--pairs", "4", "--model", str(FIXTURE)]
    judging.main(command)
    assert "bank: 4 pairs asked, 0 already known; " in capsys.readouterr().out
    lines = []
    for counts in ("4 pairs asked, 4 already known", "0 pairs asked, 8 already known"):
        judging.main([*command, "--both-orders"])
        lines.append(capsys.readouterr().out.splitlines()[-1])
        assert counts in lines[-1] and all(f"{m} " in lines[-1] for m in NAMES)
    assert lines[0].partition("colour bias")[2] == lines[1].partition("colour bias")[2] != ""


def test_training_learns_from_the_mean_of_both_orders(tmp_path, capsys):
    flags = ["--size", "16", "--out", str(tmp_path / "run"), "--bank-pairs", "4", "--pairs", "4", "--photos", "1"]
    both, one = (judgements(parse([*flags, *more])[1], load_judge(FIXTURE), "cpu", NAMES)[0]
                 for more in (["--both-orders"], []))
    assert "colour bias" in capsys.readouterr().out
    want = BothOrders(load_judge(FIXTURE)).ask(both.rgb.float() / 255, both.pts)
    torch.testing.assert_close(both.prob, want)
    torch.testing.assert_close(one.prob, OtherOrder(OtherOrder(load_judge(FIXTURE))).ask(one.rgb / 255, one.pts))


def test_a_run_may_not_go_on_in_another_number_of_orders():
    from runtime.config import fixed_settings
    assert fixed_settings(parse(["--both-orders"])[1], "grpo")["both_orders"] is True


def test_an_oracle_prefers_no_colour(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--stage", "grpo", "--judge", "oracle", "--both-orders"])
    assert stop.value.code == 2 and "prefers no colour" in capsys.readouterr().err
