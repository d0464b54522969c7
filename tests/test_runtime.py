"""ranks.py, run.py, command.py: randomness, checkpoints and their refusals, logs, optimizers, the command wrapper."""
import json
import locale
import math
import socket
import threading
from types import SimpleNamespace

import pytest
import torch
from expect import equal, strict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from evaluation.watch import is_best, mean_accuracy
from models.copies import update_average
from runtime import files, ranks
from runtime import run as running
from runtime.command import run_command
from runtime.config import UserError
from runtime.flags import parse
from runtime.optimizers import BatchedMuon, cosine, load_state_tensors, optimizers, state_tensors
from runtime.ranks import generator
from runtime.run import CHECKPOINT, NotFinite, Run


def net(seed=0):
    """Two linear layers with biases: matrices for Muon, vectors for AdamW."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


def make(folder, seed=0, settings=None, steps=4, muon=0.02, save_every=100):
    """A Run on a fresh small network: (run, network, optimizers)."""
    model = net(seed)
    opts = optimizers([model], lr=0.01, muon=muon, weight_decay=0.01)
    run = Run(folder, settings or dict(width=4), 0, steps, dict(policy=model), opts, save_every)
    return run, model, opts


def walk(run, model, stop_at=0):
    """Regress random targets for the remaining steps."""
    for step, draw in run.steps("toy", stop_at):
        x = torch.randn(16, 4, generator=draw.rng)
        norm = run.update((model(x) - x).square().mean(), [list(model.parameters())], cosine(step, run.n_steps))
        run.log(step, {"grad/norm": norm})


def flat(model, opts):
    return state_tensors(dict(policy=model), opts)


# randomness -----------------------------------------------------------------------------------------------------

def test_a_key_always_gives_the_same_numbers():
    assert torch.equal(torch.rand(9, generator=generator(1, 2, 3)), torch.rand(9, generator=generator(1, 2, 3)))


def test_a_key_gives_the_same_seed_on_every_machine():
    # written down once: other numbers here would make every recorded run another run
    assert generator(0, 1).initial_seed() == 4547492189544328444
    assert generator(3, 2**40).initial_seed() == 6538090011562234384


def test_different_keys_give_different_numbers():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1), (0, 1, 0), (2**40,), (-1,)]
    seeds = {generator(*k).initial_seed() for k in keys} | {generator(0, 0, 0, i).initial_seed() for i in range(1000)}
    assert len(seeds) == len(keys) + 1000


def test_a_generator_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(4))
    assert torch.equal(before, torch.get_rng_state())


def test_steps_and_streams_draw_different_numbers_and_ranks_the_same(tmp_path, monkeypatch):
    run = make(tmp_path)[0]
    seeds = [run.rng(3).initial_seed(), run.rng(3, stream=1).initial_seed(), run.rng(4).initial_seed()]
    monkeypatch.setenv("RANK", "1")
    assert len(set(seeds)) == 3 and run.rng(3).initial_seed() == seeds[0]


def test_the_shares_of_all_ranks_are_the_whole(monkeypatch):
    x = torch.arange(24).view(2, 12)
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = [(monkeypatch.setenv("RANK", str(r)), ranks.own_part(x, 1))[1] for r in range(3)]
    assert torch.equal(torch.cat(parts, 1), x) and all(p.shape == (2, 4) for p in parts)


def test_fp32_is_fp32_everywhere_and_bf16_is_never_emulated(monkeypatch):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(ranks, "pick_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for flag, want in (("fp32", ("highest", False)), ("bf16", ("high", True))):
        ranks.setup(parse(["--precision", flag])[1])
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == want
    ranks.use_tf32(before[1])
    torch.set_float32_matmul_precision(before[0])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not ranks.in_bf16("auto", torch.device("cuda")) and ranks.in_bf16("bf16", torch.device("cuda"))


def test_a_collective_ends_in_minutes_and_a_wait_for_one_rank_in_hours(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    ranks._join("gloo")
    monkeypatch.setattr(ranks, "world", lambda: 2)
    seen = {}
    for name in ("barrier", "all_gather", "all_reduce"):
        monkeypatch.setattr(ranks.dist, name, lambda *_, group=None, name=name: seen.update({name: group}))
    ranks.barrier()
    ranks.combine_numbers(dict(a=1))
    ranks.add_over_ranks(torch.ones(1))
    groups = (seen["barrier"], seen["all_gather"], seen["all_reduce"] or ranks.dist.group.WORLD)
    hours = [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600 for g in groups]
    ranks.shutdown()
    assert hours[0] == hours[1] > 12 and hours[2] < 0.5 and ranks.patient == dict(group=None)


@pytest.mark.parametrize("n", [1, 5, 6])
def test_ranks_compute_all_rows_between_them_and_as_many_each(monkeypatch, n):
    x = torch.arange(n)
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = [x[(monkeypatch.setenv("RANK", str(r)), ranks.share_rows(n))[1]] for r in range(3)]
    monkeypatch.setattr(ranks.dist, "all_gather", lambda each, *_, **__: [
        y.copy_(part) for y, part in zip(each, parts, strict=True)])
    assert torch.equal(ranks.gather_rows(parts[0], n), x) and len({len(p) for p in parts}) == 1


# learning rate, averaged weights ----------------------------------------------------------------------------------

def test_cosine_falls_from_one_to_zero_and_warms_up():
    assert cosine(0, 10) == 1 and abs(cosine(5, 10) - 0.5) < 1e-12 and abs(cosine(10, 10)) < 1e-12
    values = [cosine(i, 10) for i in range(11)]
    assert values == sorted(values, reverse=True)
    assert [cosine(i, 10, warmup=4) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_ema_moves_by_one_minus_decay():
    a, b = net(0), net(1)
    want = [0.9 * p + 0.1 * q for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    update_average(a, b, 0.9)
    for got, w in zip(a.parameters(), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-6, atol=1e-7)                # one fp32 rounding


# optimizers -------------------------------------------------------------------------------------------------------

def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = nn.ModuleDict(dict(hidden=nn.Linear(4, 4), head=nn.Linear(4, 4), words=nn.Embedding(4, 4)))
    adam, muon = optimizers([model], 0.1, 0.2, 0.0)
    held = [{id(p) for g in opt.param_groups for p in g["params"]} for opt in (adam, muon)]
    assert held[1] == {id(model.hidden.weight)}
    assert held[0] == {id(p) for p in model.parameters()} - held[1]


def test_without_muon_everything_is_adamw():
    model = net()
    only, = optimizers([model], 0.1, 0, 0.0)
    assert isinstance(only, torch.optim.AdamW) and len(only.param_groups[0]["params"]) == len(list(model.parameters()))


def test_batched_muon_steps_as_torch_muon_does():
    def after(kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 8))
        matrices = [m.weight for m in model]
        opt = kind(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for i in range(3):
            model.zero_grad()
            model(torch.randn(4, 8, generator=generator(i))).square().sum().backward()
            matrices[1].grad = matrices[1].grad if i else None                  # without a gradient nothing moves
            opt.step()
        return matrices, [opt.state[p]["momentum_buffer"] for p in matrices]

    for got, want in zip(after(BatchedMuon), after(torch.optim.Muon), strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)                 # bf16 products of a step of 0.01


# checkpoints ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("muon", [0, 0.02])
def test_pack_then_unpack_restores_weights_and_optimizer_state(tmp_path, muon):
    run, model, opts = make(tmp_path / "a", muon=muon)
    walk(run, model)
    kept = flat(model, opts)
    assert any(k.startswith("opt0/") for k in kept) and bool(muon) == any(k.endswith("momentum_buffer") for k in kept)
    _, other, other_opts = make(tmp_path / "b", seed=1, muon=muon)
    load_state_tensors(kept, dict(policy=other), other_opts)
    assert equal(kept, flat(other, other_opts))


def test_what_is_restored_or_averaged_over_ranks_has_the_strides_of_its_weight(tmp_path, monkeypatch):
    """Fused AdamW refuses others; weights of convolutions lie channels last under --compile."""
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    opts, p = optimizers([conv], 0.01, 0, 0.0), conv.weight
    run = Run(tmp_path, {}, 0, 2, dict(policy=conv), opts)
    conv(torch.ones(1, 3, 5, 5)).sum().backward()
    grad = p.grad.clone()
    for module in (ranks, running):
        monkeypatch.setattr(module, "world", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda x, **_: SimpleNamespace(wait=lambda: None))
    run._average([p])
    assert torch.equal(p.grad, grad / 2) and p.grad.stride() == p.stride()
    opts[0].step()
    state = {k: v.clone() for k, v in opts[0].state[p].items()}
    load_state_tensors(flat(conv, opts), dict(policy=conv), opts)
    for k, v in opts[0].state[p].items():
        assert torch.equal(v, state[k]) and (v.shape != p.shape or v.stride() == p.stride())


def test_packed_tensors_are_copies():
    model = net()
    kept = flat(model, [])
    with torch.no_grad():
        model[0].weight.zero_()
    assert kept["policy/0.weight"].any()


def test_stopping_and_resuming_is_bitwise_the_uninterrupted_run(tmp_path):
    run, model, opts = make(tmp_path / "a")
    walk(run, model)
    again, half, half_opts = make(tmp_path / "b")
    walk(again, half, stop_at=2)
    assert not again.begin_result()
    resumed, other, other_opts = make(tmp_path / "b", seed=7)
    assert resumed.start == 2
    walk(resumed, other)
    assert resumed.begin_result() and equal(flat(model, opts), flat(other, other_opts))


def test_a_checkpoint_names_its_step_settings_and_origin(tmp_path):
    run, model, _ = make(tmp_path, settings=dict(width=4, lr=0.5))
    walk(run, model)
    with safe_open(tmp_path / CHECKPOINT, "pt") as f:
        header = f.metadata()
    assert header["step"] == "4" and json.loads(header["settings"]) == dict(width=4, lr=0.5)
    assert header["torch"] == torch.__version__ and header["commit"]


def test_config_json_holds_settings_command_versions_and_device(tmp_path):
    make(tmp_path, settings=dict(width=4))
    kept = strict((tmp_path / "run.json").read_text())
    assert kept["settings"] == dict(width=4) and kept["seed"] == 0
    assert all(kept[k] for k in ("command", "commit", "python", "torch", "transformers", "numpy", "device"))


def test_a_machine_without_git_is_no_obstacle(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert running.commit.__wrapped__() == "unknown"


def test_a_changed_setting_is_refused_by_name_with_both_values(tmp_path):
    run, model, _ = make(tmp_path, settings=dict(width=4, lr=0.5, gone=1))
    walk(run, model, stop_at=1)
    with pytest.raises(UserError) as error:
        make(tmp_path, settings=dict(width=4, lr=0.25, new=2))
    text = str(error.value)
    assert "lr 0.5 -> 0.25" in text and "gone" in text and "new" in text and "width" not in text and "\n" not in text


def test_another_seed_is_refused(tmp_path):
    run, model, _ = make(tmp_path)
    walk(run, model, stop_at=1)
    other = net()
    with pytest.raises(UserError, match="seed"):
        Run(tmp_path, dict(width=4), 1, 4, dict(policy=other), optimizers([other], 0.01, 0.02, 0.01))


@pytest.mark.parametrize("keep", [0, 7, 200])
def test_a_truncated_checkpoint_is_named_in_one_line(tmp_path, keep):
    run, model, _ = make(tmp_path)
    walk(run, model)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError) as error:
        make(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "delete" in str(error.value)


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:len(content) // 2]
    else:
        content[how] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", -1, 0, 20, 300])                        # bits of weights, length, header
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on_to_the_same_end(tmp_path, capsys, how):
    whole, model, opts = make(tmp_path / "whole", save_every=1)
    walk(whole, model)
    run, other, _ = make(tmp_path / "run", save_every=1)
    walk(run, other, stop_at=3)
    damaged(tmp_path / "run" / CHECKPOINT, how)
    capsys.readouterr()
    resumed, third, third_opts = make(tmp_path / "run", seed=9, save_every=1)
    said = capsys.readouterr().err
    assert resumed.start == 2 and str(tmp_path / "run" / CHECKPOINT) in said and "damaged" in said
    walk(resumed, third)
    assert equal(flat(model, opts), flat(third, third_opts))
    steps = [strict(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


def test_the_last_checkpoints_are_kept_and_their_number_is_a_setting(tmp_path):
    for keep in (1, 3):
        model = net()
        opts = optimizers([model], 0.01, 0, 0.0)
        run = Run(tmp_path / str(keep), {}, 0, 6, dict(policy=model), opts, 1, keep)
        walk(run, model)
        steps = [int(files.read_checked(p)[1]["step"]) for p in run.checkpoints()]
        assert steps == [6, 5, 4][:keep]


def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(tmp_path, monkeypatch):
    run, model, _ = make(tmp_path, save_every=1)
    walk(run, model, stop_at=2)
    monkeypatch.setattr(running, "write_tensors", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    run.save(3)
    with pytest.raises(KeyboardInterrupt):
        run.finish_writing()
    assert not (tmp_path / CHECKPOINT).exists() and make(tmp_path)[0].start == 2


def test_a_checkpoint_is_of_the_step_at_which_it_was_asked_for(tmp_path, monkeypatch):
    """It is written beside the steps: they go on while the file is not there yet, and do not change what is in it."""
    run, model, opts = make(tmp_path)
    go_on = threading.Event()
    write = files.write_tensors
    monkeypatch.setattr(running, "write_tensors", lambda *args, **kw: go_on.wait(30) and write(*args, **kw))
    want = flat(model, opts)
    run.save(1)
    with torch.no_grad():
        model[0].weight.zero_()
    assert not (tmp_path / CHECKPOINT).exists()
    go_on.set()
    run.finish_writing()
    found, header = files.read_checked(tmp_path / CHECKPOINT)
    assert equal(want, found) and header["step"] == "1"


def test_a_half_written_last_row_of_the_log_is_dropped(tmp_path):
    run, model, _ = make(tmp_path, save_every=1)
    walk(run, model, stop_at=2)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    resumed, model, _ = make(tmp_path)
    walk(resumed, model)
    assert [strict(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_the_best_by_validation_is_the_highest_mean_pair_accuracy_and_a_new_run_forgets_it(tmp_path):
    def figures(a, b):
        return {"synthetic/depth/pairs": a, "synthetic/normal/pairs": b, "synthetic/depth/abs_rel": 9.0}

    make(tmp_path)
    assert is_best(tmp_path, figures(0.5, 0.6))
    files.write_json(tmp_path / "best.json", dict(step=1, score=mean_accuracy(figures(0.5, 0.6))))
    assert not is_best(tmp_path, figures(0.5, 0.6)) and not is_best(tmp_path, figures(math.nan, 0.9))
    assert not is_best(tmp_path, {}) and is_best(tmp_path, figures(0.9, 0.3))
    make(tmp_path)
    assert is_best(tmp_path, figures(0.1, 0.1))


def test_no_partial_file_is_left_and_saves_happen_on_time(tmp_path, monkeypatch):
    saved = []
    real = Run.save
    monkeypatch.setattr(Run, "save", lambda self, step: (saved.append(step), real(self, step)))
    run, model, _ = make(tmp_path, steps=5, save_every=2)
    walk(run, model)
    assert saved == [2, 4, 5]
    assert {p.name for p in tmp_path.iterdir()} == {CHECKPOINT, "checkpoint-00000004.safetensors", "run.json",
                                                    "metrics.jsonl"}


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run, model, _ = make(tmp_path)
    walk(run, model, stop_at=2)
    old = (tmp_path / CHECKPOINT).read_bytes()
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    run.save(3)
    with pytest.raises(OSError, match="disk full"):
        run.finish_writing()
    assert (tmp_path / CHECKPOINT).read_bytes() == old


def test_a_full_disk_is_one_line_whoever_writes(tmp_path, small_files, capsys):
    def fails(write):
        with small_files(1000), pytest.raises(SystemExit, match="2"):
            run_command(write, "x.py")
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "File too large" in said and "make room" in said
        return said
    weights = dict(a=torch.zeros(1000))
    fails(lambda: save_file(weights, tmp_path / "a"))                           # the net: a writer that names no file
    assert str(tmp_path / "b") in fails(lambda: files.write_tensors(tmp_path / "b", weights))
    assert str(tmp_path / "c") in fails(lambda: files.write_json(tmp_path / "c", list(range(1000))))
    assert not list(tmp_path.glob("[bc]*"))


def test_text_is_utf8_in_any_locale(tmp_path):
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")                                      # it has ASCII
    try:
        files.write_text(tmp_path / "a", "\u00e9")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert (tmp_path / "a").read_bytes() == "\u00e9".encode()


# updates ----------------------------------------------------------------------------------------------------------

def test_a_map_that_is_not_finite_is_named_with_its_photo_and_step(tmp_path):
    run, _, _ = make(tmp_path)
    maps = torch.zeros(3, 2, 4)
    maps[1, 0, 2] = math.inf
    for step, _ in run.steps("toy"):
        run.where = ["a.jpg", "b.jpg", "c.jpg"]
        if step == 2:
            with pytest.raises(NotFinite, match=r"step 2: depth map is not finite \(photos: b.jpg\)"):
                run.check(map={"normal": torch.zeros(3, 5), "depth": maps})
        run.check(map={"depth": maps.nan_to_num(posinf=0)})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_stops_the_run_and_changes_nothing(tmp_path, bad):
    run, model, opts = make(tmp_path)
    walk(run, model, stop_at=1)
    before = flat(model, opts)
    with pytest.raises(FloatingPointError, match="loss"):
        run.update(model(torch.ones(1, 4)).sum() * bad, [list(model.parameters())], 1.0)
    assert equal(before, flat(model, opts))


def test_a_non_finite_gradient_stops_the_run_and_changes_nothing(tmp_path):
    run, model, opts = make(tmp_path)
    walk(run, model, stop_at=1)
    before = flat(model, opts)
    with pytest.raises(FloatingPointError, match=r"step 0: gradient of policy/0\.weight is not finite"):    # sqrt at 0
        run.update((model(torch.ones(1, 4)) * 0).square().sum().sqrt(), [list(model.parameters())], 1.0)
    assert equal(before, flat(model, opts))


def test_the_gradient_that_is_not_finite_is_named_and_no_other(tmp_path):
    run, model, _ = make(tmp_path)
    model[2].bias.register_hook(lambda g: g * torch.nan)
    with pytest.raises(FloatingPointError, match=r"gradient of policy/2\.bias is not finite"):
        run.update(model(torch.ones(2, 4)).square().sum(), [list(model.parameters())], 1.0)


def test_at_several_ranks_the_first_bad_map_is_what_is_told(tmp_path, monkeypatch):
    """`check` cannot raise there, lest the others wait: a second finding must not change or break the first."""
    run, _, _ = make(tmp_path)
    for module in (ranks, running):
        monkeypatch.setattr(module, "world", lambda: 2)
    run.where = ["good.jpg", "bad.jpg"]
    maps = torch.tensor([[1.0], [torch.nan]])
    run.check(map={"depth": maps}, reward={"depth": maps})
    run.check(reward={"depth": maps})
    assert "depth map is not finite (photos: bad.jpg)" in run.problem and "reward" not in run.problem


def test_update_returns_the_norm_before_clipping_and_clips_each_list(tmp_path):
    run, model, opts = make(tmp_path)
    first, second = list(model[0].parameters()), list(model[2].parameters())
    after = []
    opts[0].register_step_pre_hook(lambda *_: after.extend(                     # what the optimizer is given
        torch.stack([p.grad.norm() for p in part]).norm().item() for part in (first, second)))
    norm = run.update(1e3 * model(torch.ones(2, 4)).square().sum(), [first, second], 0.0)
    assert norm > 10 and len(after) == 2
    assert all(abs(n - 1) < 1e-3 for n in after)                                # clip_grad_norm_ divides by norm + 1e-6


def test_portions_gathered_by_backward_are_one_update_and_leave_nothing_behind(tmp_path):
    whole, model, _ = make(tmp_path / "whole")
    parts, other, _ = make(tmp_path / "parts")
    other.load_state_dict(model.state_dict())
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole.update(model(x).square().mean(), [list(model.parameters())], 1.0)
    for part in x.split(2):
        parts.backward(other(part).square().mean() / 3)
    parts.update(None, [list(other.parameters())], 1.0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6) and q.grad is None


def test_the_factor_scales_the_peak_learning_rate(tmp_path):
    run, model, opts = make(tmp_path)
    run.update(model(torch.ones(2, 4)).sum(), [list(model.parameters())], 0.25)
    assert [g["lr"] for o in opts for g in o.param_groups] == [0.25 * g["peak"] for o in opts for g in o.param_groups]


# logs -------------------------------------------------------------------------------------------------------------

def test_the_log_is_one_strict_json_object_a_line(tmp_path):
    run, model, _ = make(tmp_path)
    walk(run, model)
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(row["grad/norm"] > 0 for row in rows)


def test_a_value_that_is_not_a_number_still_logs_strict_json(tmp_path):
    run, _, _ = make(tmp_path, steps=1)
    for step, _ in run.steps("toy"):
        run.log(step, dict(good=torch.tensor(2.0)), bad=math.nan)
    row = strict((tmp_path / "metrics.jsonl").read_text())
    assert row["good"] == 2 and row.get("bad") is None


def test_written_json_is_strict(tmp_path):
    files.write_json(tmp_path / "a.json", dict(tables=[dict(x=math.nan)], y=1.5))
    assert strict((tmp_path / "a.json").read_text()) == dict(tables=[dict(x=None)], y=1.5)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_after_a_crash_every_step_is_logged_once(tmp_path):
    run, model, _ = make(tmp_path, steps=5, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        for step, _ in run.steps("toy"):
            run.update(model(torch.ones(1, 4)).sum(), [list(model.parameters())], 1.0)
            run.log(step, {})
            if step == 2:
                raise KeyboardInterrupt                                         # step 2 is logged and not yet saved
    run, model, _ = make(tmp_path, steps=5, save_every=2)
    walk(run, model)
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]


# commands ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [UserError("no such\nthing"), ValueError("no such thing"),
                                   FileNotFoundError("no such thing"), FileNotFoundError(2, "no such thing", "x.png")])
def test_a_user_error_is_one_line_and_exit_code_two(capsys, error):
    def fail():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_command(fail, "train.py")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("train.py: ") and "no such thing" in err


def test_an_error_that_names_its_command_is_not_prefixed_twice(capsys):
    def fail():
        raise UserError("train.py: got no GPU")
    with pytest.raises(SystemExit):
        run_command(fail, "train.py")
    assert capsys.readouterr().err == "train.py: got no GPU\n"


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device", "out/x"), "out/x: No space left"),
    (OSError(30, "Read-only file system", "out/x"), "check --out"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "20.00 GiB"),
    (RuntimeError("[enforce fail] CPUAllocator: can't allocate memory: you tried to allocate 64 bytes."), "--micro"),
    (MemoryError(), "out of memory"), (NotFinite(3, "grpo: step 3: loss is nan"), "step 3: loss is nan")])
def test_disk_memory_and_numbers_are_one_line_that_says_what_to_do(capsys, error, words):
    def fail():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_command(fail, "train.py")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words in err


def test_a_bug_keeps_its_traceback():
    def fail():
        raise TypeError("a bug")
    with pytest.raises(TypeError):
        run_command(fail, "train.py")


def test_interrupting_says_how_to_go_on(capsys):
    def stop():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as end:
        run_command(stop, "train.py")
    assert end.value.code == 130 and "resume" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from runtime.config import Config
    with pytest.raises(UserError, match="--device cpu"):
        ranks.setup(Config(device="cuda"))


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("conftest keeps tests off it")
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.pick_device("auto", "judge.py") == torch.device("cuda", 1) and taken == [1]
    assert ranks.pick_device("cpu", "judge.py") == torch.device("cpu") and taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="judge.py: process 2 of this machine has no GPU.*--nproc_per_node=2"):
        ranks.pick_device("auto", "judge.py")
