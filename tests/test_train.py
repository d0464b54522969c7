"""train.py end to end at toy size: resume, seeds, the ratio, the log, photos of one's own, refusals, two processes.

`tiny_run` trains one complete run folder per session; test_eval.py uses it too.
"""
import functools
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from expect import equal, seeded, strict
from one_step import batch_of
from PIL import Image
from safetensors.torch import load_file

import grpo
import predictor
import train
from bench import baselines
from data import questions
from data.oracle import PAPER_ACCURACY, Oracle
from data.pools import ScenePool
from models.copies import frozen_copy, keep_in_bf16
from models.dit import DiT, DiTConfig
from relations import MODALITIES, sample_pairs
from runtime import ranks
from runtime import run as running
from runtime.command import run_command
from runtime.config import UserError
from runtime.flags import parse
from runtime.optimizers import optimizers, state_tensors
from runtime.run import NotFinite, Run

ROOT = Path(__file__).resolve().parents[1]
NAMES = list(MODALITIES)
TINY = """--device cpu --size 16 --width 32 --heads 2 --encoder-layers 1 --layers 1 --patch 4
    --judge-patch 4 --judge-width 32 --judge-heads 2 --judge-vision-layers 1 --judge-text-layers 1 --base-scenes 32
    --base-steps 4 --base-batch 4 --judge-scenes 32 --judge-steps 4 --judge-warm 0.5 --judge-batch 4 --photos 4
    --pairs 8 --bank-pairs 16 --group 4 --sample-steps 4 --steps 4 --batch 2
    --eval-images 4 --eval-steps 2 --eval-every 2 --save-every 2""".split()


def go(out, *extra):
    """Run train.py in this process."""
    train.main([*TINY, "--out", str(out), *map(str, extra)])


@functools.cache
def tiny_run(root):
    """A complete toy run under a folder: OUT/base, judge, bank, grpo, report.json, report.html, panel.png."""
    out = Path(root) / "tiny_run"
    go(out)
    return out


def parts(run):
    """Flags that let a GRPO stage start from the toy run's predictor, judge and bank."""
    return ["--stage", "grpo", "--policy", run / "base", "--judge", run / "judge", "--bank", run / "bank"]


def weights(folder):
    """Every tensor a stage wrote: its checkpoint, and the weights it hands on."""
    return {f"{p.name}/{k}": v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def log(folder):
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, *argv):
    """stderr of a train.py command that must exit with 2 and one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: train.main(list(map(str, argv))), "train.py")
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("train.py: ")
    return lines[0]


# a whole run ------------------------------------------------------------------------------------------------------

def test_one_command_leaves_every_part(run):
    for name in ("base/predictor.safetensors", "judge/model.safetensors", "judge/tokenizer.json",
                 "grpo/predictor.safetensors", "base/metrics.jsonl", "judge/metrics.jsonl",
                 "grpo/metrics.jsonl", "report.json", "panel.png", "panel.safetensors", "mistakes.safetensors",
                 "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert not list(run.rglob("*.part")) and len(list((run / "bank").rglob("*.safetensors"))) == 4


@pytest.mark.parametrize("stage", ["base", "judge", "grpo"])
def test_every_stage_keeps_its_settings_seed_command_and_versions(run, stage):
    found = [strict(p.read_text()) for p in (run / stage).glob("*.json")]
    about = next((x for x in found if "settings" in x), None)
    assert about is not None, "no json in the folder holds the settings of the run"
    assert about["seed"] == 0 and about["torch"] == torch.__version__ and "command" in about and "commit" in about


def test_the_report_has_the_three_domains_before_and_after(run):
    report = strict((run / "report.json").read_text())
    assert [t["dataset"] for t in report["tables"]] == ["wild", "synthetic", "broad"]
    for t in report["tables"]:
        assert t["n"] == 4 and all({"base", "x", "change", "low", "high"} <= set(row) for row in t["metrics"].values())
        asked = {f"{who}/{m}" for who in ("judge", "predictor", "heuristic") for m in NAMES}
        assert set(t.get("judge", ())) == (set() if t["dataset"] == "synthetic" else asked)


def test_running_a_finished_run_again_changes_nothing(run):
    def content():
        return {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != "report.json"}
    before, tables = content(), strict((run / "report.json").read_text())["tables"]
    go(run)
    assert content() == before and strict((run / "report.json").read_text())["tables"] == tables


# resume and seeds -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["base", "judge", "grpo"])
def test_stopping_after_two_steps_and_resuming_is_bitwise_the_whole_run(run, tmp_path, stage):
    flags = parts(run) if stage == "grpo" else ["--stage", stage]
    go(tmp_path, *flags, "--stop-at", 2)
    assert len(log(tmp_path / stage)) == 2 and not list((tmp_path / stage).glob("[pm]*.safetensors"))
    go(tmp_path, *flags, "--stop-at", 4)                                        # 4 is the end; no report
    assert equal(weights(run / stage), weights(tmp_path / stage))
    ours, theirs = log(run / stage), log(tmp_path / stage)
    for row in ours + theirs:
        row.pop("seconds")
        row.pop("time/step", None)
    assert ours == theirs


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run, tmp_path):
    go(tmp_path / "same", "--stage", "base")
    go(tmp_path / "other", "--stage", "base", "--seed", 1)
    assert equal(weights(run / "base"), weights(tmp_path / "same" / "base"))
    ours, others = (load_file(p / "base" / "predictor.safetensors") for p in (run, tmp_path / "other"))
    assert ours.keys() == others.keys() and not torch.equal(ours["x_in.weight"], others["x_in.weight"])


def test_a_run_does_not_resume_with_another_seed(run, capsys):
    assert "seed" in refused(capsys, *TINY, "--out", run, "--stage", "base", "--seed", 1)


def test_a_changed_setting_is_refused_by_name(run, capsys):
    assert re.search(r"\blr \S+ -> 0\.5", refused(capsys, *TINY, "--out", run, "--stage", "grpo", "--lr", "0.5"))


def test_training_leaves_the_global_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    go(tmp_path, "--stage", "base", "--stop-at", 1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_step_that_is_not_finite_is_repeated_under_anomaly_detection(run, tmp_path, monkeypatch, capsys):
    """The square root of zero in the loss of step 3: torch names its backward."""
    real, seen = Run.backward, []

    def backward(self, loss):
        seen.append((self.step, torch.is_anomaly_enabled()))
        real(self, loss + (torch.sqrt(loss * 0) * 0 if self.step == 3 else 0))
    monkeypatch.setattr(Run, "backward", backward)
    with pytest.raises(NotFinite, match="step 3: gradient of policy/"):
        go(tmp_path / "plain", *parts(run), "--eval-every", 0)
    seen.clear()
    with pytest.raises(RuntimeError, match="SqrtBackward0"):
        go(tmp_path / "searched", *parts(run), "--eval-every", 0, "--detect-anomaly")
    assert "repeating step 3" in capsys.readouterr().err
    assert {step for step, on in seen if on} == {3} and not torch.is_anomaly_enabled()
    assert {step for step, on in seen if not on} == {0, 1, 2, 3}


def test_deterministic_refuses_what_is_not_and_changes_no_bit_on_a_cpu(run, tmp_path):
    try:
        go(tmp_path, "--stage", "base", "--deterministic")
        with pytest.raises(RuntimeError, match="deterministic"):                # it has no such form on any device
            torch.nn.functional.max_unpool2d(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), 1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(weights(run / "base"), weights(tmp_path / "base"))


# the ratio, the log -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", ["flow", "ddim"])
@pytest.mark.parametrize("rollout", ["full", "branch"])
@pytest.mark.parametrize("credit", ["global", "pair"])
def test_the_ratio_is_exactly_one_before_the_first_update(run, tmp_path, credit, rollout, step):
    go(tmp_path, *parts(run), "--credit", credit, "--rollout", rollout, "--exploration", step, "--eval-every", 0,
       "--steps", 2, "--stop-at", 2)
    rows = log(tmp_path / "grpo")
    assert len(rows) == 2 and all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 for row in rows)
    assert all(row["policy/clip_frac"] == 0 and row["grad/norm"] > 0 for row in rows)


@pytest.mark.parametrize("extra", [["--modalities", "one"], ["--modalities", "joint"], ["--reward", "hard"],
                                   ["--norm", "none"], ["--norm", "group"], ["--replay", "0.5"],
                                   ["--dead-zone", "skip"], ["--precision", "bf16"],
                                   ["--kl-weight", "0"]])
def test_every_option_trains_with_ratio_one(run, tmp_path, extra):
    go(tmp_path, *parts(run), *extra, "--eval-every", 0, "--steps", 2, "--stop-at", 2)
    rows = log(tmp_path / "grpo")
    assert len(rows) == 2 and all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 for row in rows)
    assert not torch.is_autocast_enabled("cpu")                                 # contexts within contexts were left


def compiler(error):
    """What stands in for torch.compile: without a gradient the result is off by a share of `error`."""
    return lambda f, **_: lambda *args: f(*args) * (1 if torch.is_grad_enabled() else 1 + error)


@pytest.mark.parametrize("extra", [["--rollout", "full"], ["--noise-blocks", "2"], ["--micro", 3], ["--updates", 2]])
def test_a_compiled_rollout_that_rounds_otherwise_has_ratio_one(run, tmp_path, monkeypatch, extra):
    monkeypatch.setattr(torch, "compile", compiler(1e-3))
    go(tmp_path, *parts(run), "--compile", *extra, "--clip", 10, "--eval-every", 0, "--steps", 2, "--stop-at", 2)
    rows = log(tmp_path / "grpo")
    assert all(row["grad/norm"] > 0 and 5e-4 < row["policy/gap"] < 2e-3 for row in rows)
    if "--updates" not in extra:                                                # else the ratio is that of the second
        assert all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 for row in rows)


def test_a_compiled_rollout_that_computes_something_else_is_stopped(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", compiler(0.5))
    with pytest.raises(NotFinite, match="rollout and update computed velocities 0.[35].* apart, want 0.1"):
        go(tmp_path, *parts(run), "--compile", "--eval-every", 0, "--steps", 2)


def test_an_eager_rollout_on_a_cpu_may_not_even_round_otherwise(run, tmp_path, monkeypatch):
    monkeypatch.setattr(DiT, "velocity", compiler(1e-6)(DiT.velocity))
    with pytest.raises(NotFinite, match="rollout and update computed velocities .* apart, want 0 "):
        go(tmp_path, *parts(run), "--eval-every", 0, "--steps", 2)


def test_torch_compile_takes_the_same_steps(run, tmp_path, monkeypatch):
    """Traced by dynamo and autograd and run operation by operation, every number is what it was without."""
    go(tmp_path / "plain", *parts(run), "--eval-every", 0, "--steps", 2, "--precision", "fp32")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    go(tmp_path / "compiled", *parts(run), "--compile", "--eval-every", 0, "--steps", 2, "--precision", "fp32")
    plain, compiled = (load_file(tmp_path / name / "grpo" / "predictor.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for k in plain:
        torch.testing.assert_close(compiled[k], plain[k], rtol=1e-4, atol=1e-6)


def test_half_the_weights_give_the_same_bits_where_they_were_cast_anyway(run):
    policy, bf16 = predictor.load_predictor(run / "base"), torch.device("cpu")
    halved = frozen_copy(policy)
    keep_in_bf16(halved.network)
    assert halved.head.weight.dtype == torch.bfloat16 and policy.head.weight.dtype == torch.float32
    x, t, rgb = torch.randn(2, 3, 16, 16), torch.rand(2), torch.rand(2, 3, 16, 16)
    with torch.no_grad(), ranks.autocast("bf16", bf16):
        a, b = (net.velocity(x, t, net.encode(rgb), "albedo") for net in (policy, halved))
    assert torch.equal(a, b)


@pytest.mark.parametrize("rollout", ["full", "branch", "3"])
def test_a_rollout_has_the_asked_steps_group_and_noise(run, tmp_path, monkeypatch, rollout):
    seen = []
    plan_walk, walk = grpo.plan_walk, grpo.rollout

    def plan(grid, stochastic, exploration, noise, draw, tail):
        seen.append((len(grid) - 1, stochastic, exploration, noise, tail))
        return plan_walk(grid, stochastic, exploration, noise, draw, tail)

    def spy(velocity, x, legs, group, *more):
        out = walk(velocity, x, legs, group, *more)
        seen.append((group, len(out[1]), tuple(out[0].shape)))
        return out
    monkeypatch.setattr(grpo, "plan_walk", plan)
    monkeypatch.setattr(grpo, "rollout", spy)
    go(tmp_path, *parts(run), "--rollout", rollout, "--modalities", "one", "--noise", "0.5", "--sample-steps", "6",
       "--tail", 2, "--eval-every", 0, "--stop-at", 1)
    trained = {"full": 5, "branch": 1, "3": 3}[rollout]                         # the last step is deterministic
    assert seen == [(6, trained, "flow", 0.5, 2), (4, trained, (2, 4, 3, 16, 16))]


def test_a_second_update_on_the_same_rollout_moves_the_ratio(run, tmp_path):
    go(tmp_path, *parts(run), "--updates", 3, "--lr", "1e-2", "--eval-every", 0, "--steps", 2, "--stop-at", 2)
    last = log(tmp_path / "grpo")[-1]
    assert last["policy/ratio_min"] < 1 < last["policy/ratio_max"]


def test_the_log_of_grpo_holds_what_one_watches(run):
    rows = log(run / "grpo")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        names = [m for m in NAMES if f"reward/{m}" in row]
        assert names and all({f"reward/{m}_spread", f"reward/{m}_unanimous"} <= set(row) for m in names)
        assert {"reward", "loss", "grad/norm", "seconds", "policy/ratio_min", "policy/ratio_max", "policy/clip_frac",
                "policy/kl"} <= set(row)
        assert 0 <= row["reward"] <= 1 and abs(row["reward"] - np.mean([row[f"reward/{m}"] for m in names])) < 1e-6
        assert all(0 <= row[f"reward/{m}_unanimous"] <= 1 and row[f"reward/{m}_spread"] >= 0 for m in names)
    assert rows[0]["policy/kl"] == 0 < rows[-1]["policy/kl"]                    # the policy starts as the reference


def test_diagnostics_that_no_reward_sees_are_logged_at_evaluations(run):
    rows = log(run / "grpo")
    want = {f"wild/{m}_{what}" for m in NAMES for what in ("high_frequency", "spread")}
    assert want <= set(rows[1]) and want <= set(rows[3]) and not want & set(rows[2])
    for m in ("depth/abs_rel", "depth/pairs", "normal/angle", "albedo/whdr10", "irradiance/si_mse"):
        assert np.isfinite(rows[3][f"synthetic/{m}"])


def test_the_losses_of_the_supervised_stages_are_logged(run):
    assert all(np.isfinite(row["loss"]) and row["grad/norm"] > 0 for row in log(run / "base"))
    answers = ["loss/answers" in row for row in log(run / "judge")]
    assert answers == [False, False, True, True]                                # half the steps warm the vision tower


def test_only_the_policy_moves(run, tmp_path):
    before = weights(run / "base") | weights(run / "judge")
    go(tmp_path, *parts(run), "--stop-at", 4)
    assert equal(before, weights(run / "base") | weights(run / "judge"))
    trained, start = (load_file(f / "predictor.safetensors") for f in (tmp_path / "grpo", run / "base"))
    assert trained.keys() == start.keys() and any(not torch.equal(trained[k], start[k]) for k in start)


def test_the_bank_is_asked_once(run, tmp_path, capsys):
    go(tmp_path, *parts(run), "--stop-at", 1)
    assert "0 pairs asked, 64 already known" in capsys.readouterr().out


# early stop -------------------------------------------------------------------------------------------------------

def test_a_run_that_drifts_stops_at_the_evaluation_before_and_stays_stopped(run, tmp_path, capsys):
    flags = [*parts(run), "--lr", "1e-2", "--eval-every", 2, "--steps", 20]
    go(tmp_path / "short", *flags, "--band", 0, "--forget", 0, "--ema", "1e-9", "--stop-at", 4)
    spread = [{k: v for k, v in r.items() if k.startswith("wild/") and k.endswith(("_spread", "_high_frequency"))}
              for r in log(tmp_path / "short" / "grpo")]
    change = [max(abs(np.log(spread[i][k] / spread[0][k])) for k in spread[0]) for i in (1, 3)]
    band = float(np.exp(0.5 * (change[0] + change[1])))                         # step 2 is inside, step 4 is not
    assert change[1] > change[0] > 0
    go(tmp_path / "long", *flags, "--band", band, "--forget", 0, "--ema", "1e-9", "--save-every", 3)
    assert "grpo: stopped after step 4: wild/" in capsys.readouterr().out and len(log(tmp_path / "long" / "grpo")) == 4
    go(tmp_path / "two", *flags, "--band", 0, "--forget", 0, "--ema", "1e-9", "--stop-at", 2)
    state = load_file(tmp_path / "two" / "grpo" / "checkpoint.safetensors")
    want = {k.removeprefix("average/").replace("|", "."): v for k, v in state.items() if k.startswith("average/")}
    result = load_file(tmp_path / "long" / "grpo" / "predictor.safetensors")
    assert want and all(torch.equal(result[k], v) for k, v in want.items())     # the average after step 2
    before = weights(tmp_path / "long" / "grpo")
    go(tmp_path / "long", *flags, "--band", band, "--forget", 0, "--ema", "1e-9", "--save-every", 3)
    assert equal(before, weights(tmp_path / "long" / "grpo")) and len(log(tmp_path / "long" / "grpo")) == 4
    go(tmp_path / "long", *flags, "--band", 0, "--forget", 0, "--ema", "1e-9", "--save-every", 3, "--stop-at", 6)
    assert len(log(tmp_path / "long" / "grpo")) == 6


def test_a_run_without_bands_goes_on(run, tmp_path):
    go(tmp_path, *parts(run), "--band", 0, "--forget", 0, "--lr", "1e-1", "--eval-every", 2, "--steps", 3)
    assert len(log(tmp_path / "grpo")) == 3


# baselines and the oracle -----------------------------------------------------------------------------------------

def test_the_ranking_loss_and_its_anchor_pull_the_right_way(run):
    """A step down the ranking loss raises the soft agreement with the judge; from the start the anchor is zero."""
    cfg = parse(["--stage", "grpo", "--policy", "P", "--judge", "J", *TINY, "--kl-weight", "1"])[1]
    policy = predictor.load_predictor(run / "base")
    ref = frozen_copy(policy)
    photos, pts = torch.randint(256, (4, 3, 16, 16)).byte(), torch.randint(16, (4, cfg.bank_pairs, 2, 2))
    batch = batch_of(cfg, policy, photos, pts, torch.rand(4, cfg.bank_pairs, 4), seeded())

    def loss_of():
        batch.draw = ranks.Draw(seeded(1), cfg.batch)
        net, frozen = grpo.Conditioned(policy, batch), grpo.Conditioned(ref, batch)
        return *baselines.ranking_loss(net, frozen, batch), net

    value, stats, net = loss_of()
    assert stats["policy/anchor"] == 0
    value.backward()
    net.end_backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 1e-2 * p.grad
    after, moved, _ = loss_of()
    assert after < value and moved["policy/anchor"] > 0
    assert sum(moved[f"reward/{m}"] for m in batch.modalities) > sum(stats[f"reward/{m}"] for m in batch.modalities)


def test_an_oracle_is_as_often_right_as_the_papers_judge():
    maps = ScenePool("wild", "train", 24, 32).all()
    rng = torch.Generator().manual_seed(0)
    pts = sample_pairs(24, (32, 32), 200, rng, mask=maps["mask"])
    prob = Oracle(maps, rng).ask(maps["rgb"], pts, [f"wild {i}" for i in range(24)])
    truth = questions.true_relations(maps, pts)
    for k, m in enumerate(NAMES):
        asked = truth[..., k] != 0
        right = ((prob[..., k] > 0.5) == (truth[..., k] > 0))[asked].float().mean()
        assert abs(right - PAPER_ACCURACY[m]) < 0.02 and (prob[..., k][~asked] == 0.5).all()


@pytest.mark.parametrize("flags, words", [
    (["--judge", "oracle", "--images", "p"], "--judge oracle; use procedural photos"),
    (["--judge", "oracle", "--images", "p"], "has no true maps"),
    (["--rollout", "8", "--sample-steps", "8"], "the last step is deterministic"),
    (["--noise-blocks", "1,x"], "'1,x'"), (["--band", "0.5"], "want a factor above 1")])
def test_flags_of_the_estimator_that_do_not_add_up_are_refused(capsys, flags, words):
    assert words in refused(capsys, "--stage", "grpo", *flags)


# photos of one's own ----------------------------------------------------------------------------------------------

@pytest.fixture
def photos(tmp_path):
    """Twelve JPEGs of odd sizes, in a sub-folder too, and one file that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    more = [(f"more/{i}.jpg", (20 + i, 30)) for i in range(9)]
    for name, size in (("a.jpg", (40, 31)), ("b.jpg", (23, 37)), ("more/c.jpeg", (64, 64)), *more):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not much of a photo")
    return folder


def test_grpo_on_a_folder_of_photos_trains_and_reports_without_truth(run, tmp_path, photos, capsys):
    out = tmp_path / "run"
    go(out, *parts(run), "--bank", out / "bank", "--images", photos)
    said = capsys.readouterr()
    assert "broken.jpg" in said.err and "12 photos" in said.out and "1 unreadable" in said.out
    assert "of which 8 are held out" in said.out and "4 of 8 held-out photos" in said.out
    report = strict((out / "photos" / "report.json").read_text())
    assert report["n"] == len(report["photos"]) == 4 and set(report["judge/confidence"]) == set(NAMES)
    assert all(0 <= c <= 1 for c in report["judge/confidence"].values())
    rows = [report[f"{kind}/{m}"] for m in NAMES for kind in ("reward", "agreement")]
    for row in (*rows, report["depth-normal RMSE"]):
        assert {"base", "x", "change", "low", "high"} <= set(row)
        assert np.isfinite([v for k, v in row.items() if k != "verdict"]).all()
        assert abs(row["x"] - row["base"] - row["change"]) < 1e-6 and row["low"] <= row["change"] <= row["high"]
    with Image.open(out / "photos" / "panel.png") as image:
        assert min(image.size) > 128
    assert len(log(out / "photos")) == 4 and len(list((out / "bank").rglob("*.safetensors"))) == 12
    predictor.load_predictor(out / "photos")


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: ((p / "empty").mkdir(), p / "empty")[1]])
@pytest.mark.parametrize("stage", ["all", "grpo"])
def test_a_folder_without_photos_fails_before_anything_is_written(tmp_path, capsys, make, stage):
    folder = make(tmp_path)
    assert folder.name in refused(capsys, *TINY, "--stage", stage, "--out", tmp_path / "run", "--images", folder)
    assert not (tmp_path / "run").exists()


# refusals ---------------------------------------------------------------------------------------------------------

def test_the_paper_preset_without_weights_names_them(tmp_path, capsys):
    line = refused(capsys, "--preset", "paper", "--out", tmp_path / "run")
    assert "marigold" in line and "Intrinsic-Judge" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--policy", "--judge"])
@pytest.mark.parametrize("stage", ["all", "grpo"])
def test_missing_weights_fail_before_any_training(run, tmp_path, capsys, flag, stage):
    flags = {"--policy": run / "base", "--judge": run / "judge"} | {flag: tmp_path / "nowhere"}
    line = refused(capsys, *TINY, "--stage", stage, "--out", tmp_path / "run", *[x for kv in flags.items() for x in kv])
    assert "nowhere" in line and not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_a_stop_in_a_stage_that_grpo_needs_first_ends_there(tmp_path, capsys):
    go(tmp_path, "--stage", "grpo", "--stop-at", 2)
    assert "stopped after 2 steps of base (--stop-at)" in capsys.readouterr().out
    assert len(log(tmp_path / "base")) == 2 and not (tmp_path / "judge").exists()


def test_grpo_on_a_fresh_machine_trains_base_and_judge_first(tmp_path, capsys):
    go(tmp_path / "run", "--stage", "grpo")
    assert "base" in capsys.readouterr().out
    assert all((tmp_path / "run" / name).is_file() for name in
               ("base/predictor.safetensors", "judge/model.safetensors", "grpo/predictor.safetensors", "report.json"))


def test_a_checkpoint_of_another_architecture_is_refused(run, tmp_path, capsys):
    for p in (run / "base").glob("predictor.*"):
        (tmp_path / p.name).write_bytes(p.read_bytes())
    about = strict((tmp_path / "predictor.json").read_text())
    (tmp_path / "predictor.json").write_text(json.dumps(about | dict(architecture="marigold")))
    line = refused(capsys, *TINY, *parts(run), "--policy", tmp_path, "--out", tmp_path / "run")
    assert "'marigold'" in line and "'reasonx-dit'" in line


def test_weights_of_another_size_are_refused(run, tmp_path, capsys):
    DiT(DiTConfig(16, 4, 64, 1, 1, 2)).save(tmp_path)
    (tmp_path / "predictor.json").write_bytes((run / "base" / "predictor.json").read_bytes())
    line = refused(capsys, *TINY, *parts(run), "--policy", tmp_path, "--out", tmp_path / "run")
    assert "(first: " in line and str(tmp_path) in line


@pytest.mark.parametrize("stage, words", [("grpo", "one process"), ("base", "--stage grpo")])
def test_a_policy_that_cannot_be_spread_is_refused(run, tmp_path, capsys, stage, words):
    line = refused(capsys, *TINY, "--stage", stage, "--fsdp", "--out", tmp_path / "run")
    assert "--fsdp" in line and words in line and not (tmp_path / "run").exists()


def test_spread_weights_are_not_compiled(capsys, tmp_path):
    line = refused(capsys, *TINY, "--stage", "grpo", "--fsdp", "--compile", "--out", tmp_path / "run")
    assert "--compile" in line and not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_among_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ranks.divide_batch(6, "batch") == 2
    with pytest.raises(UserError, match="--batch 4 is not divisible by 3 processes"):
        ranks.divide_batch(4, "batch")


@pytest.mark.parametrize("flags, words", [(["--group", "1"], "--group 1"), (["--images", "nowhere"], "nowhere")])
def test_as_a_script_a_bad_flag_is_one_line_and_exit_code_two(tmp_path, monkeypatch, capfd, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    said = capfd.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and words in said.err and not list(tmp_path.iterdir())


# processes --------------------------------------------------------------------------------------------------------

def test_two_processes_with_the_same_data_are_one_process(tmp_path, monkeypatch):
    """All-reduce of two equal gradients, averaged, is the gradient: also for parameters that get none (a judge's text
    part while only its vision tower trains)."""
    def after(folder):
        torch.manual_seed(0)
        used, idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        opts = optimizers([used, idle], lr=0.1, muon=0.1, weight_decay=0.1)
        one = Run(folder, {}, 0, 3, dict(used=used, idle=idle), opts)
        for _ in one.steps("toy"):
            one.update(used(torch.ones(2, 4)).square().mean(), [list(used.parameters()), list(idle.parameters())], 1.0)
        return state_tensors(dict(used=used, idle=idle), opts)

    alone = after(tmp_path / "alone")
    for module in (ranks, running):
        monkeypatch.setattr(module, "world", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda x, **_: SimpleNamespace(x=x.mul_(2), wait=lambda: None))
    monkeypatch.setattr(ranks.dist, "all_gather", lambda each, x, group: [y.copy_(x) for y in each])
    assert equal(alone, after(tmp_path / "together"))


def test_a_policy_that_is_not_there_fails_before_anything_is_trained(tmp_path):
    with pytest.raises(FileNotFoundError, match="no predictor.json"):
        go(tmp_path / "run", "--stage", "all", "--replay", 0, "--policy", tmp_path)
    assert not (tmp_path / "run" / "base").exists()
