"""What only a GPU can show: fp32 parity with the CPU, a ratio of exactly 1 in bf16, the same bits twice, resume.

Runs where there is a GPU. REASONX_TEST_DEVICE=cpu runs every line on a CPU, where parity is trivial.
"""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_marigold
import torch
from expect import seeded
from one_step import batch_of, explore, learn
from safetensors.torch import load_file
from test_train import TINY, log

import relations
from data import scenes
from data.pools import ScenePool
from judge import build_mini_judge
from models.copies import Networks, frozen_copy
from models.dit import DiT, DiTConfig, flow_loss
from models.mini_judge import MiniSizes, Probe, judge_loss
from predictor import Transition
from relations import NAMES
from runtime.flags import parse
from runtime.optimizers import load_state_tensors, optimizers, state_tensors
from runtime.ranks import Draw, on_device

DEVICE = torch.device(os.environ.get("REASONX_TEST_DEVICE", "cuda"))
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def whole_fp32():
    """No TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def predictor_of_ours():
    """A small DiT whose output is not zero, as a fresh one's is."""
    policy = DiT(DiTConfig(32, 4, 64, 2, 2, 4))
    for p in (policy.head.weight, *(b.modulate.weight for b in policy.blocks)):
        torch.nn.init.normal_(p, std=0.1, generator=seeded(1))
    return policy


def assert_close(got, want, part, floor=0.0):
    """Dicts of tensors differ by at most `part` of each tensor's largest element (or by `floor`): gradients are small.

    fp32 sums of another order, a few layers deep, differ by about 1e-6 of it
    """
    assert want.keys() == got.keys()
    for k in want:
        most = max(part * want[k].abs().max().item(), floor)
        torch.testing.assert_close(got[k].cpu(), want[k].cpu(), rtol=0, atol=most, msg=lambda x, k=k: f"{k}: {x}")


def assert_alike(function, *modules, part=1e-4, floor=0.0):
    """function(modules, device) gives the same tensors on the CPU and on the GPU, as assert_close says."""
    want = function(*modules, torch.device("cpu"))
    got = function(*(copy.deepcopy(m).to(DEVICE) for m in modules), DEVICE)
    assert all(x.device.type == DEVICE.type for x in got.values())
    assert_close(got, want, part, floor)


def gradients(*modules):
    return {f"{i} {name}": p.grad for i, m in enumerate(modules) for name, p in m.named_parameters()
            if p.grad is not None}


# parity -----------------------------------------------------------------------------------------------------------

def test_our_predictor():
    def run(policy, device):
        x, rgb = (torch.rand(4, 3, 32, 32, generator=seeded(k)).to(device) for k in (2, 3))
        cond, t = policy.encode(rgb), torch.tensor([1.0, 0.7, 0.3, 0.0]).to(device)
        v = policy.velocity(x, t, cond, torch.arange(4, device=device))
        return dict(cond=cond, v=v, **{m: policy.decode(x - t.view(-1, 1, 1, 1) * v, m) for m in NAMES})
    with torch.no_grad():
        assert_alike(run, predictor_of_ours())


def test_sd2_unet_and_vae():
    unet = test_marigold.fill(test_marigold.UNet(test_marigold.unet_config(3)))
    vae = test_marigold.fill(test_marigold.VAE(test_marigold.VAE_CONFIG))

    def run(unet, vae, device):
        x, text = test_marigold.waves(2, 16, 8, 8).to(device), test_marigold.waves(1, 2, 12, k=1).to(device)
        photo = test_marigold.waves(2, 3, 32, 32, k=2).to(device)
        z = vae.encode(photo)
        return dict(out=unet(x, torch.tensor([3, 900]).to(device), text), z=z, image=vae.decode(z))
    with torch.no_grad():
        assert_alike(run, unet, vae, part=1e-3)


def test_the_judges_scores_and_its_loss():
    sizes = MiniSizes(32, 8, 32, 1, 1, 2)
    judge, probe = build_mini_judge(sizes, seeded()), Probe(sizes, seeded(1))
    maps = ScenePool("broad", "train", 4, 32).all()

    def run(judge, probe, device):
        here = {k: v.to(device) for k, v in maps.items()}
        pts = relations.sample_pairs(4, (32, 32), 3, seeded(2), grid=8).to(device)
        with torch.no_grad():
            prob = judge.eval().ask(here["rgb"], pts)
            score = judge.score(relations.draw_markers(here["rgb"], pts)[:, 0], "normal")
        return dict(prob=prob, score=score)
    assert_alike(run, judge, probe)


def test_rendered_scenes_but_for_pixels_at_edges():
    ids = scenes.scene_ids("train", 6)
    for domain in scenes.DOMAINS:
        here, there = scenes.render_scenes(domain, ids, 64), scenes.render_scenes(domain, ids.to(DEVICE), 64)
        alone = scenes.render_scenes(domain, ids[3:4].to(DEVICE), 64)
        for k in here:
            assert there[k].device.type == DEVICE.type and torch.equal(alone[k], there[k][3:4]), k
            same = torch.isclose(there[k].cpu().double(), here[k].double(), rtol=1e-3, atol=1e-3)
            assert same.double().mean() > 0.99, (domain, k)


@pytest.mark.parametrize("m", NAMES)
def test_relations_and_pairs(m):
    maps = ScenePool("wild", "train", 4, 32).all()
    pts = relations.sample_pairs(4, (32, 32), 200, seeded(3), mask=maps["mask"])
    here, there = relations.relation(maps[m], pts, m), relations.relation(maps[m].to(DEVICE), pts.to(DEVICE), m)
    assert (here == there.cpu()).float().mean() > 0.995 and len(here.unique()) > 1
    drawn = relations.sample_pairs(4, (32, 32), 200, on_device(seeded(3), DEVICE), grid=4)
    assert drawn.device.type == DEVICE.type and (drawn % 4 == 2).all() and drawn.min() >= 0 and drawn.max() < 32
    assert (drawn[..., 0, :] != drawn[..., 1, :]).any(-1).all()


def settings(flags=""):
    return parse(["--stage", "grpo", "--policy", "P", "--judge", "J", "--size", "32", "--batch", "2", "--group", "4",
                  "--sample-steps", "4", "--pairs", "12", "--bank-pairs", "16", "--precision", "fp32",
                  "--noise-blocks", "1,2,4", *flags.split()])[1]


def rows_of(cfg, policy, device):
    """The batch of a step: random photos and judgements."""
    pts = relations.sample_pairs(5, (32, 32), cfg.bank_pairs, seeded(4), grid=4)
    return batch_of(cfg, policy, torch.randint(256, (5, 3, 32, 32), generator=seeded(5)).byte(), pts,
                    torch.rand(5, cfg.bank_pairs, 4, generator=seeded(6)), seeded(7), device)


def moved(x, device):
    """A list of transitions, or tensors, on a device; the squares' sides stay on the CPU."""
    if isinstance(x, list):
        return [moved(one, device) for one in x]
    if isinstance(x, Transition):
        return Transition(**{k: v.to(device) if torch.is_tensor(v) and k != "squares" else v
                             for k, v in vars(x).items()})
    return x.to(device)


@pytest.mark.parametrize("flags", ["", "--rollout full --tail 0 --credit global --modalities one", "--micro 3"])
def test_the_surrogate_of_recorded_steps_and_its_gradients(flags):
    """The policy has moved since, so ratios are not 1 and the KL is not 0."""
    cfg, policy = settings(flags), predictor_of_ours()
    taken, advantage, _ = explore(policy, rows_of(cfg, policy, torch.device("cpu")), seeded(8))
    ref = frozen_copy(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=seeded(9))

    def run(policy, ref, device):
        stats = learn(policy, ref, rows_of(cfg, policy, device), moved(taken, device), moved(advantage, device))
        return dict(**stats, **gradients(policy))
    assert_alike(run, policy, ref, part=1e-3, floor=1e-6)                       # the loss: credits that cancel


# the GPU by itself ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    "", "--rollout full --tail 0", "--checkpointing --credit global", "--micro 3", "--modalities one",
    "--rollout 2 --tail 0 --micro 5 --checkpointing"])
def test_the_ratio_is_exactly_one_in_bf16(flags):
    cfg, policy = settings(f"{flags} --precision bf16"), predictor_of_ours().to(DEVICE)
    policy.checkpointing(cfg.checkpointing)
    batch = rows_of(cfg, policy, DEVICE)
    taken, advantage, _ = explore(policy, batch, seeded(8))
    stats = learn(policy, frozen_copy(policy), batch, taken, advantage)
    assert stats["policy/ratio_min"] == stats["policy/ratio_max"] == 1 and stats["loss"].isfinite()
    assert policy.head.weight.grad.abs().sum() > 0


def small_marigold():
    parts = [test_marigold.fill(x) for x in (
        test_marigold.UNet(test_marigold.unet_config(3) | test_marigold.SMALL),
        test_marigold.VAE(test_marigold.VAE_CONFIG | dict(layers_per_block=1)))]
    return test_marigold.Marigold(*parts, test_marigold.Schedule(test_marigold.ZERO_SNR),
                                  test_marigold.waves(1, 2, 12), test_marigold.index_of("lighting"))


@pytest.mark.parametrize("make", [predictor_of_ours, small_marigold])
def test_a_compiled_rollout_has_ratio_one_and_nearly_the_velocities_of_training(make):
    cfg, policy = settings("--precision bf16 --compile --replay 0"), make().to(DEVICE)
    nets, batch = Networks(lambda: policy, cfg, DEVICE), rows_of(cfg, policy, DEVICE)
    taken, advantage, _ = explore(nets.actor, batch, seeded(8))
    stats = learn(nets.policy, nets.reference, batch, taken, advantage, update=0)
    assert stats["policy/ratio_min"] == stats["policy/ratio_max"] == 1 and stats["loss"].isfinite()
    assert stats["policy/gap"] < 0.05


def test_adamw_goes_on_from_a_checkpoint_of_weights_that_lie_channels_last():
    ends = []
    for resumed in (False, True):
        conv = torch.nn.Conv2d(8, 8, 3)
        with torch.no_grad():
            for p in conv.parameters():
                p.copy_(torch.randn(p.shape, generator=seeded()))
        conv = conv.to(DEVICE, memory_format=torch.channels_last)
        modules, opts = dict(policy=conv), optimizers([conv], 0.01, 0, 0.0)
        for k in range(3):
            conv(torch.rand(2, 8, 5, 5, generator=seeded(k)).to(DEVICE)).square().sum().backward()
            opts[0].step()
            opts[0].zero_grad()
            if resumed:
                load_state_tensors(state_tensors(modules, opts), modules, opts)
        ends.append(conv.weight)
    assert torch.equal(*ends)


def test_the_ratio_of_marigold_is_exactly_one_in_bf16():
    policy = small_marigold().to(DEVICE)
    cfg = settings("--precision bf16 --checkpointing --replay 0")
    policy.checkpointing(True)
    batch = rows_of(cfg, policy, DEVICE)
    taken, advantage, _ = explore(policy, batch, seeded(8))
    stats = learn(policy, frozen_copy(policy), batch, taken, advantage)
    assert stats["policy/ratio_min"] == stats["policy/ratio_max"] == 1


def test_portions_give_the_loss_and_gradients_of_the_whole():
    cfg, policy = settings(), predictor_of_ours().to(DEVICE)
    batch = rows_of(cfg, policy, DEVICE)
    taken, advantage, _ = explore(policy, batch, seeded(8))
    ref, found = frozen_copy(policy), []
    for micro in (0, 3):
        cfg.micro = micro
        policy.zero_grad(set_to_none=True)
        stats = learn(policy, ref, batch, taken, advantage)
        found.append(dict(loss=stats["loss"], **gradients(policy)))
    assert_close(*found, part=1e-3, floor=1e-6)


def test_losses_draw_their_numbers_on_the_gpu_and_alike_each_time():
    sizes = MiniSizes(32, 8, 32, 1, 1, 2)
    judge, probe = build_mini_judge(sizes, seeded()).to(DEVICE), Probe(sizes, seeded(1)).to(DEVICE)
    maps = ScenePool("broad", "train", 4, 32, device=DEVICE).pick(torch.arange(4), DEVICE)
    policy = predictor_of_ours().to(DEVICE)
    first, second = ([flow_loss(policy, maps, NAMES, Draw(seeded(k), 4)),
                      judge_loss(judge, probe, maps, True, Draw(seeded(k), 4))[0]] for k in (1, 1))
    assert all(torch.equal(a, b) and a.isfinite() for a, b in zip(first, second, strict=True))
    assert flow_loss(policy, maps, NAMES, Draw(seeded(2), 4)) != first[0]


# whole runs -------------------------------------------------------------------------------------------------------

def train(out, *flags):
    """python train.py on the device, a process of its own."""
    done = subprocess.run(
        [sys.executable, "train.py", *TINY, "--device", DEVICE.type, "--out", str(out), "--deterministic", *flags],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(out):
    """Every tensor that the stages wrote."""
    return {f"{name}/{k}": v for name in ("base/predictor", "judge/model", "grpo/predictor", "grpo/checkpoint")
            if (out / f"{name}.safetensors").exists() for k, v in load_file(out / f"{name}.safetensors").items()}


def test_two_deterministic_runs_and_a_resumed_one_give_the_same_bits(tmp_path):
    flags = "--noise-blocks", "1,2,4"
    said = train(tmp_path / "a", *flags)
    assert f"seed 0, {DEVICE.type}" in said and (tmp_path / "a" / "report.json").is_file()
    train(tmp_path / "b", *flags)
    given = "--stage", "grpo", "--policy", str(tmp_path / "a" / "base"), "--judge", str(tmp_path / "a" / "judge")
    train(tmp_path / "c", *flags, *given, "--stop-at", "3")
    train(tmp_path / "c", *flags, *given)
    a, b, c = (results(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() > c.keys() and any(k.startswith("grpo/") for k in c)
    assert [k for k in a if not torch.equal(a[k], b[k])] == [] == [k for k in c if not torch.equal(a[k], c[k])]

    def plain(rows):
        return [{k: v for k, v in r.items() if k not in ("seconds", "time/step")} for r in rows]

    assert plain(log(tmp_path / "a" / "grpo")) == plain(log(tmp_path / "b" / "grpo")) == plain(
        log(tmp_path / "c" / "grpo"))
    assert all(r["policy/ratio_min"] == r["policy/ratio_max"] == 1 for r in log(tmp_path / "a" / "grpo"))
