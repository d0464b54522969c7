"""SIGKILL at random moments of base, judge, bank, GRPO and evaluation; the result must be that of an undisturbed run.

    python tests/faults.py --kills 50 [--seed 0]

A round starts a command, kills it, starts the same command again, and so on, then lets it finish and compares every
weight, answer and logged number with the undisturbed run's. Half of the kills come after a random time, half at a
random write, right before or after a file gets its name. Commands are forked from a process that has imported
everything, so a round takes a second.
"""
import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

TINY = """--device cpu --size 16 --width 32 --heads 2 --encoder-layers 1 --layers 1 --patch 4
    --judge-patch 4 --judge-width 32 --judge-heads 2 --judge-vision-layers 1 --judge-text-layers 1 --base-scenes 32
    --base-steps 16 --base-batch 4 --judge-scenes 32 --judge-steps 12 --judge-batch 4 --photos 12 --pairs 8
    --bank-pairs 16 --group 4 --sample-steps 4 --steps 12 --batch 2 --eval-images 4 --eval-steps 2
    --eval-every 3 --save-every 2""".split()
STAGES = ("base", "judge", "bank", "grpo", "eval")
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["faults_child"])


def commands(out, photos):
    """(module, arguments, what it writes under out) of every stage."""
    train = [*TINY, "--out", f"{out}", "--images", f"{photos}", "--stage"]
    return dict(
        base=("train", [*train, "base"], ["base"]), judge=("train", [*train, "judge"], ["judge"]),
        bank=("judge", [f"{photos}", "--bank", f"{out}/bank", "--model", f"{out}/judge", "--pairs", "16",
                        "--device", "cpu"], ["bank"]),
        grpo=("train", [*train, "grpo"], ["photos"]),
        eval=("eval", ["--dataset", "photos", "--data", f"{photos}", "--checkpoint", f"{out}/photos", "--out", f"{out}",
                       "--json", f"{out}/eval/photos.json", "--denoise-steps", "2"], ["eval"]))


def start(module, argv, log, env=None, die_at=0, after=False, nan_at=None):
    """Fork a command; returns the process.

    die_at  SIGKILL itself at this write (1: the first), before the file is renamed or right `after`
    nan_at  (step, rank) at which a weight of the policy becomes NaN
    """
    from faults_child import command
    p = FORK.Process(target=command, args=(module, list(map(str, argv)), str(log), env or {}, die_at, after, nan_at))
    p.start()
    return p


def ranks(n, module, argv, log, **how):
    """Fork a command as n ranks over gloo; returns their exit codes. Their output: log.0, log.1, ..."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)    # as torchrun does
    env = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
               TORCHELASTIC_USE_AGENT_STORE="True")
    started = [start(module, argv, f"{log}.{r}", env | dict(RANK=str(r), LOCAL_RANK=str(r)), **how) for r in range(n)]
    for p in started:
        p.join(120)
        if p.is_alive():
            for q in started:
                q.kill()
            raise AssertionError(f"{module} {argv} hangs; see {log}.*")
    return [p.exitcode for p in started]


def outcome(folder):
    """Everything that a stage is for, without times and places: dict name -> tensor, number or text."""
    from safetensors.torch import load_file

    from runtime.files import read_log
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors" and "bank" not in Path(name).parts[0]:
            found |= {f"{name}/{k}": v for k, v in load_file(path).items()}
        elif path.suffix == ".jsonl":
            for i, row in enumerate(read_log(path)):
                found |= {f"{Path(name).parent}/{path.suffix}/{i}/{k}": v for k, v in row.items()
                          if k not in ("seconds", "time/step")}
        elif path.name in ("best.json", "photos.json", "report.json"):
            found[name] = json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "about"})
    for bank in {p.parent for p in Path(folder).glob("bank/**/*.safetensors")}:
        packs, singles = [p for p in bank.glob("pack-*")], [p for p in bank.glob("[!p]*.safetensors")]
        for path in packs:                                                      # how entries are packed is chance
            pack = load_file(path)
            n = pack["counts"].tolist()
            for key, pts, prob in zip(pack["keys"], pack["pts"].split(n), pack["prob"].split(n), strict=True):
                found |= {f"bank/{bytes(key.tolist()).hex()}/pts": pts, f"bank/{bytes(key.tolist()).hex()}/prob": prob}
        for path in singles:
            found |= {f"bank/{path.stem}/{k}": v for k, v in load_file(path).items()}
    return found


def differences(a, b):
    """Names whose values differ between two outcomes."""
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y    # noqa: E731
    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not same(a[k], b[k]))


class Campaign:
    """Undisturbed runs of all stages, made once, and rounds of kills against them, under one folder."""

    def __init__(self, folder, stages=STAGES):
        self.folder, self.out, self.whole = Path(folder), Path(folder) / "out", Path(folder) / "whole"
        self.log, self.took = self.folder / "log", {}
        photos = self.folder / "photos"
        rng = torch.Generator().manual_seed(0)
        from data.pictures import save_png
        for i in range(12):
            save_png(photos / f"{i}.png", torch.rand(3, 20, 24, generator=rng).numpy())
        self.stages = commands(self.out, photos)
        for name in STAGES[:STAGES.index(stages[-1]) + 1]:
            began = time.time()
            self.finish(name)
            self.took[name] = time.time() - began
        shutil.copytree(self.out, self.whole)
        self.want = outcome(self.whole)

    def finish(self, name):
        """Run a stage to its end."""
        p = start(*self.stages[name][:2], self.log)
        p.join(300)
        if p.exitcode != 0:
            p.kill()
            raise AssertionError(f"{name} ended with {p.exitcode}:\n{self.log.read_text()[-3000:]}")

    def round(self, name, rng, most=4):
        """Kill a stage up to `most` times, let it finish; returns (kills, names of what differs)."""
        shutil.rmtree(self.out)
        shutil.copytree(self.whole, self.out)
        for part in self.stages[name][2]:
            shutil.rmtree(self.out / part)
        kills = 0
        for _ in range(most):
            at_write = rng.random() < 0.5
            p = start(*self.stages[name][:2], self.log, die_at=rng.randint(1, 8) if at_write else 0,
                      after=rng.random() < 0.5)
            p.join(60 if at_write else rng.uniform(0, self.took[name]))
            p.kill()
            p.join()
            if p.exitcode != -signal.SIGKILL:                                   # it was faster
                assert p.exitcode == 0, self.log.read_text()[-3000:]
                break
            kills += 1
        self.finish(name)
        return kills, differences(self.want, outcome(self.out))


def main(argv=None):
    """Command line: rounds for all stages in turn until so many kills have happened."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=50, help="SIGKILLs in all [50]")
    p.add_argument("--seed", type=int, default=0, help="of the random moments [0]")
    args = p.parse_args(argv)
    rng, kills, rounds = random.Random(args.seed), dict.fromkeys(STAGES, 0), 0
    with tempfile.TemporaryDirectory() as folder:
        began, campaign = time.time(), Campaign(folder)
        while sum(kills.values()) < args.kills:
            name = STAGES[rounds % len(STAGES)]
            n, wrong = campaign.round(name, rng, min(4, args.kills - sum(kills.values())))
            kills[name], rounds = kills[name] + n, rounds + 1
            print(f"round {rounds}: {name} killed {n} times, {len(campaign.want)} values compared, {len(wrong)} differ",
                  flush=True)
            if wrong:
                raise SystemExit(f"faults.py: {name} differs after {n} kills: {', '.join(wrong[:8])}")
    print(f"{sum(kills.values())} kills in {rounds} rounds ({', '.join(f'{k} {v}' for k, v in kills.items())}), "
          f"{time.time() - began:.0f} s: nothing differs")


if __name__ == "__main__":
    main()
