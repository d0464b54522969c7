"""judge.py: prompt and packing, scores, save and load, digest, true relations, the training loss, the command."""
import copy
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import seeded
from PIL import Image
from safetensors.torch import load_file, save_file

import judge as judging
from data.bank import Bank
from data.photos import Photos
from data.pools import ScenePool
from data.questions import true_relations
from judge import build_mini_judge, load_judge
from models.families import FAMILIES, Prompt
from models.mini_judge import SPECIAL, MiniSizes, Probe, class_weights, judge_loss
from relations import MODALITIES, draw_markers
from runtime.ranks import Draw

NAMES = list(MODALITIES)
SIZES = MiniSizes(size=16, patch=4, width=32, vision_layers=1, text_layers=1, heads=2)
ROUNDING = 1e-5                    # fp32 attention over sequences of another length


@pytest.fixture(scope="module")
def judge():
    return build_mini_judge(SIZES, seeded()).eval()


@pytest.fixture(scope="module")
def folder(judge, tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    judge.save(path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 16, 16, generator=seeded(1))


@pytest.fixture(scope="module")
def maps():
    return ScenePool("broad", "train", 8, 16).all()


def test_a_full_disk_leaves_no_judge_or_the_old_one(judge, folder, tmp_path, small_files):
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    sizes = sorted(len(content) for content in whole.values())
    shutil.copytree(folder, tmp_path / "old")
    for most in (1000, sizes[-1] - 100):                                        # tokenizer or config; the weights
        for name in ("new", "old"):
            with small_files(most), pytest.raises(OSError, match="File too large") as error:
                judge.save(tmp_path / name)
            assert error.value.filename == str(tmp_path / name)
        assert list((tmp_path / "new").iterdir()) == []
        assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == whole


def test_the_sign_of_a_whole_judge_is_renamed_last(judge, tmp_path, monkeypatch):
    order, real = [], os.replace
    monkeypatch.setattr("os.replace", lambda a, b: (order.append(Path(b)), real(a, b)))
    judge.save(tmp_path / "new")
    placed = [p.name for p in order if p.parent == tmp_path / "new"]
    assert placed[-1] == "judge.json" and sorted(placed) == sorted(p.name for p in (tmp_path / "new").iterdir())
    (tmp_path / "new" / "unfinished").mkdir()                                   # as a kill leaves it
    judge.save(tmp_path / "new")
    assert not (tmp_path / "new" / "unfinished").exists()


def text_of(judge, ids):
    return " ".join(judge.tokenizer.convert_ids_to_tokens(ids))


def spaced(judge, sentence):
    """A sentence as its words and marks, separated by single spaces."""
    return " ".join(word for word, _ in judge.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(sentence))


# prompt -----------------------------------------------------------------------------------------------------------

def test_the_prompt_is_the_chat_format_with_one_image(judge):
    head = text_of(judge, judge.prompt.head).split()
    assert head == ["<|im_start|>", "user", "<img>", *["<IMG_CONTEXT>"] * 16, "</img>"]
    for m in NAMES:
        block = text_of(judge, judge.prompt.blocks[m])
        assert "<|im_end|> <|im_start|> assistant" in block


@pytest.mark.parametrize("m", NAMES)
def test_the_official_question_appears_word_for_word(judge, m):
    block = text_of(judge, judge.prompt.blocks[m])
    assert block.startswith(spaced(judge, MODALITIES[m].question) + " <|im_end|>") and "<unk>" not in block


@pytest.mark.parametrize("m", NAMES)
def test_each_answer_is_one_token_and_continues_to_the_official_sentence(judge, m):
    first, second = judge.prompt.answers[m]
    assert first != second
    for token, sentence in zip((first, second), MODALITIES[m].answers, strict=True):
        asked = text_of(judge, judge.prompt.blocks[m]).split("assistant")[-1].strip()
        begun = f"{asked} {text_of(judge, [token])}".strip()
        assert (spaced(judge, sentence) + " ").startswith(begun + " ")


def test_special_tokens_are_single_tokens_of_their_own(judge):
    ids = [judge.tokenizer.convert_tokens_to_ids(t) for t in SPECIAL]
    assert len(set(ids)) == len(SPECIAL) and judge.tokenizer.unk_token_id not in ids
    assert all(judge.tokenizer(t, add_special_tokens=False).input_ids == [i] for t, i in zip(SPECIAL, ids, strict=True))
    assert judge.model.config.image_token_id == judge.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")


def test_a_tokenizer_that_splits_the_answers_is_refused(judge):
    class Bytes:                                                                # "red" is three tokens
        def __init__(self, *whole):
            self.whole = whole

        def __call__(self, text, add_special_tokens):
            parts = re.split("(" + "|".join(map(re.escape, self.whole)) + ")", text)
            ids = [[self.convert_tokens_to_ids(x)] if x in self.whole else x.encode() for x in parts]
            return type("Ids", (), {"input_ids": [i for part in ids for i in part]})

        def convert_tokens_to_ids(self, token):
            return 1000 + self.whole.index(token) if token in self.whole else None

    whole = Bytes(*SPECIAL)
    with pytest.raises(ValueError, match="one token each"):
        Prompt(whole, "", FAMILIES["internvl"], 4)
    assert Prompt(whole, "", FAMILIES["internvl"], 4, text=True).answers == {}
    for lost in SPECIAL:                                                        # a mark in parts: a wrong count
        with pytest.raises(ValueError, match=f"{re.escape(repr(lost))} as one token"):
            Prompt(Bytes(*(t for t in SPECIAL if t != lost)), "", FAMILIES["internvl"], 4)


# packing ----------------------------------------------------------------------------------------------------------

def test_four_packed_questions_equal_four_single_ones(judge, images):
    with torch.no_grad():
        packed = judge.decide(images)
        single = torch.cat([judge.decide(images, (m,)) for m in NAMES], 1)
    assert packed.std() > 100 * ROUNDING and (packed - single).abs().max() < ROUNDING


def test_the_order_of_packed_questions_does_not_matter(judge, images):
    order = tuple(reversed(NAMES))
    with torch.no_grad():
        forth, back = judge.decide(images), judge.decide(images, order)
    assert (forth.flip(1) - back).abs().max() < ROUNDING


def test_packing_equals_the_plain_model_on_one_plain_sequence(judge, images):
    """The model's own forward, with its own mask and positions, over prompt + image tokens."""
    for m in NAMES:
        ids = torch.tensor([judge.prompt.head + judge.prompt.blocks[m]]).expand(len(images), -1)
        with torch.no_grad():
            out = judge.model(input_ids=ids, pixel_values=(images - judge.mean) / judge.std,
                              attention_mask=torch.ones_like(ids))
            first, second = judge.prompt.answer_values(out.logits[:, -1:], (m,))[:, 0].unbind(-1)
            want = (first - second).sigmoid()
        assert (judge.score(images, m) - want).abs().max() < ROUNDING


def test_a_batch_equals_its_images_alone(judge, images):
    for m in NAMES:
        alone = torch.cat([judge.score(images[i:i + 1], m) for i in range(len(images))])
        assert (judge.score(images, m) - alone).abs().max() < ROUNDING


def test_ask_is_score_on_drawn_markers_whatever_the_batch(judge, images):
    pts = torch.tensor([[[[2, 2], [10, 14]], [[6, 6], [14, 2]], [[2, 10], [6, 14]]]]).expand(5, -1, -1, -1)
    asked = judge.ask(images, pts)
    assert asked.shape == (5, 3, 4) and asked.dtype == torch.float32 and ((asked > 0) & (asked < 1)).all()
    for k, m in enumerate(NAMES):
        want = judge.score(draw_markers(images, pts).flatten(0, 1), m).view(5, 3)
        assert (asked[..., k] - want).abs().max() < ROUNDING
    assert (judge.ask(images, pts, batch=4) - asked).abs().max() < ROUNDING


def test_moving_a_marker_changes_what_the_judge_sees(judge, images):
    pts = torch.tensor([[[[2, 2], [10, 14]], [[2, 6], [10, 14]], [[10, 14], [2, 2]]]])
    here, moved, swapped = judge.ask(images[:1], pts)[0]
    assert (here != moved).any() and (here != swapped).any()


def test_score_depends_on_the_image(judge, images):
    assert len(set(judge.score(images, "depth").tolist())) == len(images)


def test_an_unknown_question_and_another_size_are_refused(judge, images):
    with pytest.raises(ValueError, match="want one of depth, normal, albedo, irradiance"):
        judge.score(images, "colour")
    with pytest.raises(ValueError, match=r"want \(N, 3, 16, 16\)"):
        judge.score(torch.rand(1, 3, 20, 16), "depth")


def test_no_pairs_give_no_answers(judge, images):
    assert judge.ask(images[:2], torch.zeros(2, 0, 2, 2, dtype=torch.long)).shape == (2, 0, 4)


# building, saving, loading ----------------------------------------------------------------------------------------

def test_building_is_seeded_and_leaves_the_global_state_alone(judge, images):
    before = torch.get_rng_state()
    same, other = build_mini_judge(SIZES, seeded()).eval(), build_mini_judge(SIZES, seeded(1)).eval()
    Probe(SIZES, seeded(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(judge.score(images, "depth"), same.score(images, "depth"))
    assert not torch.equal(judge.score(images, "depth"), other.score(images, "depth"))


def test_saving_and_loading_gives_bitwise_the_same_scores(judge, folder, images):
    loaded = load_judge(folder)
    for m in NAMES:
        assert torch.equal(judge.score(images, m), loaded.score(images, m))
    assert (loaded.grid, loaded.system, loaded.size) == (judge.grid, judge.system, judge.size)
    assert loaded.digest() == judge.digest() and not loaded.training


def copied(folder, tmp_path):
    """A copy of a judge folder that a test may damage."""
    for p in folder.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named_in_one_line(folder, tmp_path, name):
    (copied(folder, tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_judge(tmp_path)
    assert name in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_another_kind_of_model_is_refused(folder, tmp_path):
    path = copied(folder, tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(model_type="llava")))
    with pytest.raises(ValueError, match="'llava'.*want 'internvl'") as error:
        load_judge(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["drop", "add", "reshape", "truncate"])
def test_weights_that_do_not_fit_are_refused_in_one_line(folder, tmp_path, damage):
    """Never a randomly initialised layer in a judge."""
    path = copied(folder, tmp_path) / "model.safetensors"
    state = load_file(path)
    key = next(k for k in state if "lm_head" in k)
    if damage == "drop":
        del state[key]
    elif damage == "add":
        state["another.weight"] = torch.zeros(3)
    else:
        state[key] = state[key][:-1].contiguous()
    save_file(state, path, metadata=dict(format="pt"))
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_judge(tmp_path)
    assert "\n" not in str(error.value)


# digest -----------------------------------------------------------------------------------------------------------

def test_the_digest_changes_with_one_weight(judge):
    other = copy.deepcopy(judge)
    assert other.digest() == judge.digest()
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1e-3
    assert other.digest() != judge.digest()


def test_the_digest_changes_with_the_prompt(judge):
    other = judging.Judge(judge.model, judge.tokenizer, system="the camera", grid=judge.grid)
    assert other.digest() != judge.digest()


# ground truth -----------------------------------------------------------------------------------------------------

def test_true_relations_are_zero_at_invalid_pixels_and_only_there_for_albedo():
    H = 8
    ramp = torch.arange(H * H).view(1, 1, H, H).float() + 1
    colour = torch.rand(1, 3, H, H, generator=seeded(3))
    maps = dict(depth=ramp, normal=torch.nn.functional.normalize(torch.randn(1, 3, H, H, generator=seeded(4)), dim=1),
                albedo=colour, irradiance=colour, mask=torch.ones(1, 1, H, H, dtype=torch.bool))
    maps["mask"][..., :4, :] = False
    maps["depth"][..., :4, :] = math.inf
    pts = torch.tensor([[[[1, 1], [6, 6]], [[6, 6], [1, 1]], [[0, 0], [2, 2]], [[7, 7], [4, 0]], [[4, 0], [7, 7]]]])
    rel = true_relations(maps, pts)
    assert rel.shape == (1, 5, 4) and rel.dtype == torch.int8
    assert (rel[0, :3] == 0).all() and (rel[0, 3:, NAMES.index("albedo")] != 0).all()
    assert rel[0, 3:, NAMES.index("depth")].tolist() == [-1, 1]                 # the nearer point of a ramp wins


def test_the_range_of_true_depth_ignores_the_sky():
    """0.5 of a range of 10: far outside the dead zone, unless the sky's value entered the range."""
    maps = {m: torch.zeros(1, MODALITIES[m].channels, 2, 4) for m in NAMES}
    maps["depth"] = torch.tensor([1, 1.5, 11, 5, 1e6, 1e6, 1e6, 1e6]).view(1, 1, 2, 4)
    maps["mask"] = maps["depth"] < 1e5
    rel = true_relations(maps, torch.tensor([[[[0, 0], [0, 1]]]]))
    assert rel[0, 0, NAMES.index("depth")] == 1


# loss -------------------------------------------------------------------------------------------------------------

def test_class_weights_make_both_answers_count_the_same():
    rel = torch.tensor([[1, 1, 1, -1, 0], [1, 1, 1, 1, 0]]).unsqueeze(-1).expand(-1, -1, 4).clone()
    weight = class_weights(rel)
    for k in range(4):
        yes, no = weight[..., k][rel[..., k] > 0].sum(), weight[..., k][rel[..., k] < 0].sum()
        assert torch.isclose(yes, no) and (weight[..., k][rel[..., k] == 0] == 0).all()
        assert torch.isclose(weight[..., k].mean(), torch.tensor(1.0))


def grads(answers, maps):
    model, probe = build_mini_judge(SIZES, seeded()), Probe(SIZES, seeded(1))
    loss, stats = judge_loss(model, probe, maps, answers, Draw(seeded(2), len(maps["rgb"])))
    loss.backward()
    norm = {True: 0.0, False: 0.0}
    for name, p in model.model.named_parameters():
        norm["vision_tower" in name] += 0.0 if p.grad is None else float(p.grad.abs().sum())
    return norm[True], norm[False], sum(float(p.grad.abs().sum()) for p in probe.parameters()), stats


def test_without_answers_only_vision_and_probe_learn(maps):
    vision, text, probe, stats = grads(False, maps)
    assert vision > 0 and probe > 0 and text == 0 and "loss/answers" not in stats


def test_with_answers_the_text_part_learns_too(maps):
    vision, text, probe, stats = grads(True, maps)
    assert vision > 0 and probe > 0 and text > 0 and stats["loss/answers"] > 0


def answer_loss(maps, gap, m, taught=0.0):
    """Answer loss when the judge prefers the first answer of modality m by `gap` logits, and is unsure elsewhere.

    taught  logit of the first answer that the probe gives every pair
    """
    model, probe = build_mini_judge(SIZES, seeded()), Probe(SIZES, seeded(1))
    with torch.no_grad():
        probe.pairs[-1].weight.zero_()
        probe.pairs[-1].bias.fill_(taught)

    def logits(images, features=None):
        out = torch.full((len(images), 4, len(model.tokenizer)), -30.0)
        for k, name in enumerate(NAMES):
            first, second = model.prompt.answers[name]
            out[:, k, first], out[:, k, second] = (gap / 2, -gap / 2) if name == m else (0.0, 0.0)
        return out
    model.logits = logits
    return judge_loss(model, probe, maps, True, Draw(seeded(2), len(maps["rgb"])))[1]["loss/answers"].item()


@pytest.mark.parametrize("m", NAMES)
def test_a_pair_under_the_sky_is_taught_as_unsure(maps, m):
    sky = {k: v.clone() for k, v in maps.items()}
    sky["mask"][:] = False
    losses = {gap: answer_loss(sky, gap, m) for gap in (-2.0, -0.5, 0.0, 0.5, 2.0)}
    assert min(losses, key=losses.get) == 0.0
    assert abs(losses[0.0] - math.log(2)) < 1e-5 and abs(losses[2.0] - losses[-2.0]) < 1e-5


@pytest.mark.parametrize("m", ["depth", "normal", "irradiance"])
def test_a_pair_in_the_dead_zone_is_taught_as_unsure(maps, m):
    flat = {k: v.clone() for k, v in maps.items()}
    flat[m][:] = flat[m][:, :, :1, :1]                                          # one value everywhere
    flat["mask"][:] = True
    flat["depth"][~flat["depth"].isfinite()] = 1.0
    losses = [answer_loss(flat, gap, m) for gap in (-1.0, 0.0, 1.0)]
    assert losses[1] < losses[0] and abs(losses[0] - losses[2]) < 1e-5


def test_a_pair_with_an_answer_is_taught_that_answer(maps):
    """One colour everywhere: the answer to the albedo question is yes, and only yes."""
    flat = {k: v.clone() for k, v in maps.items()}
    flat["albedo"][:], flat["mask"][:] = 0.5, True
    flat["depth"][~flat["depth"].isfinite()] = 1.0
    losses = [answer_loss(flat, gap, "albedo", taught=30.0) for gap in (-2.0, 0.0, 2.0, 8.0)]
    assert losses == sorted(losses, reverse=True)


def test_an_answer_is_taught_half_by_the_truth_and_half_by_the_probe(maps):
    """True answer yes, an undecided probe: the best judge says yes with 3/4, whatever the other modalities say."""
    flat = {k: v.clone() for k, v in maps.items()}
    flat["albedo"][:], flat["mask"][:] = 0.5, True
    flat["depth"][~flat["depth"].isfinite()] = 1.0
    gaps = [math.log(p / (1 - p)) for p in (0.25, 0.5, 0.7, 0.75, 0.8, 0.99)]
    losses = [answer_loss(flat, gap, "albedo", taught=0.0) for gap in gaps]
    assert min(losses) == losses[3] and losses[0] > losses[1] > losses[2]


def test_a_few_steps_on_one_batch_reduce_every_part_of_the_loss(maps):
    model, probe = build_mini_judge(SIZES, seeded()), Probe(SIZES, seeded(1))
    opt = torch.optim.AdamW([*model.parameters(), *probe.parameters()], lr=3e-3)
    small = {k: v[:4] for k, v in maps.items()}
    history = []
    for _ in range(40):
        loss, stats = judge_loss(model, probe, small, True, Draw(seeded(5), len(small["rgb"])), pairs=16)
        opt.zero_grad()
        loss.backward()
        opt.step()
        history.append({k: v.item() for k, v in stats.items()})
    for k in ("loss/dense", "loss/pairs", "loss/answers"):
        assert history[-1][k] < 0.8 * history[0][k], k


def test_the_loss_is_the_same_for_the_same_generator(maps):
    model, probe = build_mini_judge(SIZES, seeded()), Probe(SIZES, seeded(1))
    values = [judge_loss(model, probe, maps, True, Draw(seeded(seed), len(maps["rgb"])))[0].item()
              for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_scenes_under_the_open_sky_give_a_finite_loss():
    maps = ScenePool("wild", "train", 8, 16).all()
    assert not maps["mask"].all() and maps["depth"].isinf().any()
    model, probe = build_mini_judge(SIZES, seeded()), Probe(SIZES, seeded(1))
    loss, _ = judge_loss(model, probe, maps, True, Draw(seeded(), len(maps["rgb"])))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# command ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_the_command_prints_one_official_sentence_with_its_probability(folder, photo, capsys):
    judging.main([photo, "--red", "3", "4", "--green", "25", "15", "--model", str(folder)])
    line, = capsys.readouterr().out.splitlines()
    sentence, share = line.removeprefix("depth: ").rsplit(" (p = ", 1)
    assert sentence in MODALITIES["depth"].answers and 0.5 <= float(share.rstrip(")")) <= 1


def test_all_asks_all_four_questions(folder, photo, capsys):
    judging.main([photo, "--red", "3", "4", "--green", "25", "15", "--model", str(folder), "--all"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == NAMES


def test_xy_are_columns_and_rows_scaled_to_the_judge(folder, photo, monkeypatch, capsys):
    """A 30 x 20 photo on a 16 px judge with cells of 4: x 25 is column 14, y 15 is row 14 (cell centres)."""
    seen = []
    real = judging.Judge.ask
    monkeypatch.setattr(judging.Judge, "ask", lambda self, rgb, pts, *rest: (seen.append(pts), real(self, rgb, pts))[1])
    judging.main([photo, "--red", "29", "0", "--green", "0", "19", "--model", str(folder)])
    assert seen[0].flatten(0, 1).tolist() == [[[2, 14], [14, 2]]]


@pytest.mark.parametrize("red", [("30", "0"), ("0", "20"), ("-1", "0")])
def test_a_point_outside_the_photo_is_refused(folder, photo, capsys, red):
    with pytest.raises(SystemExit) as stop:
        judging.main([photo, "--red", *red, "--green", "1", "1", "--model", str(folder)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "30 x 20" in err


def test_the_command_saves_what_the_judge_sees_and_says_it_in_words(folder, photo, tmp_path, capsys):
    judging.main([photo, "--red", "3", "4", "--green", "25", "15", "--model", str(folder), "--text",
                  "--save", str(tmp_path / "seen.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("depth, generated: ")
    seen = np.asarray(Image.open(tmp_path / "seen.png"))
    assert seen.shape == (16, 16, 3) and (seen == [255, 0, 0]).all(-1).any() and (seen == [0, 255, 0]).all(-1).any()


@pytest.mark.parametrize("argv, words", [
    (["--red", "1", "1"], "--green X Y"), (["--red", "1", "1", "--green", "2", "2", "--save", "x.jpg"], "ends in .png"),
    (["--bank", "B", "--pairs", "0"], "--pairs 0")])
def test_flags_that_do_not_add_up_are_refused(photo, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        judging.main([photo, *argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_a_bank_is_filled_ahead_of_time_resumed_and_then_read_without_a_judge(folder, tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(photos / f"{i:02}.png")
    (photos / "broken.png").write_bytes(b"no image")
    command = [str(photos), "--bank", str(tmp_path / "bank"), "--pairs", "6", "--model", str(folder)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    judging.main(command)                                                       # the first process's share
    said = capsys.readouterr()
    assert "36 pairs asked, 0 already known" in said.out and "broken.png" not in said.out
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    judging.main(command)
    said = capsys.readouterr()
    assert "30 pairs asked, 36 already known" in said.out and "broken.png" in said.err
    monkeypatch.setattr(judging, "load_judge", lambda *_: pytest.fail("opened the judge"))
    lazy = judging.LazyJudge(folder)
    pts, prob = Bank(tmp_path / "bank", lazy).fill(Photos(photos, lazy.size).images, 6)
    assert lazy.opened is None and prob.shape == (11, 6, 4) and ((prob > 0) & (prob < 1)).all()
