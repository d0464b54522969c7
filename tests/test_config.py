"""config.py: help text, precedence, refusals in one line, presets, the paper's numbers, --dry-run."""
import dataclasses
import json

import pytest

import train
from runtime.config import CHOICES, FREE, NETWORK, PRESETS, Config, grpo_settings, parse, problem, stage_settings

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
WEIGHTS = ["--policy", "P", "--judge", "J", "--images", "I"]


def refusal(capsys, *argv):
    """stderr of a refused command line: exit code 2 and exactly one line."""
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("train.py: ")
    return err


def test_every_setting_has_a_flag_with_help_text(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name in FIELDS:
        flag = "--" + name.replace("_", "-")
        after = text.split(f" {flag} ", 2)[-1]
        assert f"{flag} " in text and len(after.split(" --")[0].split()) >= 3, name


def test_every_default_has_the_type_of_its_field():
    assert {name for name, f in FIELDS.items() if type(f.default) is not f.type} == set()


def test_default_then_preset_then_flag():
    default, preset = FIELDS["steps"].default, PRESETS["mini"]["steps"]
    flag = preset + 1
    assert default != preset
    assert parse(["--preset", "paper", "--stage", "grpo", *WEIGHTS])[1].steps == default
    assert parse(["--preset", "mini"])[1].steps == preset
    assert parse(["--preset", "mini", "--steps", str(flag)])[1].steps == flag


def test_without_flags_it_is_all_stages_of_mini():
    preset, cfg, dry_run = parse([])
    assert (preset, cfg.stage, dry_run) == ("mini", "all", False)


def test_a_flag_equal_to_the_default_still_beats_the_preset():
    default = FIELDS["width"].default
    assert PRESETS["mini"]["width"] != default
    assert parse(["--width", str(default), "--heads", "4"])[1].width == default


@pytest.mark.parametrize("argv, word", [
    (["--no-such-flag"], "--no-such-flag"), (["--preset", "huge"], "huge"), (["--stage", "dance"], "dance"),
    (["--seeds", "1"], "--seeds"), (["--base-st", "1"], "--base-st"), (["--steps", "many"], "many"),
    (["stray"], "stray"), *[([f"--{k.replace('_', '-')}", "nonsense"], "nonsense") for k in CHOICES]])
def test_bad_flags_are_refused_in_one_line_that_names_them(capsys, argv, word):
    assert word in refusal(capsys, *argv)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_only_real_settings_of_the_right_type(preset):
    for name, value in PRESETS[preset].items():
        assert name in FIELDS and type(value) is FIELDS[name].type, name
        assert value in CHOICES.get(name, (value,))


def test_presets_that_need_no_weights_have_no_problem():
    for preset in set(PRESETS) - {"paper"}:
        assert problem(parse(["--preset", preset])[1], preset) is None


def test_choices_name_real_settings_and_hold_their_default():
    assert all(FIELDS[name].default in values for name, values in CHOICES.items())


@pytest.mark.parametrize("argv, words", [
    (["--group", "1"], "--group 1"), (["--sample-steps", "1"], "--sample-steps 1"), (["--noise", "0"], "--noise 0"),
    (["--noise", "nan"], "--noise nan"), (["--steps", "0"], "--steps 0"),
    (["--pairs", "9", "--bank-pairs", "8"], "--bank-pairs 8"),
    (["--size", "30"], "--size 30"), (["--width", "100"], "--width 100"), (["--photos", "-1"], "--photos -1")])
def test_settings_that_do_not_add_up_are_named_with_their_value(capsys, argv, words):
    assert words in refusal(capsys, *argv)


@pytest.mark.parametrize("name", ["patch", "judge_patch", "heads", "judge_heads", "save_every", "base_scenes",
                                  "judge_scenes", "eval_images", "eval_steps", "credit_width", "window",
                                  "lr", "layers", "noise_blocks", "stochastic", "group"])
def test_a_number_that_would_fail_or_mislead_later_is_refused_now(capsys, name):
    flag = "--" + name.replace("_", "-")
    bad = "-1" if name in ("window", "lr", "layers") else "0"
    assert flag in refusal(capsys, f"{flag}={bad}")


def test_the_paper_preset_is_the_paper():
    cfg = parse(["--preset", "paper", "--stage", "grpo", *WEIGHTS])[1]
    want = dict(pairs=40, group=8, sample_steps=15, eval_steps=50, noise=0.7, lr=1e-5, photos=10000, reward="hard",
                credit="global", rollout="full", modalities="one", norm="group", window=0,
                replay=0.0, lora=0)
    assert {k: getattr(cfg, k) for k in want} == want
    assert cfg.exploration == "flow"                                            # Euler-Maruyama
    assert cfg.steps * cfg.batch == 3 * cfg.photos                              # three epochs


PAPER = dict(credit="global", rollout="full", tail=0, noise_blocks="1", reward="hard", norm="group", modalities="one",
             balance=0, jitter=1, window=0, depth_normal=0.0, shading=0.0, exploration="flow")


@pytest.mark.parametrize("argv", [[], ["--preset", "small"], ["--preset", "paper", "--stage", "grpo", *WEIGHTS]])
def test_the_papers_estimator_is_one_constant_that_leaves_the_rest_of_the_preset_alone(argv):
    """Between preset and flags; KL, clip, replay, EMA, lr, T, N and G stay the preset's."""
    preset, cfg = (dataclasses.asdict(parse([*argv, *more])[1]) for more in ([], ["--estimator", "paper"]))
    assert {k: cfg[k] for k in PAPER} == PAPER == {k: FIELDS[k].default for k in PAPER}
    assert {k: v for k, v in cfg.items() if k not in PAPER} == {k: v for k, v in preset.items() if k not in PAPER}
    assert parse([*argv, "--estimator", "paper", "--reward", "soft"])[1].reward == "soft"


def test_our_estimator_is_that_of_the_presets_that_train_from_scratch():
    for preset in ("mini", "small"):
        assert parse(["--preset", preset, "--estimator", "pair"])[1] == parse(["--preset", preset])[1]
    cfg = parse(["--preset", "paper", "--stage", "grpo", *WEIGHTS, "--estimator", "pair"])[1]
    assert (cfg.credit, cfg.rollout, cfg.reward, cfg.modalities) == ("pair", "branch", "brier", "joint")


def test_a_run_may_not_resume_with_other_settings_that_change_its_numbers():
    """All settings are either fixed, free, or of another stage."""
    fixed = grpo_settings(Config())
    assert {"base_scenes", "precision", "compile", "lr", "ema", "replay", "images", "seed"} <= fixed.keys()
    other = {k for k in FIELDS if k.startswith(("base_", "judge_")) and k != "base_scenes"} | {*NETWORK, "scenes"}
    assert fixed.keys() | set(FREE) | other == set(FIELDS) and not fixed.keys() & (set(FREE) | other)
    assert {"precision", "size", "base_lr"} <= stage_settings(Config(), "base", "size").keys()


@pytest.mark.parametrize("argv", [[], ["--stage", "grpo"], ["--stage", "grpo", *WEIGHTS[:4]],
                                  ["--stage", "base", *WEIGHTS]])
def test_the_paper_preset_without_weights_names_what_it_needs(capsys, argv):
    err = refusal(capsys, "--preset", "paper", *argv)
    assert all(word in err for word in ("--policy", "--judge", "--images", "marigold-iid-lighting", "Judge", "COCO"))


def test_dry_run_prints_the_settings_and_builds_nothing(tmp_path, capsys, monkeypatch):
    for stage in train.STAGES:
        monkeypatch.setitem(train.STAGES, stage, lambda *_: pytest.fail("built something"))
    train.main(["--dry-run", "--out", str(tmp_path / "run"), "--group", "5"])
    out = capsys.readouterr().out
    shown = json.loads(out[:out.index("\n}") + 2])
    assert shown["group"] == 5 and shown["out"] == str(tmp_path / "run") and set(FIELDS) <= set(shown)
    assert not (tmp_path / "run").exists()


def test_dry_run_arithmetic_counts_samples(capsys):
    train.main(["--dry-run", "--steps", "7", "--batch", "3", "--group", "5", "--modalities", "one"])
    assert f"{7 * 3 * 5} samples" in capsys.readouterr().out


def test_the_patch_of_a_network_that_is_not_built_here_does_not_limit_the_size():
    assert problem(parse(["--size", "56", "--policy", "x", "--judge", "y"])[1]) is None
    assert "--judge-patch" in problem(dataclasses.replace(Config(), size=40, policy="x", out="o"))
