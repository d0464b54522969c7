"""config.py and flags.py: groups, help text, precedence, refusals, presets, the paper's numbers, resume, --dry-run."""
import dataclasses
import json
import re

import pytest

import train
from runtime.config import ESTIMATORS, GROUPS, KEPT, PRESETS, Config, fixed_settings, flag_of, problem, setting_type
from runtime.flags import parse, read_setting

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
WEIGHTS = ["--policy", "P", "--judge", "J", "--images", "I"]
PAPER_RUN = ["--preset", "paper", "--stage", "grpo", *WEIGHTS]
CHOICES = [name for name, f in FIELDS.items() if setting_type(f)[1]]
# what may change when a run resumes: what is run, memory and speed, saving and watching
FREE = {"stage", "out", "device", "micro", "checkpointing", "fsdp", "kernels", "deterministic", "bank", "save_every",
        "eval_every", "eval_images", "band", "forget", "detect_anomaly", "stop_at"}


def refusal(capsys, *argv):
    """stderr of a refused command line: exit code 2 and exactly one line."""
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("train.py: ")
    return err


def shown(capsys, flag):
    """What a help flag prints."""
    with pytest.raises(SystemExit) as stop:
        parse([flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


# help -------------------------------------------------------------------------------------------------------------

def test_there_are_few_settings_and_each_is_in_one_group():
    names = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    assert len(names) == len(set(names)) == len(FIELDS) <= 75


def test_the_short_help_is_a_page_and_the_long_one_has_every_setting(capsys):
    short, long = shown(capsys, "--help"), shown(capsys, "--help-all")
    assert len(short.splitlines()) <= 60 and "--help-all" in short
    for name in FIELDS:
        line, = [x for x in long.splitlines() if re.match(rf"  {flag_of(name)}\b(?!-)", x)]
        assert line.endswith("]"), line
    assert all(group.__doc__ in long for group in GROUPS)
    assert {flag_of(f.name) for g in GROUPS[:3] for f in dataclasses.fields(g)} <= set(re.findall(r"--[\w-]+", short))


def test_a_line_of_the_help_ends_with_the_values_of_the_presets(capsys):
    lines = {line.split()[0]: line for line in shown(capsys, "--help-all").splitlines() if line.startswith("  --")}
    assert lines["--pairs"].endswith("[paper 40, mini 48, small 64, tune 48]")
    assert lines["--group"].endswith("[8]") and lines["--bank"].endswith("[-]")
    assert lines["--noise-blocks"].endswith("[paper 1, mini 1,2,4,8, small 1,2,4,8, tune 4,8,16,32]")
    assert lines["--balance,"].endswith("[paper no, mini yes, small yes, tune yes]")


def test_every_field_is_typed_and_bounded():
    """A number has a bound, a text stands for a place or is checked, a switch is a bool."""
    for name, f in FIELDS.items():
        kind, choices, bound = setting_type(f)
        assert kind in (int, float, bool, str), name
        assert (bound is not None) == (kind in (int, float)), name
        items = f.default if isinstance(f.default, tuple) else (f.default,)
        assert all(type(x) is kind for x in items), name
        assert choices is None or f.default in choices, name
    free_text = {name for name, f in FIELDS.items() if setting_type(f)[0] is str and not setting_type(f)[1]}
    assert free_text == {"out", "images", "policy", "judge", "scenes", "bank", "rollout"}


# precedence -------------------------------------------------------------------------------------------------------

def test_default_then_preset_then_flag():
    default, preset = FIELDS["steps"].default, PRESETS["mini"]["steps"]
    flag = preset + 1
    assert default != preset
    assert parse(PAPER_RUN)[1].steps == default
    assert parse(["--preset", "mini"])[1].steps == preset
    assert parse(["--preset", "mini", "--steps", str(flag)])[1].steps == flag


def test_without_flags_it_is_all_stages_of_mini():
    preset, cfg, dry_run = parse([])
    assert (preset, cfg.stage, dry_run) == ("mini", "all", False)


@pytest.mark.parametrize("argv, preset", [
    (["--stage", "grpo", *WEIGHTS], "tune"), (["--stage", "grpo", *WEIGHTS, "--preset", "mini"], "mini"),
    (["--stage", "grpo", *WEIGHTS, "--steps", "7"], "tune"), (["--stage", "grpo", *WEIGHTS[:4]], "mini"),
    (["--stage", "grpo", *WEIGHTS[2:]], "mini"), (WEIGHTS, "mini"), (["--stage", "base", *WEIGHTS], "mini")])
def test_a_network_a_judge_and_photos_of_ones_own_are_the_preset_tune(argv, preset):
    found, cfg, _ = parse(argv)
    assert (found, cfg.out) == (preset, f"out/{preset}")


def test_preset_tune_leaves_sizes_and_cells_to_the_networks_and_replays_nothing():
    cfg = parse(["--stage", "grpo", *WEIGHTS])[1]
    assert (cfg.size, cfg.jitter, cfg.replay, cfg.modalities, cfg.lora) == (0, 0, 0, "joint", 0)
    want = ESTIMATORS["pair"] | dict(noise_blocks=(4, 8, 16, 32))               # maps are larger than those of mini
    assert {k: getattr(cfg, k) for k in want} == want
    assert parse(["--stage", "grpo", *WEIGHTS, "--size", "252"])[1].size == 252


def test_a_flag_equal_to_the_default_still_beats_the_preset():
    default = FIELDS["width"].default
    assert PRESETS["mini"]["width"] != default
    assert parse(["--width", str(default), "--heads", "4"])[1].width == default
    assert PRESETS["mini"]["muon"] and not parse(["--no-muon"])[1].muon


def test_values_are_read_by_the_type_of_their_field():
    cfg = parse(["--noise-blocks", "1,2,4", "--compile", "--no-balance", "--lr", "1e-3", "--rollout", "3"])[1]
    assert (cfg.noise_blocks, cfg.compile, cfg.balance, cfg.lr, cfg.rollout) == ((1, 2, 4), True, False, 1e-3, "3")
    assert cfg.noisy_steps == 3
    assert read_setting("noise-blocks=1,2") == ("noise_blocks", (1, 2))
    assert read_setting("balance=no") == ("balance", False)
    for bad in ("nothing=1", "balance=1", "steps=many", "reward=kind"):
        with pytest.raises(ValueError):
            read_setting(bad)


# refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, word", [
    (["--no-such-flag"], "--no-such-flag"), (["--preset", "huge"], "huge"), (["--stage", "dance"], "dance"),
    (["--seeds", "1"], "--seeds"), (["--base-st", "1"], "--base-st"), (["--steps", "many"], "many"),
    (["--noise-blocks", "1,x"], "1,x"), (["--fsdp", "1"], "1"), (["--max-pixels", "0"], "--max-pixels 0"),
    (["stray"], "stray"), *[([flag_of(k), "nonsense"], "nonsense") for k in CHOICES]])
def test_bad_flags_are_refused_in_one_line_that_names_them(capsys, argv, word):
    assert word in refusal(capsys, *argv)


@pytest.mark.parametrize("argv, words", [
    (["--group", "1"], "--group 1: want at least 2"), (["--sample-steps", "1"], "--sample-steps 1"),
    (["--noise", "0"], "--noise 0.0: want more than 0"), (["--noise", "nan"], "--noise nan"),
    (["--steps", "0"], "--steps 0: want at least 1"), (["--noise-blocks", "1,0"], "--noise-blocks 0"),
    (["--pairs", "9", "--bank-pairs", "8"], "--bank-pairs 8"), (["--rollout", "8"], "--rollout 8"),
    (["--rollout", "some"], "--rollout some"), (["--rollout", "0"], "--rollout 0"), (["--band", "1"], "--band 1"),
    (["--size", "30"], "--size 30"), (["--size", "0"], "--size 0 with --stage all"),
    (["--preset", "tune", "--stage", "grpo", *WEIGHTS[:4]], "--images"), (["--preset", "tune"], "--policy"),
    (["--width", "100"], "--width 100"), (["--photos", "-1"], "--photos -1")])
def test_settings_that_do_not_add_up_are_named_with_their_value(capsys, argv, words):
    assert words in refusal(capsys, *argv)


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if setting_type(f)[2]])
def test_a_number_below_its_bound_is_refused_now(capsys, name):
    bound = setting_type(FIELDS[name])[2]
    bad = bound.least if bound.open else bound.least - 1
    text = str(int(bad)) if setting_type(FIELDS[name])[0] is int else str(float(bad))
    assert f"{flag_of(name)} {text}: want" in refusal(capsys, f"{flag_of(name)}={text}")


# presets and estimators -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_only_real_settings_of_the_right_type(preset):
    for name, value in PRESETS[preset].items():
        kind, choices, _ = setting_type(FIELDS[name])
        assert all(type(x) is kind for x in (value if isinstance(value, tuple) else (value,))), name
        assert isinstance(value, tuple) == isinstance(FIELDS[name].default, tuple)
        assert choices is None or value in choices


def test_presets_that_need_no_weights_have_no_problem():
    for preset in set(PRESETS) - {"paper", "tune"}:
        assert problem(parse(["--preset", preset])[1], preset) is None


PAPER = dict(credit="global", rollout="full", tail=0, noise_blocks=(1,), reward="hard", norm="group", modalities="one",
             balance=False, jitter=1, exploration="flow")


def test_the_paper_preset_is_the_paper():
    cfg = parse(PAPER_RUN)[1]
    want = PAPER | dict(pairs=40, group=8, sample_steps=15, eval_steps=50, noise=0.7, lr=1e-5, photos=10000, replay=0.0,
                        lora=0, muon=False)
    assert {k: getattr(cfg, k) for k in want} == want
    assert cfg.steps * cfg.batch == 3 * cfg.photos                              # three epochs
    assert cfg.noisy_steps == 14                                                # every step but the last
    assert PRESETS["paper"] == dict(PAPER, save_every=1000) and PAPER == ESTIMATORS["paper"]


@pytest.mark.parametrize("argv", [[], ["--preset", "small"], PAPER_RUN])
def test_the_papers_estimator_is_one_constant_that_leaves_the_rest_of_the_preset_alone(argv):
    """Between preset and flags; KL, clip, replay, EMA, lr, T, N and G stay the preset's."""
    preset, cfg = (dataclasses.asdict(parse([*argv, *more])[1]) for more in ([], ["--estimator", "paper"]))
    assert {k: cfg[k] for k in PAPER} == PAPER == {k: FIELDS[k].default for k in PAPER}
    assert {k: v for k, v in cfg.items() if k not in PAPER} == {k: v for k, v in preset.items() if k not in PAPER}
    assert parse([*argv, "--estimator", "paper", "--reward", "soft"])[1].reward == "soft"


def test_our_estimator_is_that_of_the_presets_that_train_from_scratch():
    for preset in ("mini", "small"):
        assert parse(["--preset", preset, "--estimator", "pair"])[1] == parse(["--preset", preset])[1]
    cfg = parse([*PAPER_RUN, "--estimator", "pair"])[1]
    assert (cfg.credit, cfg.rollout, cfg.reward, cfg.modalities) == ("pair", "branch", "brier", "joint")


# resume -----------------------------------------------------------------------------------------------------------

def test_a_grpo_run_may_not_resume_with_other_settings_that_change_its_numbers():
    """All settings are either fixed, free, or of another stage's network."""
    fixed = fixed_settings(Config(), "grpo").keys()
    others = {f.name for g in GROUPS if g.__name__ in ("BasePredictor", "JudgeFromScratch", "JudgeByTuning")
              for f in dataclasses.fields(g)}
    assert {"base_scenes", "precision", "compile", "lr", "ema", "replay", "images", "seed", "eval_steps"} <= fixed
    assert fixed | FREE | others == FIELDS.keys() and not (fixed & FREE or fixed & others or FREE & others)
    assert FREE == {f.name for g in GROUPS if not g.fixed for f in dataclasses.fields(g)}


@pytest.mark.parametrize("stage", KEPT)
def test_the_settings_of_a_stage_are_those_that_json_gives_back(stage):
    kept = fixed_settings(parse([])[1], stage)
    assert kept == json.loads(json.dumps(kept)) and not FREE & kept.keys()
    assert {"precision", "size"} <= kept.keys()
    assert ("width" in kept, "judge_width" in kept, "base_scenes" in kept) == {
        "base": (True, False, True), "judge": (False, True, False), "tuned judge": (False, False, False),
        "grpo": (False, False, True)}[stage]


# the command ------------------------------------------------------------------------------------------------------

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
    printed = json.loads(out[:out.index("\n}") + 2])
    assert printed["group"] == 5 and printed["out"] == str(tmp_path / "run") and set(FIELDS) <= set(printed)
    assert not (tmp_path / "run").exists()


def test_dry_run_arithmetic_counts_samples(capsys):
    train.main(["--dry-run", "--steps", "7", "--batch", "3", "--group", "5", "--modalities", "one"])
    assert f"{7 * 3 * 5} samples" in capsys.readouterr().out


def test_the_dry_run_of_preset_tune_opens_no_network(capsys):
    train.main(["--dry-run", "--stage", "grpo", *WEIGHTS])
    out = capsys.readouterr().out
    assert '"preset": "tune"' in out and "200 steps x 8 rows x 8 samples = 12800 samples for each modality" in out
    assert "base:" not in out


def test_the_patch_of_a_network_that_is_not_built_here_does_not_limit_the_size():
    assert problem(parse(["--size", "56", "--policy", "x", "--judge", "y"])[1]) is None
    assert "--judge-patch" in problem(dataclasses.replace(Config(), size=40, policy="x", out="o"))
