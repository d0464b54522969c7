"""What a fifth modality goes through; run by test_modality.py in a copy of the project that knows it.

    python fifth_modality.py NAME OUT FLAGS            flags of train.py; writes OUT/found.json
"""
import json
import sys
from pathlib import Path

import torch

import predictor
import train
from data import questions
from data.bank import Bank
from data.pictures import save_map, save_png
from data.pools import ScenePool, read_scene
from judge import LazyJudge, load_judge
from predictor import load_predictor
from relations import NAMES, relation, sample_pairs
from runtime.files import read_json, read_log
from runtime.ranks import generator


def values_at(one, pts):
    """Red minus green value of a map (1, H, W) at pairs (P, 2, 2), pair by pair."""
    return [float(one[0, a, b] - one[0, c, d]) for (a, b), (c, d) in pts.tolist()]


def scene_questions(m, maps, folder):
    """Rows about scenes that are written to a folder and read back, and whether each answer is the map's own."""
    for i in range(len(maps["mask"])):
        save_png(folder / f"room_{i}_rgb.png", maps["rgb"][i])
        for k in NAMES:
            save_map(folder, f"room_{i}", k, maps[k][i].masked_fill(~maps["mask"][i], 0.0))
    rows = [r for r in questions.build_questions(folder, 4, 32, 0) if r["modality"] == m]
    gaps = [values_at(read_scene(folder, r["scene"])[m], torch.tensor([r["pts"]]))[0] for r in rows]
    read = questions.read_jsonl(questions.write_jsonl(rows, folder, folder / "lines", 32, "a.jsonl"))
    return dict(first=[r["first"] for r in rows], gaps=gaps, read=[r["modality"] for r in read])


def refusal(load, folder):
    """What a function says that opens a folder of an earlier run."""
    try:
        load(folder)
    except ValueError as error:
        return str(error)


def main(m, out, *flags):
    """All steps, in order."""
    out = Path(out)
    fixtures = Path(__file__).parent / "fixtures"
    maps = ScenePool("wild", "train", 4, 32).all()
    pts = sample_pairs(4, (32, 32), 64, generator(0), mask=maps["mask"])
    found = dict(names=NAMES, relation=relation(maps[m], pts, m).tolist(),
                 gaps=[values_at(one, p) for one, p in zip(maps[m], pts, strict=True)])
    found["refusals"] = [refusal(load_judge, fixtures / "judge"), refusal(load_predictor, fixtures / "predictor")]
    found["questions"] = scene_questions(m, maps, out / "scenes")
    train.main([*flags, "--out", str(out)])                                     # base, judge, GRPO, tables
    judge = load_judge(out / "judge")
    rgb = ScenePool("wild", "train", 2, judge.size).all()["rgb"]
    few = sample_pairs(2, (judge.size,) * 2, 5, generator(0), grid=judge.grid)
    prob = judge.ask(rgb, few)
    found["ask"] = dict(shape=list(prob.shape), lies_in_0_1=bool(((prob > 0) & (prob < 1)).all()),
                        alone=float((judge.ask(rgb, few, modalities=(m,))[..., -1] - prob[..., -1]).abs().max()))
    bank = Bank(out / "bank", LazyJudge(out / "judge"))
    photos = (ScenePool("wild", "train", 4, judge.size, keys=("rgb",)).all()["rgb"] * 255).round().byte()
    found["bank"] = dict(shape=list(bank.fill(photos, 16)[1].shape), asked=bank.asked)
    found["log"] = read_log(out / "grpo" / "metrics.jsonl")
    found["tables"] = [dict(metrics=list(t["metrics"]), judge=t.get("judge"))
                       for t in read_json(out / "report.json")["tables"]]
    photo = save_png(out / "photo.png", rgb[0])
    predictor.main([str(photo), "--checkpoint", str(out / "grpo"), "--out", str(out / "maps"), "--device", "cpu"])
    found["files"] = sorted(p.name for p in (out / "maps").iterdir())
    Path(out, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
