"""Runs that survive: kills, lost ranks, SIGTERM, full disks, no memory, numbers that are not; one rank as two."""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import faults
import pytest
import torch
from faults import TINY, differences, outcome, ranks, start

ROOT = Path(__file__).resolve().parents[1]
SHORT = [*TINY, "--precision", "fp32", "--no-muon"]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Undisturbed runs of all stages."""
    return faults.Campaign(tmp_path_factory.mktemp("faults"))


def grpo(campaign, out, *extra):
    """Arguments of a GRPO run that starts from the undisturbed base, judge and bank."""
    done = campaign.whole
    return [*SHORT, "--stage", "grpo", "--policy", done / "base", "--judge", done / "judge", "--bank", done / "bank",
            "--images", campaign.folder / "photos", "--out", out, "--steps", 4, *extra]


def one_line(log):
    """The only line of a command's output that begins with its name."""
    lines = [x for x in Path(log).read_text().replace("\r", "\n").splitlines() if x.startswith("train.py: ")]
    assert len(lines) == 1 and "Traceback" not in Path(log).read_text(), Path(log).read_text()
    return lines[0]


def ended(p, code, seconds=120):
    p.join(seconds)
    assert p.exitcode == code, p.exitcode


def until_rows(path, n, alive, log, seconds=120):
    """Wait until a log has n rows; fail when its command ends before, or hangs."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text().count("\n") >= n):
        assert alive(), Path(log).read_text()[-3000:]
        assert time.monotonic() < deadline, f"no {n} rows in {path} after {seconds} s: {Path(log).read_text()[-3000:]}"
        time.sleep(0.02)


def far(a, b):
    """Largest difference between the tensors and numbers of two outcomes, which must have the same names."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    num = lambda x: torch.as_tensor(x, dtype=torch.float64)                     # noqa: E731
    return max(float((num(a[k]) - num(b[k])).abs().max()) for k in a if not isinstance(a[k], str))


# kills ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", faults.STAGES)
def test_a_killed_stage_ends_as_the_undisturbed_one(campaign, stage):
    assert any(k.startswith(f"{campaign.stages[stage][2][0]}/") for k in campaign.want)
    kills, wrong = campaign.round(stage, random.Random(3), most=2)              # python tests/faults.py: 50 kills
    assert wrong == []


def test_the_comparison_notices_one_changed_bit(campaign, tmp_path):
    shutil.copytree(campaign.whole, tmp_path / "copy")
    path = max((tmp_path / "copy" / "photos").glob("checkpoint*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert len(differences(campaign.want, outcome(tmp_path / "copy"))) == 1


def test_sigterm_saves_and_exits_with_0_and_the_same_command_goes_on(campaign, tmp_path):
    p = start("train", grpo(campaign, tmp_path / "run", "--steps", 12, "--eval-every", 0, "--save-every", 100),
              tmp_path / "log")
    rows = tmp_path / "run" / "photos" / "metrics.jsonl"
    until_rows(rows, 2, p.is_alive, tmp_path / "log")
    os.kill(p.pid, signal.SIGTERM)
    ended(p, 0, seconds=30)
    said = (tmp_path / "log").read_text()
    steps = len(rows.read_text().splitlines())
    assert 2 <= steps < 12 and f"after {steps} of 12 steps, saved" in said
    for out in ("run", "whole"):
        ended(start("train", grpo(campaign, tmp_path / out, "--steps", 12, "--eval-every", 0, "--save-every", 100),
                    tmp_path / "log"), 0)
    a, b = (load(tmp_path / out / "photos" / "predictor.safetensors") for out in ("run", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in b)


def load(path):
    from safetensors.torch import load_file
    return load_file(path)


# ranks ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["base", "judge"])
def test_two_ranks_learn_what_one_learns(tmp_path, stage):
    argv = [*SHORT, "--stage", stage, "--base-steps", 4, "--judge-steps", 4, "--judge-warm", 0.5]
    for n in (1, 2):
        assert ranks(n, "train", [*argv, "--out", tmp_path / f"{n}"], tmp_path / f"log{n}") == [0] * n
    assert far(outcome(tmp_path / "1"), outcome(tmp_path / "2")) < 2e-5             # the order of sums, four updates


@pytest.mark.parametrize("how", [
    ["--credit", "pair", "--norm", "global", "--rollout", "branch", "--modalities", "joint", "--replay", "0.1"],
    ["--credit", "global", "--norm", "global", "--lora", "2"]])
def test_grpo_learns_the_same_with_one_rank_two_ranks_and_a_spread_policy(campaign, tmp_path, how):
    for out, n, more in (("1", 1, []), ("2", 2, []), ("fsdp", 2, ["--fsdp", "--stop-at", 2]), ("fsdp", 2, ["--fsdp"])):
        got = ranks(n, "train", grpo(campaign, tmp_path / out, "--eval-every", 2, "--lr", "1e-3", *how, *more),
                    tmp_path / f"log{out}")
        assert got == [0] * n, (tmp_path / f"log{out}.0").read_text()
    one, two, spread = (outcome(tmp_path / out / "photos") for out in ("1", "2", "fsdp"))
    assert not {k for k in one if "report" in k} ^ {"report.json"}
    assert max(far(one, two), far(one, spread)) < 2e-6                          # the order of sums, four updates


def test_a_rank_whose_numbers_are_bad_ends_both_with_one_line(campaign, tmp_path):
    got = ranks(2, "train", grpo(campaign, tmp_path / "run"), tmp_path / "log", nan_at=(3, 1))
    assert got == [2, 2]
    assert "Traceback" not in (tmp_path / "log.0").read_text() and "train.py" not in (tmp_path / "log.0").read_text()
    line = one_line(tmp_path / "log.1")
    assert "step 3" in line and "loss is nan" in line and ".png" in line
    from runtime.files import read_checked
    assert read_checked(tmp_path / "run" / "photos" / "checkpoint.safetensors")[1]["step"] == "2"


def test_a_killed_rank_ends_the_other_with_one_line(campaign, tmp_path):
    got = ranks(2, "train", grpo(campaign, tmp_path / "run"), tmp_path / "log", die_at=4)    # rank 0, its fourth write
    assert got == [-signal.SIGKILL, 2]
    assert "another process was lost" in one_line(tmp_path / "log.1")


def test_torchrun_as_typed_restarts_after_a_killed_rank(campaign, tmp_path):
    rows = tmp_path / "run" / "photos" / "metrics.jsonl"
    p = start("torch.distributed.run", [
        "--standalone", "--nproc_per_node=2", "--max-restarts=1", "--monitor-interval=0.1", ROOT / "train.py",
        *grpo(campaign, tmp_path / "run", "--steps", 40, "--save-every", 4, "--eval-every", 0)], tmp_path / "log",
        dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    until_rows(rows, 5, p.is_alive, tmp_path / "log")
    for child in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):        # it has gone meanwhile
            if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
                os.kill(int(child), signal.SIGKILL)
    p.join(120)
    said = (tmp_path / "log").read_text()
    assert p.exitcode == 0 and "another process was lost" in said, said[-3000:]
    assert said.startswith("preset tune"), said[:1000]                          # to import the program says nothing
    assert [json.loads(x)["step"] for x in rows.read_text().splitlines()] == list(range(40))
    assert (tmp_path / "run" / "photos" / "report.json").is_file()


# disk and memory --------------------------------------------------------------------------------------------------

def limited(what, amount, argv, log):
    """Run train.py in a fork under a resource limit; returns its exit code."""
    p = faults.FORK.Process(target=_limited, args=(what, amount, list(map(str, argv)), str(log)))
    p.start()
    p.join(60)
    return p.exitcode


def _limited(what, amount, argv, log):
    from faults_child import command
    amount = amount or int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + 60 * 2**20
    resource.setrlimit(what, (amount, amount))
    command("train", argv, log, {}, 0, False, None)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(campaign, tmp_path):
    from runtime.files import read_checked
    argv = grpo(campaign, tmp_path / "run", "--eval-every", 0)
    ended(start("train", [*argv, "--stop-at", 2], tmp_path / "log"), 0)
    assert limited(resource.RLIMIT_FSIZE, 40_000, argv, tmp_path / "log") == 2  # a checkpoint is larger
    line = one_line(tmp_path / "log")
    assert "File too large" in line and "checkpoint.safetensors" in line and "run the same command again" in line
    folder = tmp_path / "run" / "photos"
    assert max(int(read_checked(p)[1]["step"]) for p in folder.glob("checkpoint*.safetensors")) == 2
    assert not list(folder.glob("*.part"))
    ended(start("train", argv, tmp_path / "log"), 0)                            # room was made
    assert int(read_checked(folder / "checkpoint.safetensors")[1]["step"]) == 4


def test_no_memory_is_one_line(campaign, tmp_path):
    argv = grpo(campaign, tmp_path / "run", "--group", 2048, "--eval-every", 0)
    assert limited(resource.RLIMIT_AS, 0, argv, tmp_path / "log") == 2
    assert "out of memory" in one_line(tmp_path / "log") and "--micro" in one_line(tmp_path / "log")


def test_an_output_that_cannot_be_written_is_one_line(campaign, tmp_path):
    ended(start("train", grpo(campaign, "/proc/nowhere"), tmp_path / "log"), 2)
    assert "/proc/nowhere" in one_line(tmp_path / "log")
