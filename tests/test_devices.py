"""Every path of training and inference keeps its tensors on one device, and waits for a GPU only where it must.

Without a GPU: on the stand-in of standin.py, where a tensor left on the CPU raises as it would on a GPU.
"""
import copy
import dataclasses
from types import SimpleNamespace

import chat
import pytest
import test_marigold
import torch
import torch._dynamo  # before torch's calls are watched
from expect import seeded
from one_step import Gather, batch_of, explore, learn
from standin import CUDA, Generator, StandIn, install, marked
from test_train import TINY

import kernels
import relations
import train
from bench import baselines, measure, policy
from bench import system as bench
from data import scenes
from data.pools import ScenePool, scene_pool
from evaluation import report
from evaluation.scores import predict_maps
from evaluation.watch import diagnose
from judge import load_judge
from models import families
from models.copies import Networks, frozen_copy
from models.dit import DiT, DiTConfig
from models.finetune import add_lora, sentence_loss
from predictor import load_predictor, photo_maps
from runtime import files, ranks
from runtime.flags import parse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs on the GPU that is there")


@pytest.fixture
def watch(monkeypatch):
    """The stand-in, entered: torch and the project believe in a GPU."""
    install(monkeypatch)
    monkeypatch.setitem(scenes.CHUNK, "cuda", 1 << 12)                          # pixels: toy scenes, toy batches
    kernels.use("torch")
    with StandIn() as standin:
        yield standin
    kernels.use("auto")


def test_the_stand_in_refuses_what_a_gpu_refuses(watch):
    here, there = torch.ones(3), torch.arange(3.0).to("cuda")
    assert marked(there) and there.device == CUDA and here.device.type == "cpu" and there.is_cuda
    assert marked(there[there > 0] * 2 + torch.tensor(1.0)) and marked(there[torch.tensor([0, 2])])
    for mixed in (lambda: here + there, lambda: torch.cat((here, there)), lambda: here[there.long()],
                  lambda: there.numpy(), lambda: torch.stack((there[0], torch.tensor(1.0))),
                  lambda: torch.randn(2, generator=seeded(), device="cuda"),
                  lambda: torch.randn(2, generator=Generator())):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
    net = torch.nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        net(there)
    net = copy.deepcopy(net.to("cuda"))
    out = net(there)
    assert marked(out) and marked(net.weight) and watch.waits["to the GPU"] > 0
    out.sum().backward()
    assert marked(net.weight.grad) and not marked(out.cpu()) and watch.waits["cpu"] == 1
    with torch.device("cuda"):
        assert marked(torch.zeros(2)) and marked(torch.arange(2))
    assert watch.waits["tolist"] == 0 and there.tolist() == [0, 1, 2] and watch.waits["tolist"] == 1


def test_all_stages_and_the_tables_run_on_a_gpu_and_resume(watch, monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "setup", lambda cfg: CUDA)
    monkeypatch.setattr(report, "bootstrap_interval", lambda *_, **__: (0.0, 0.0, 0.0))         # numpy, and slow
    waits, stages = {}, train.run_stage

    def run_stage(stage, cfg, device):
        watch.waits.clear()
        stages(stage, cfg, device)
        waits[stage.__name__] = {k: n for k, n in watch.waits.items() if k != "cpu"}      # checkpoints

    monkeypatch.setattr(train, "run_stage", run_stage)
    args = [*TINY, "--out", str(tmp_path), "--precision", "fp32", "--kernels", "torch", "--save-every", "100",
            "--base-steps", "3", "--base-scenes", "16", "--judge-scenes", "16",
            "--judge-steps", "3", "--steps", "3", "--group", "2", "--sample-steps", "3",
            "--eval-every", "3", "--noise-blocks", "1,2", "--eval-images", "2", ]
    train.main([*args, "--stop-at", "2"])                                       # of base
    train.main(args)
    assert {p.name for p in tmp_path.iterdir()} >= {"base", "judge", "grpo", "bank", "report.json", "panel.png"}
    assert [len(files.read_log(tmp_path / s / "metrics.jsonl")) for s in ("base", "judge", "grpo")] == [3, 3, 3]
    # one step: the norms with what else decides whether it goes on, then the log
    assert "__bool__" not in waits["train_base"] and waits["train_base"]["tolist"] == 2


def tiny(flags=""):
    """Settings, a policy and its reference on the stand-in, photos and judgements on the CPU."""
    cfg = parse(["--stage", "grpo", "--policy", "P", "--judge", "J", *TINY, "--precision", "fp32", "--pairs", "6",
                 "--bank-pairs", "8", *flags.split()])[1]
    policy = DiT(DiTConfig(16, 4, 32, 1, 1, 2)).to(CUDA)
    torch.nn.init.normal_(policy.head.weight, std=0.1, generator=Generator())
    policy.checkpointing(cfg.checkpointing)
    photos = torch.randint(256, (5, 3, 16, 16), generator=seeded()).byte()
    pts = relations.sample_pairs(5, (16, 16), cfg.bank_pairs, seeded(1), grid=4)
    prob = torch.rand(5, cfg.bank_pairs, 4, generator=seeded(2))
    return cfg, policy, frozen_copy(policy), (photos, pts, prob)


@pytest.mark.parametrize("flags", [
    "", "--reward confidence --rollout full --tail 0 --norm group",
    "--rollout 2 --tail 0 --reward soft",
    "--micro 3 --checkpointing", "--estimator paper"])
def test_a_step_of_grpo_stays_on_its_device(watch, flags):
    cfg, policy, ref, bank = tiny(flags)
    rng, run = seeded(3), Gather()
    batch = batch_of(cfg, policy, *bank, rng, CUDA)
    watch.waits.clear()
    taken, advantage, stats = explore(policy, batch, rng)
    parts = learn(policy, ref, batch, taken, advantage, run=run)
    assert parts["policy/ratio_min"] == parts["policy/ratio_max"] == 1
    assert all(map(marked, (taken[0].x_next, advantage, stats["reward"], parts["policy/kl"], batch.pts)))
    assert marked(parts["loss"]) and parts["loss"].isfinite() and all(map(marked, run.losses))
    assert policy.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["ranking", "supervised"])
def test_the_gradients_of_the_baselines_stay_on_their_device(watch, name):
    cfg, policy, ref, bank = tiny("--reward soft")
    batch, run = batch_of(cfg, policy, *bank, seeded(3), CUDA), Gather()
    gradient = baselines.ranking_gradient
    if name == "supervised":
        gradient = baselines.supervised_gradient(scene_pool("wild", "train", 5, 16, device=CUDA))
    stats = gradient(SimpleNamespace(policy=policy, reference=ref), batch, [], None, run)
    assert marked(stats["loss"]) and stats["loss"].isfinite() and all(map(marked, run.losses))
    assert policy.head.weight.grad.abs().sum() > 0


def test_sampling_and_learning_never_wait_for_a_gpu(watch):
    for flags in ("--batch 2", "--batch 4 --group 6", "--batch 2 --micro 3 --checkpointing"):
        cfg, policy, ref, bank = tiny(f"{flags} --noise-blocks 2 --modalities joint")
        rng = seeded(3)
        batch = batch_of(cfg, policy, *bank, rng, CUDA)
        watch.waits.clear()
        taken, advantage, _ = explore(policy, batch, rng)
        learn(policy, ref, batch, taken, advantage)
        assert not sum(watch.waits.values()), watch.waits


@pytest.mark.parametrize("flags", ["--rollout full --micro 3", "--rollout branch --modalities joint --lora 2"])
def test_marigold_learns_and_predicts_on_its_device(watch, monkeypatch, tmp_path, flags):
    with torch.random.fork_rng(devices=[]):
        parts = [test_marigold.fill(x) for x in (
            test_marigold.UNet(test_marigold.unet_config(3) | test_marigold.SMALL),
            test_marigold.VAE(test_marigold.VAE_CONFIG | dict(layers_per_block=1)))]
    policy = test_marigold.Marigold(*parts, test_marigold.Schedule(test_marigold.ZERO_SNR), torch.zeros(1, 2, 12),
                                    test_marigold.index_of("lighting")).to(CUDA)
    cfg = parse([*test_marigold.PAPER, "--policy", "P", "--judge", "J", "--images", "I", *flags.split()])[1]
    rng = seeded(3)
    batch = batch_of(cfg, policy, torch.randint(256, (3, 3, 32, 32)).byte(), torch.randint(32, (3, 8, 2, 2)),
                     torch.rand(3, 8, 4), rng, CUDA)
    watch.waits.clear()
    encoded = []
    encode = type(policy).encode
    monkeypatch.setattr(type(policy), "encode", lambda self, rgb: encoded.append(1) or encode(self, rgb))
    taken, advantage, _ = explore(policy, batch, rng)
    parts = learn(policy, frozen_copy(policy), batch, taken, advantage)
    assert len(encoded) == 2                                                    # explore and learn have a batch each
    assert watch.waits["to the GPU"] == sum(watch.waits.values()) == 1          # the times of the noise levels, once
    assert marked(parts["loss"]) and parts["policy/ratio_min"] == parts["policy/ratio_max"] == 1
    if "branch" in flags:
        return
    assert not any(map(marked, policy.photo_maps(torch.rand(3, 40, 24), ensemble=2, steps=2).values()))
    walked = []
    velocity = type(policy).velocity
    monkeypatch.setattr(type(policy), "velocity", lambda *args: walked.append(1) or velocity(*args))
    maps = predict_maps(policy, torch.rand(2, 3, 32, 32), 2, 0)
    assert len(walked) == 2 and len(maps) == 2 and not any(map(marked, maps.values()))      # one walk for both


def test_under_lora_the_frozen_weights_are_16_bit_and_the_result_is_merged_into_the_published_ones(
        monkeypatch, tmp_path):
    install(monkeypatch, bf16=True)
    cfg = parse([*TINY, "--stage", "grpo", "--policy", "P", "--judge", "J", "--lora", "2"])[1]
    with StandIn():
        nets = Networks(lambda: DiT(DiTConfig(16, 4, 32, 1, 1, 2)), cfg, CUDA)
        base = nets.policy.blocks[0].qkv.base.weight
        assert base.dtype == torch.bfloat16 and nets.reference.blocks[0].qkv.base.weight is base
        layer = nets.average.blocks[0].qkv
        layer.lora_B.data.fill_(0.5)
        nets.save_average(tmp_path)
    start = DiT(DiTConfig(16, 4, 32, 1, 1, 2)).blocks[0].qkv.weight
    want = start + 0.5 * layer.lora_A.sum(0)
    torch.testing.assert_close(DiT.load(tmp_path).blocks[0].qkv.weight, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_judges_answer_on_their_device_and_learn(watch, monkeypatch, tmp_path, kind):
    if kind == "internvl":
        chat.write_original(tmp_path / "judge")
    else:
        chat.need(kind)
        chat.write_qwen(tmp_path / "judge", kind)
        row = families.FAMILIES[kind]
        monkeypatch.setitem(families.FAMILIES, kind, dataclasses.replace(row, size=128))
    judge = load_judge(tmp_path / "judge", CUDA, dtype=torch.float32)
    rgb = torch.rand(2, 3, judge.size, judge.size).to(CUDA)
    pts = relations.sample_pairs(2, (judge.size,) * 2, 3, seeded()).to(CUDA)
    prob = judge.ask(rgb, pts, batch=4)
    assert marked(prob) and prob.shape == (2, 3, 4)
    torch.testing.assert_close(judge.score(relations.draw_markers(rgb, pts)[:, 0], "depth"), prob[:, 0, 0])
    add_lora(judge, seeded(), 2, 4, 0.0)
    loss, n = sentence_loss(judge, rgb, ["depth", "albedo"], [True, False])
    loss.backward()
    assert marked(loss) and n > 4


def test_a_predictor_of_ours_and_the_figures_take_photos_from_the_cpu(watch, tmp_path):
    DiT(DiTConfig(16, 4, 32, 1, 1, 2)).save(tmp_path)
    policy = load_predictor(tmp_path).to(CUDA)
    assert not any(map(marked, photo_maps(policy, torch.rand(3, 20, 33), ensemble=2).values()))
    assert diagnose(policy, 16, 2, n=2)["wild/depth/pairs"] >= 0


def test_rendered_scenes_and_their_pool_are_the_same_on_any_device(watch):
    """Here the devices compute alike; on a GPU numbers differ by rounding (test_gpu.py)."""
    ids = scenes.scene_ids("train", 9)
    made, there = scenes.render_scenes("broad", ids, 16), scenes.render_scenes("broad", ids.to(CUDA), 16)
    assert all(map(marked, there.values())) and not any(map(marked, made.values()))
    assert all((made[k] == there[k].cpu()).float().mean() > 0.99 for k in made)
    pool = ScenePool("broad", "train", 9, 16, device=CUDA)
    assert all(map(marked, pool.maps.values())) and not any(map(marked, pool.all().values()))
    watch.waits.clear()
    picked = pool.pick(torch.tensor([3, 0, 3]), CUDA)
    assert all(map(marked, picked.values())) and not sum(watch.waits.values())
    assert all(torch.equal(picked[k][1].cpu(), pool.all()[k][0]) for k in picked)
    mean = lambda z: [z[k].double().cpu().nan_to_num(posinf=0).mean() for k in ScenePool.KEYS]     # noqa: E731
    torch.testing.assert_close(mean(ScenePool("broad", "train", 9, 16).all()), mean(pool.all()), rtol=1e-2,
                               atol=1e-3)


def test_a_pool_that_does_not_fit_stays_on_the_cpu(watch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (60_000, 1 << 40))        # 6,912 bytes a scene
    small, large = (ScenePool("wild", "train", n, 16, device=CUDA) for n in (3, 4))
    assert all(map(marked, small.maps.values())) and not any(map(marked, large.maps.values()))
    assert all(map(marked, large.pick(torch.tensor([1]), CUDA).values()))


def test_the_benchmark_keeps_to_the_gpu(watch, monkeypatch):
    monkeypatch.setattr(measure, "count_flops", lambda *_: 1.0)
    monkeypatch.setattr(policy, "cpu_row", lambda *_: 1.0)
    monkeypatch.setattr(policy, "policy_tflop", lambda px: (1.0, 100.0))
    for name in ("GPU", "TINY"):                                                # one of both sides
        one_side = dataclasses.replace(getattr(measure, name), sides=getattr(measure, name).sides[:1])
        for module in (measure, policy, bench):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, one_side)
    monkeypatch.setattr(bench, "memory_table", lambda: [dict(px=512, training="LoRA r 16", checkpointing=True)])
    run = measure.Bench(torch.device("cpu"))
    run.device = CUDA
    torch.compiler.set_stance("force_eager")
    for part in (name for name in bench.RUN if name != "kernels"):
        bench.RUN[part](run)
    torch.compiler.set_stance("default")
    assert {row.part for row in run.rows} == {"judge", "policy", "step"}
    assert all(marked(p) for p in run.judge[0].model.parameters())
