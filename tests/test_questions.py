"""questions.py: true answers, balanced, masked, seeded, split by room; the released JSON lines out and in."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rooms import S, png, write_scene

from data import questions
from relations import MODALITIES, draw_markers
from runtime.config import Config


def test_answers_are_true_balanced_and_off_the_mask(rooms):
    rows = questions.build_questions(rooms, 6, S, 0)
    for m in ("depth", "normal", "irradiance"):
        mine = [r for r in rows if r["modality"] == m]
        assert len(mine) == 36 and sum(r["first"] for r in mine) == 18
    albedo = [r["first"] for r in rows if r["modality"] == "albedo"]
    assert len(albedo) >= 24 and sum(albedo) * 2 == len(albedo)
    for r in rows:
        (red_row, red), (green_row, green) = r["pts"]
        assert red_row >= 8 and green_row >= 8
        if r["modality"] == "depth":
            assert r["first"] == (red < green) and r["margin"] * (1 if r["first"] else -1) >= 0.02
        if r["modality"] == "irradiance":
            assert r["first"] == (red > green)


def test_the_same_seed_draws_the_same_and_other_scenes_change_nothing(rooms, tmp_path):
    again = questions.build_questions(rooms, 4, S, 3)
    assert again == questions.build_questions(rooms, 4, S, 3) != questions.build_questions(rooms, 4, S, 4)
    write_scene(tmp_path, "room_2.cam.0", 2)
    alone = questions.draw_questions(tmp_path, "room_2.cam.0", 4, S, 3)
    assert [r for r in again if r["scene"] == "room_2.cam.0"] == [r for r in alone if r in again]


def test_a_black_albedo_is_not_asked_about_its_light(tmp_path):
    albedo = np.full((S, S, 3), 128, np.uint8)
    albedo[:, :48] = 5
    write_scene(tmp_path, "dark", albedo=albedo)
    asked = [r for r in questions.draw_questions(tmp_path, "dark", 8, S, 0) if r["modality"] == "irradiance"]
    assert asked and all(col >= 48 for r in asked for _, col in r["pts"])


def test_rooms_are_on_one_side_of_the_split():
    names = [f"ai_{i:03}.cam.{k}" for i in range(300) for k in range(3)]
    sides = {n.split(".")[0]: {questions.split_of(m) for m in names if m.startswith(n.split(".")[0])} for n in names}
    assert all(len(s) == 1 for s in sides.values())
    share = sum(s == {"val"} for s in sides.values()) / len(sides)
    assert 0.05 < share < 0.15


@pytest.mark.parametrize("change, words", [
    (dict(normal=np.zeros((S, S, 3), np.uint8)), "_normal.png.*all-zero normals"),
    (dict(depth=np.full((S, S), 77, np.uint16)), "_depth.png.*one depth"),
    (dict(albedo=np.zeros((S, S // 2, 3), np.uint8)), "32 x 64 pixels, want 64 x 64")])
def test_a_scene_without_answers_is_named_and_nothing_is_written(tmp_path, change, words):
    write_scene(tmp_path / "scenes", "odd", **change)
    with pytest.raises(ValueError, match=words):
        questions.load_questions(tmp_path / "out" / "q.json", tmp_path / "scenes", ["odd"], 2, S, 0)
    assert not (tmp_path / "out").exists()


def test_a_missing_map_is_named(tmp_path):
    write_scene(tmp_path, "a")
    (tmp_path / "a_irradiance.png").unlink()
    with pytest.raises(FileNotFoundError, match="a_irradiance.png"):
        questions.build_questions(tmp_path, 2, S, 0)


def test_json_lines_are_the_released_layout_and_read_back(rooms, tmp_path):
    rows = questions.build_questions(rooms, 2, S, 0)
    path = questions.write_jsonl(rows, rooms, tmp_path, S, questions.JSONL["train"])
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    assert path.name == "intrinsic_judgement_train.jsonl" and len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        m = MODALITIES[row["modality"]]
        human, gpt = line["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{m.question}"} and gpt["from"] == "gpt"
        assert gpt["value"] == m.answers[0 if row["first"] else 1]
        assert line["image"] == f"images/{row['id']}.png" and (line["width"], line["height"]) == (S, S)
        assert Image.open(tmp_path / line["image"]).size == (S, S)
        assert line["metadata"]["modality"] == row["modality"]
        assert line["metadata"]["red_xy"] == row["pts"][0][::-1]
    back = questions.read_jsonl(path)
    assert [(r["modality"], r["first"]) for r in back] == [(r["modality"], r["first"]) for r in rows]
    images = questions.marked_photos(back[:3], tmp_path, S)
    assert (images - questions.marked_photos(rows[:3], rooms, S)).abs().max() < 1 / 254


def test_the_released_lines_without_sizes_are_read(tmp_path):
    png(tmp_path / "a.png", np.zeros((S, S, 3), np.uint8))
    m = MODALITIES["albedo"]
    line = dict(id="x", image="a.png", conversations=[{"from": "human", "value": f"<image>\n{m.question}"},
                                                      {"from": "gpt", "value": m.answers[1]}])
    (tmp_path / "t.jsonl").write_text(json.dumps(line) + "\n")
    row, = questions.read_jsonl(tmp_path / "t.jsonl")
    assert row["modality"] == "albedo" and row["first"] is False


@pytest.mark.parametrize("change, words", [
    (dict(image="../a.png"), "'../a.png', want a path inside"), (dict(image="/etc/a.png"), "want a path inside"),
    (dict(conversations=[{"value": "<image>\nWhat?"}, {"value": "No"}]), "nWhat.?., want an official"),
    (dict(conversations=[]), "want id, image and two conversations")])
def test_lines_that_leave_the_folder_or_ask_otherwise_are_refused(tmp_path, change, words):
    m = MODALITIES["albedo"]
    line = dict(id="x", image="a.png", conversations=[{"value": f"<image>\n{m.question}"}, {"value": m.answers[0]}])
    (tmp_path / "t.jsonl").write_text(json.dumps(line | change) + "\n")
    with pytest.raises(ValueError, match=words) as error:
        questions.read_jsonl(tmp_path / "t.jsonl")
    assert "line 1" in str(error.value) and "\n" not in str(error.value)


def test_markers_are_drawn_by_the_one_renderer(rooms):
    row = questions.build_questions(rooms, 1, S, 0)[0]
    plain = questions.read_photo(row, rooms, S)
    assert torch.equal(questions.marked_photos([row], rooms, S),
                       draw_markers(plain[None], torch.tensor(row["pts"])[None, None])[:, 0])


def test_passes_follow_each_other_and_see_every_row_once():
    rows = list(range(7))
    seen = [r for step in range(7) for r in questions.batch_of(rows, step, 3, 0)]
    assert all(sorted(seen[i:i + 7]) == rows for i in (0, 7, 14)) and seen[:7] != seen[7:14]


SCENES = [f"room_{i}.cam.0" for i in range(6)]


def test_questions_are_drawn_once_and_again_for_other_scenes(rooms, tmp_path, monkeypatch):
    path = tmp_path / "q.json"
    first = questions.load_questions(path, rooms, SCENES, 2, S, 0)
    monkeypatch.setattr(questions, "draw_questions", lambda *_: pytest.fail("drawn again"))
    assert questions.load_questions(path, rooms, SCENES, 2, S, 0) == first
    monkeypatch.undo()
    assert questions.balance(first, 0) == questions.build_questions(rooms, 2, S, 0)
    assert questions.load_questions(path, rooms, SCENES[:2], 2, S, 0) != first


def test_each_rank_draws_its_parts_and_a_stopped_run_draws_the_rest(rooms, tmp_path, monkeypatch):
    cfg = Config(scenes=str(rooms), out=str(tmp_path), size=S, seed=0)
    train = [s for s in SCENES if questions.split_of(s) == "train"]
    real = questions.draw_questions
    drawn = []

    def draw(folder, scene, *about):
        drawn.append(scene)
        return real(folder, scene, *about)

    def leave():                                                                # where the others would be waited for
        raise KeyboardInterrupt
    monkeypatch.setattr(questions, "PART", 2)
    monkeypatch.setattr(questions, "draw_questions", draw)
    monkeypatch.setattr(questions, "barrier", leave)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in (1, 0):
        monkeypatch.setenv("RANK", str(number))
        drawn.clear()
        with pytest.raises(KeyboardInterrupt):
            questions.training_questions(cfg, 1)
        assert drawn == [s for i in range(2 * number, len(train), 4) for s in train[i:i + 2]]
    drawn.clear()
    (tmp_path / "judge" / "questions" / "00001.json").unlink()
    monkeypatch.delenv("WORLD_SIZE")                                            # goes on with one process
    monkeypatch.setattr(questions, "barrier", lambda: None)
    rows = questions.training_questions(cfg, 1)
    assert drawn == train[2:4] and rows == questions.build_questions(rooms, questions.PER_SCENE, S, 0, "train")
