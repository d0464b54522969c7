"""What a step costs a GPU beside arithmetic, counted without one: host waits, copies to it, launches, casts.

    python tests/counts.py        the table of bench/RESULTS.md

Whole steps of train.train_grpo, train_base and train_judge on the stand-in (standin.py). The counts depend on the
number of layers, steps, modalities and portions, not on sizes: layers are those of the preset or of the published
network, widths and photos are small. Kernels take their torch path, which launches more than Triton's.
"""
import argparse
import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from standin import CUDA, Operators, StandIn, install  # noqa: E402

import kernels  # noqa: E402
import train  # noqa: E402
from bench import measure, policy  # noqa: E402
from data import pools, scenes  # noqa: E402
from models.dit import DiT, DiTConfig  # noqa: E402
from runtime.flags import parse  # noqa: E402
from runtime.run import Run  # noqa: E402

SMALL = """--preset small --size 32 --width 32 --heads 2 --patch 8 --judge-width 32 --judge-heads 2 --judge-patch 8
    --base-scenes 4 --judge-scenes 4 --photos 4 --base-batch 2 --judge-batch 4 --pairs 4 --bank-pairs 8 --group 2
    --eval-every 0 --save-every 100 --steps 2 --base-steps 2 --judge-steps 2 --judge-warm 0 --kernels torch""".split()
PAPER = """--preset paper --stage grpo --policy P --judge J --images I --batch 1
    --size 64 --sample-steps 3 --group 4 --pairs 4 --bank-pairs 4
    --photos 2 --eval-every 0 --save-every 100 --steps 2 --kernels torch --exploration ddim""".split()
# the published layers, thin
THIN = measure.SD2 | dict(
    unet=measure.SD2["unet"] | dict(block_out_channels=[16, 16, 32, 32], attention_head_dim=[1, 1, 2, 2],
                                    norm_num_groups=8, cross_attention_dim=24),
    vae=measure.SD2["vae"] | dict(block_out_channels=[8, 8, 16, 16], norm_num_groups=8))
CASES = {  # name: stage, flags
    "small, base": ("base", SMALL),
    "small, judge": ("judge", SMALL),
    "small, GRPO": ("grpo", SMALL),
    "Marigold, all states at once": ("grpo", PAPER),
    "Marigold, --micro 1 --checkpointing": ("grpo", [*PAPER, "--micro", "1", "--checkpointing"]),
    "Marigold, --micro 4 --checkpointing --lora 16": (
        "grpo", [*PAPER, "--micro", "4", "--checkpointing", "--lora", "16"]),
}


def count_step(name, *flags):
    """Counts of the second step of a case: dict waits, copies, launches, casts; and its waits by kind."""
    stage, given = CASES[name]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as out:
        install(patch, bf16=True)
        patch.setitem(scenes.CHUNK, "cuda", 1 << 12)
        cfg = parse([*given, *flags, "--out", out])[1]
        cfg = dataclasses.replace(cfg, images="", judge="oracle")
        seen = []
        log = Run.log

        def snapshot(run, *args, **kwargs):
            log(run, *args, **kwargs)
            seen.append((dict(standin.waits), standin.copies, counter.launches, counter.casts))

        patch.setattr(Run, "log", snapshot)
        patch.setattr(train, "load_predictor", lambda _: make_policy(given, cfg))
        patch.setattr(train, "weights_digest", lambda _: "")
        kernels.use("torch")
        pools.scene_pool.cache_clear()
        with contextlib.redirect_stdout(None), StandIn() as standin, Operators(standin) as counter:
            train.STAGES[stage](cfg, CUDA)
        kernels.use("auto")
        pools.scene_pool.cache_clear()
    first, second = seen[:2]
    kinds = {k: n - first[0].get(k, 0) for k, n in second[0].items() if n != first[0].get(k, 0)}
    rest = [b - a for a, b in zip(first[1:], second[1:], strict=True)]
    return dict(waits=sum(kinds.values()), copies=rest[0], launches=rest[1], casts=rest[2]), kinds


def make_policy(given, cfg):
    """The network of a case, on the CPU."""
    if given[:len(PAPER)] == PAPER:
        return policy.build_policy(dataclasses.replace(measure.TINY, sd2=THIN), torch.device("cpu"))
    return DiT(DiTConfig.of(cfg))


def main():
    """Print the table."""
    p = argparse.ArgumentParser()
    p.add_argument("--kinds", action="store_true", help="show what waits")
    p.add_argument("--case", default="")
    args = p.parse_args()
    for name in CASES:
        if args.case in name:
            counts, kinds = count_step(name)
            print(f"| {name} | " + " | ".join(f"{n:,}" for n in counts.values()) + " |", kinds if args.kinds else "",
                  flush=True)


if __name__ == "__main__":
    main()
