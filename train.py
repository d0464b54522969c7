"""Train: `--stage base` (flow matching), `--stage judge`, `--stage grpo`, or all three and a before/after table.

    python train.py                                      preset mini: 2 CPU cores, no downloads
    python train.py --stage grpo --images DIR            GRPO on your own photos
    torchrun --nproc_per_node=8 train.py --stage grpo    a share of the photos on each process

Each stage is one loop; the same command again resumes. A group stays on one rank.
"""
import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import data
import eval as evaluation
import grpo
import kernels
import runtime
from bank import Bank
from config import parse
from judge import MiniJudge, Probe, build_mini, judge_loss, load_judge
from predictor import NAMES, DiT, DiTConfig, flow_loss, load_predictor, times
from relations import MODALITIES, at_points, relation, soft_relation
from runtime import Run, UserError, cosine, ema_update

GRPO_SETTINGS = ("images", "policy", "judge", "photos", "pairs", "bank_pairs", "group", "sample_steps", "noise",
                 "exploration", "credit", "credit_width", "rollout", "reward", "tau", "window", "modalities", "norm",
                 "balance", "steps", "batch", "updates", "clip", "kl_weight", "replay", "lr", "ema", "size")
DIT_SETTINGS = ("size", "width", "encoder_layers", "layers", "heads", "patch")
SEEDS = dict(base=1, judge=2, grpo=3, photos=4)      # streams of random numbers, one per purpose


def settings(cfg, *names, prefix=None):
    """The settings that a run may not change when it resumes."""
    return {k: v for k, v in asdict(cfg).items() if k in names or (prefix and k.startswith(prefix))}


def shares(total, name):
    """This rank's share of a batch. raises UserError when it does not divide."""
    if total % runtime.world():
        raise UserError(f"train.py: --{name} {total} is not divisible by {runtime.world()} processes; "
                        f"use a multiple of {runtime.world()}")
    return total // runtime.world()


def base(cfg, device):
    """Flow matching on synthetic scenes with ground truth; writes OUT/base."""
    policy = DiT(DiTConfig(cfg.patch, cfg.width, cfg.encoder_layers, cfg.layers, cfg.heads), seed=cfg.seed).to(device)
    average = copy.deepcopy(policy).requires_grad_(False)
    params = list(policy.parameters())
    optimizer = torch.optim.AdamW(params, lr=cfg.base_lr, betas=(0.9, 0.98), weight_decay=0.01)
    batch = shares(cfg.base_batch, "base-batch")
    run = Run(Path(cfg.out) / "base", settings(cfg, *DIT_SETTINGS, prefix="base_"), cfg.seed, cfg.base_steps,
              dict(policy=policy, average=average), optimizer, cfg.save_every)
    if run.start < run.steps:
        scenes = data.ScenePool("synthetic", "train", cfg.base_scenes, cfg.size)
    for step in run.loop("base", cfg.stop_at):
        rng = run.rng(step, SEEDS["base"])
        maps = scenes.draw(batch, rng, device)
        loss = flow_loss(policy, maps, tuple(MODALITIES), rng)
        norm = run.update(loss, [params], cfg.base_lr * cosine(step, cfg.base_steps, warmup=100))
        ema_update(average, policy, min(cfg.base_ema, (step + 1) / (step + 10)))
        run.log(step, show=("loss",), **{"loss": loss.detach(), "grad/norm": norm})
    if run.finished():
        average.save(run.folder, base="none", trained_on="synthetic scenes")


def judge(cfg, device):
    """Train the judge on broad scenes with ground truth; writes OUT/judge (a native transformers folder)."""
    sizes = MiniJudge(cfg.size, cfg.judge_patch, cfg.judge_width, cfg.judge_vision_layers, cfg.judge_text_layers, cfg.judge_heads)
    model = build_mini(sizes, runtime.generator(cfg.seed, SEEDS["judge"])).to(device)
    probe = Probe(sizes, runtime.generator(cfg.seed, SEEDS["judge"], 1)).to(device)
    vision = [*model.model.model.vision_tower.parameters(), *probe.parameters()]
    text = [p for name, p in model.model.named_parameters() if ".vision_tower." not in name]
    optimizer = torch.optim.AdamW(vision + text, lr=cfg.judge_lr, betas=(0.9, 0.98), weight_decay=cfg.judge_decay)
    batch, warm = shares(cfg.judge_batch, "judge-batch"), int(cfg.judge_warm * cfg.judge_steps)
    run = Run(Path(cfg.out) / "judge", settings(cfg, "size", prefix="judge_"), cfg.seed, cfg.judge_steps,
              dict(judge=model, probe=probe), optimizer, cfg.save_every)
    if run.start < run.steps:
        scenes = data.ScenePool("broad", "train", cfg.judge_scenes, cfg.size)
    for step in run.loop("judge", cfg.stop_at):
        rng = run.rng(step, SEEDS["judge"])
        maps = scenes.draw(batch, rng, device)
        loss, stats = judge_loss(model, probe, maps, answers=step >= warm, rng=rng)
        norm = run.update(loss, [vision, text], cfg.judge_lr * cosine(step, cfg.judge_steps, warmup=100))
        run.log(step, show=("loss/pairs", "loss/answers"), **stats, **{"grad/norm": norm})
    if run.finished():
        model.save(run.folder)


def photos_of(cfg):
    """Unlabeled training photos as uint8 (n, 3, S, S) and a word for what they are."""
    if cfg.images:
        photos = data.Photos(cfg.images, cfg.size)
        used = photos.images[:cfg.photos]
        return used, f"{len(used)} photos of {cfg.images} ({len(photos.skipped)} unreadable)"
    pool = data.ScenePool("wild", "train", cfg.photos, cfg.size, keys=("rgb",))
    return (pool.maps["rgb"].float() * 255).round().to(torch.uint8), f"{cfg.photos} procedural wild photos"


def agreement_of(pred, pts, prob, modality, cfg):
    """Agreement of each sample's map with the judge on each pair, and the weight of each pair in the reward.

    pred (B, G, C, H, W); pts (B, P, 2, 2); prob (B, P) of the first answer -> agree (B, G, P) in [0, 1], weight (B, P)
    """
    if cfg.reward == "hard":
        agree = 0.5 + 0.5 * relation(pred, pts[:, None], modality, cfg.window) * (2 * prob - 1).sign()[:, None]
    else:
        agree = 0.5 + 0.5 * soft_relation(pred, pts[:, None], modality, cfg.tau, cfg.window) * (2 * prob - 1)[:, None]
    weight = torch.full_like(prob, 1 / prob.shape[1])
    if cfg.balance and modality == "albedo":                                    # both answers carry half of the reward
        weight = 0.5 * (prob / prob.sum(1, keepdim=True).clamp_min(1e-6)
                        + (1 - prob) / (1 - prob).sum(1, keepdim=True).clamp_min(1e-6))
    return agree, weight


def credit_of(agree, weight, pts, size, cfg):
    """Advantage of each sample: (B, G), or (B, G, h, w) for per-pair credit. Also the reward (B, G)."""
    reward = (agree * weight[:, None]).sum(-1)                                  # (B, G)
    if cfg.credit == "global":
        return grpo.group_advantage(reward, cfg.norm), reward
    credit = grpo.pair_credit(agree, weight, pts, size, cfg.credit_width)
    if cfg.norm == "none":
        return credit, reward
    axes = (1, 2, 3) if cfg.norm == "group" else (0, 1, 2, 3)
    scale = credit.square().mean(axes, keepdim=True).sqrt()
    return torch.where(scale > 0, credit / scale.clamp_min(1e-12), 0.0), reward


def tune(cfg, device):
    """GRPO against the frozen judge, without ground truth; writes OUT/grpo. Returns the run."""
    policy = load_predictor(cfg.policy or Path(cfg.out) / "base").to(device)
    ref, average = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))
    params = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    batch = shares(cfg.batch, "batch")
    run = Run(Path(cfg.out) / "grpo", settings(cfg, *GRPO_SETTINGS), cfg.seed, cfg.steps,
              dict(policy=policy, average=average), optimizer, cfg.save_every)
    if run.start < run.steps:
        photos, what = photos_of(cfg)
        judge_model = load_judge(cfg.judge or Path(cfg.out) / "judge").to(device)
        bank = Bank(cfg.bank or Path(cfg.out) / "bank", judge_model)
        bank_pts, bank_prob = bank.fill(photos, cfg.bank_pairs, device)
        if runtime.rank() == 0:
            print(f"grpo: {what}; bank: {bank.asked} pairs asked, {bank.known} already known", flush=True)
        replay = data.ScenePool("synthetic", "train", cfg.base_scenes, cfg.size) if cfg.replay else None
    step_rule, grid = grpo.STEPS[cfg.exploration], times(cfg.sample_steps)

    for step in run.loop("grpo", cfg.stop_at):
        rng = run.rng(step, SEEDS["grpo"])
        picked = torch.randint(len(photos), (batch,), generator=rng)
        rgb = photos[picked].to(device).float() / 255                           # (B, 3, H, W)
        names = NAMES if cfg.modalities == "joint" else (NAMES[int(torch.randint(4, (1,), generator=rng))],)
        M, B = len(names), batch
        index = torch.tensor([NAMES.index(m) for m in names], device=device).repeat_interleave(B)    # (M*B,)
        chosen = torch.stack([torch.randperm(cfg.bank_pairs, generator=rng)[:cfg.pairs] for _ in range(B)])
        pts = bank_pts[picked[:, None], chosen].to(device)                      # (B, P, 2, 2)
        prob = bank_prob[picked[:, None], chosen].to(device)                    # (B, P, 4)

        def velocity_of(net, cond, x, t, repeats=1):
            return net.velocity(x, t, cond.repeat_interleave(repeats, 0), index.repeat_interleave(repeats))

        with torch.no_grad():
            cond = policy.encode(rgb).repeat(M, 1, 1)
            x = torch.randn(M * B, *policy.shape(rgb), generator=rng).to(device)   # shared by the group
            x0, taken = grpo.rollout(lambda x, t, n: velocity_of(policy, cond, x, t, n), x, grid, cfg.group, cfg.rollout,
                                     step_rule, cfg.noise, rng)                 # x0 (M*B, G, c, h, w)
            advantage, stats = [], {}
            for m, part in zip(names, x0.split(B), strict=True):
                pred = policy.decode(part.flatten(0, 1), m).unflatten(0, (B, cfg.group))
                agree, weight = agreement_of(pred, pts, prob[..., NAMES.index(m)], m, cfg)
                adv, reward = credit_of(agree, weight, pts, x0.shape[-2:], cfg)
                advantage.append(adv)
                stats |= {f"reward/{m}": reward.mean(), f"reward/{m}_spread": reward.std(1, correction=0).mean(),
                          f"reward/{m}_unanimous": (reward == reward[:, :1]).all(1).float().mean()}
            advantage = torch.cat(advantage)                                    # (M*B, G) or (M*B, G, h, w)
            cond_ref = ref.encode(rgb).repeat(M, 1, 1)
        for update in range(cfg.updates):
            cond = policy.encode(rgb).repeat(M, 1, 1)
            loss, parts = 0.0, []
            for one in taken:
                t = torch.full((len(one.x),), one.t, device=device)
                v = velocity_of(policy, cond, one.x, t, len(one.x) // (M * B))
                with torch.no_grad():
                    v_ref = velocity_of(ref, cond_ref, one.x, t, len(one.x) // (M * B))
                adv = advantage if cfg.rollout == "branch" else advantage.flatten(0, 1)[:, None]
                term, part = grpo.step_loss(v, v_ref, one, step_rule, cfg.noise, adv, cfg.clip, cfg.kl_weight)
                loss = loss + term / len(taken)
                parts.append(part)
            if update == 0 and any(p["ratio_min"] != 1 or p["ratio_max"] != 1 for p in parts):
                raise FloatingPointError(f"grpo: step {step}: ratio is not 1 before the first update; "
                                         "the rollout and the update computed different velocities")
            if cfg.replay:
                maps = replay.draw(batch, rng, device)
                loss = loss + cfg.replay * flow_loss(policy, maps, names, rng)
            norm = run.update(loss, [params], cfg.lr * cosine(step, cfg.steps, warmup=10))
        ema_update(average, policy, min(cfg.ema, (step + 1) / (step + 10)))
        stats |= {f"policy/{k}": f([p[k] for p in parts]) for k, f in
                  dict(ratio_min=min, ratio_max=max, clip_frac=mean, kl=mean).items()}
        if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step == 0):
            stats |= evaluation.diagnose(average, cfg.size, cfg.eval_steps)
        stats["reward"] = sum(stats[f"reward/{m}"] for m in names) / M
        run.log(step, show=("reward", "policy/kl"), **stats, **{"grad/norm": norm, "loss": loss.detach()})
    if run.finished():
        average.save(run.folder, base=str(cfg.policy or Path(cfg.out) / "base"), trained_on=cfg.images or "procedural wild photos")
    return bank_prob if run.start < run.steps else None


def mean(values):
    return sum(values) / len(values)


def main(argv=None):
    preset, cfg, dry_run = parse(argv)
    device = runtime.setup(cfg)
    base(cfg, device)
    judge(cfg, device)
    tune(cfg, device)

if __name__ == "__main__":
    runtime.run_command(main, "train.py")
