"""The benchmark: its dry run takes every path and invents no figure, rows judge right; the memory table."""
import dataclasses
import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import arithmetic, measure, peer, policy, system
from bench import kernels as kernel_bench
from models.sd2 import UNet

ROOT = Path(system.__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """JSON of `python -m bench.system --all` on a CPU, without the full-size network and its count of operations."""
    path = tmp_path_factory.mktemp("bench") / "dry.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "cpu_row", lambda bench: None)
        patch.setattr(policy, "policy_tflop", lambda px: (1.0, 100.0))
        patch.setattr(measure, "count_flops", lambda call: 3.0)
        system.main(["--all", "--device", "cpu", "--json", str(path)])
    return json.loads(path.read_text())


def test_the_dry_run_takes_every_part_and_invents_no_figure(dry):
    assert {r["part"] for r in dry["rows"]} == {"judge", "policy", "step"} and dry["failed"] == []
    assert all(r[k] is None for r in dry["rows"] for k in ("ms", "low", "high", "of_limit", "instead_ms"))
    assert dry["tflops"] is None and dry["copy"] is None and all(r["peak_gb"] is None for r in dry["memory"])
    assert {r["op"] for r in dry["kernels"]["kernels"]} == set(kernel_bench.OPS) - {"check_points"}
    assert all(r[k] == "not run" for r in dry["kernels"]["kernels"] for k in ("eager", "compile", "triton"))


def test_the_dry_run_names_the_rows_of_a_gpu(dry):
    what = " | ".join(r["what"] for r in dry["rows"])
    for words in ("batch 128", "U-Net forward, 768 px", "512 px, G = 8, T = 15: eager", "G = 8, T = 15: --compile",
                  "banked answers", "the judge asked anew", "40 pairs, four questions each"):
        assert words in what


def test_the_printed_tables_are_those_of_the_json(dry):
    text = system.system_tables(dry)
    assert text.count("\n| judge |") == 7 and "512 | LoRA r 16 | yes" in text
    assert all(f"| {r['what']} |" in text for r in dry["rows"])
    assert "draw_markers, group_norm_silu, layer_norm_modulate: not run (no GPU)" in text


def test_the_results_page_holds_the_recorded_run():
    found = json.loads((ROOT / "bench" / "results.json").read_text())
    assert system.system_tables(found) in (ROOT / "bench" / "RESULTS.md").read_text()


def test_a_row_knows_its_goals():
    row = measure.Row("judge", "x", ms=10.0, tflop=4.0, of_limit=0.5, instead_ms=490.0, least=0.45, least_times=50)
    assert row.times == 49 and row.goal() == "45% of the limit: yes, 50 times: missed"
    assert measure.Row("judge", "x", least_times=2.5).goal() == "2.5 times: not run"
    assert measure.Row("judge", "x").goal() == "-"


def test_a_row_that_fails_on_a_gpu_costs_no_other_and_is_counted():
    run = measure.Bench(CPU)
    run.dry = False
    run.clock = lambda call, runs: (call(), 1.0, 3.0)
    run.clear = lambda: None
    run.tflops = 100.0

    def broken():
        raise torch.OutOfMemoryError("tried to allocate\n 9 GB")
    bad = run.add(measure.Row("policy", "large"), broken)
    good = run.add(measure.Row("policy", "small", tflop=0.1), lambda: 2.0)
    assert bad.ms is None and bad.note == "failed: OutOfMemoryError: tried to allocate 9 GB"
    assert good.ms == 2.0 and good.of_limit == 0.5 and run.failed == ["policy: large"] and run.rows == [bad, good]


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "gcc"), ValueError("x"), OSError("no compiler")])
def test_a_compiler_that_is_missing_costs_its_row_alone(error):
    run = measure.Bench(CPU)
    run.dry = False
    run.clear = lambda: None

    def broken():
        raise error
    assert run.add(measure.Row("policy", "x"), broken).note.startswith(f"failed: {type(error).__name__}")


def test_attention_is_counted_where_it_is_fused():
    with FakeTensorMode():
        q = torch.empty(2, 3, 16, 8)
        got = measure.count_tflop(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
        assert got == 49152e-12                                                 # 4 BHLLD


def test_the_measured_peak_is_that_of_a_later_step_and_leaves_out_what_was_there(monkeypatch):
    taken = []
    run = measure.Bench(CPU)
    run.dry = False
    run.clear = lambda: None
    monkeypatch.setattr(system, "memory_table", lambda: [dict(px=512, training="full", checkpointing=True)])
    monkeypatch.setattr(system, "Step", lambda *_: SimpleNamespace(update=lambda: taken.append("step")))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 7e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: taken.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 27e9)
    system.memory_part(run)
    assert taken == ["step", "reset", "step"] and run.memory[0]["peak_gb"] == 20


def test_a_row_that_would_begin_too_late_is_not_run():
    run = measure.Bench(CPU, minutes=0)
    run.deadline = time.monotonic() - 1
    row = run.add(measure.Row("policy", "x", tflop=1.0), lambda: pytest.fail("was run"))
    assert row.ms is None and row.note == "no time was left" and not run.failed


def test_the_operations_are_those_of_the_published_sizes():
    """0.80 TFLOP a state at 512 px; a backward pass takes twice a forward pass."""
    once, whole = policy.policy_tflop(512)
    assert 0.79 < once < 0.81
    states = 1 + 8 * 13
    assert 0.98 < (whole - once * (states + 8) - 4 * once * states) / (3 * 1.08 + 8 * 2.48) < 1.02


@pytest.mark.skipif(peer.diffusers is None, reason="diffusers is not installed")
@pytest.mark.parametrize("change", ["noise", "kl_weight"])
def test_a_loop_that_takes_another_step_is_no_comparison(change, monkeypatch):
    run = measure.Bench(CPU)
    step = policy.Step(run, 32, "--kl-weight", "1e3")
    with torch.no_grad():
        for p in step.nets.policy.unet.conv_out.parameters():
            p += 0.02                                                           # away from the reference
    policy.peer_call(step, run)
    real = peer.Peer.__init__

    def other(self, ours, ref, sd2, cfg, photo):
        real(self, ours, ref, sd2, cfg, photo)
        self.cfg = dataclasses.replace(cfg, **{change: 0.9 * getattr(cfg, change)})
    monkeypatch.setattr(peer.Peer, "__init__", other)
    with pytest.raises(ValueError, match="ours and the loop with diffusers differ"):
        policy.peer_call(step, run)


# memory -----------------------------------------------------------------------------------------------------------

TINY = dict(arithmetic.SD2["unet"], block_out_channels=[32, 64], attention_head_dim=[2, 4], norm_num_groups=8,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])


def counted(px):
    with FakeTensorMode():
        return arithmetic.activations(UNet(TINY), px)


def test_tensors_without_data_are_counted_like_real_ones():
    assert counted(64) == arithmetic.activations(UNet(TINY), 64)


def test_counting_restores_what_it_replaced():
    before = UNet._layer, torch.nn.functional.group_norm, torch.nn.functional.layer_norm
    counted(64)
    assert (UNet._layer, torch.nn.functional.group_norm, torch.nn.functional.layer_norm) == before


def test_activations_grow_with_the_pixels_and_shrink_by_checkpointing():
    small, large = counted(64), counted(128)
    assert small[1] < 0.5 * small[0] and large[1] < 0.5 * large[0]
    assert large[0] > 1.5 * small[0]                                            # weights in bf16 are kept once


def test_each_state_adds_the_same_bytes_to_the_bf16_copies_of_the_weights():
    unet = UNet(TINY)
    one, two, three = (arithmetic.activations(unet, 64, batch=b)[0] for b in (1, 2, 3))
    copies = 2 * sum(p.numel() for p in unet.parameters() if p.ndim > 1)        # matrices and convolutions
    assert two - one == three - two > 0
    assert 0.5 * copies < one - (two - one) < copies                            # those of the text and time inputs go


def test_the_documentation_holds_the_computed_table():
    text = (ROOT / "docs" / "marigold.md").read_text()
    for r in arithmetic.memory_table():
        assert (f"| {r['px']} | {r['training']} | {'yes' if r['checkpointing'] else 'no'} | {r['state_gb']:.1f} | "
                f"{r['activations_gb']:.1f} | {r['total_gb']:.1f} | {r['card_gb']} | {r['with_judge_gb']:.1f} | "
                f"{r['with_judge_card_gb']} |") in text

