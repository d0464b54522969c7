"""e2e.py: the written-out rule, diffusers' scheduler, GRPO in one step, files both ways, refusals.

Tiny random networks in the layout of the authors' train.py: StableDiffusionPipeline with a DDPMScheduler.
"""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import official
import one_step
import pytest
import test_marigold as tiny
import torch
from expect import edit, refused, seeded
from torch.nn import functional as F

import eval as evaluation_command
import predictor
import train
from models import lora
from models.copies import frozen_copy
from models.diffusers_files import EMPTY, embed_prompts
from models.e2e import E2E, PUBLISHED
from models.marigold import Marigold
from models.schedule import Schedule
from models.sd2 import VAE, UNet
from predictor import load_predictor, predict_photo, sample_ode
from runtime.flags import parse

DDPM = dict(
    _class_name="DDPMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    num_train_timesteps=1000, prediction_type="v_prediction", rescale_betas_zero_snr=False, steps_offset=1,
    thresholding=False, timestep_spacing="leading", trained_betas=None, variance_type="fixed_small")
INDEX = dict(
    _class_name="StableDiffusionPipeline", _diffusers_version="0.30.0", unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"], scheduler=["diffusers", "DDPMScheduler"],
    text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
    feature_extractor=[None, None], image_encoder=[None, None], safety_checker=[None, None],
    requires_safety_checker=False)
PARITY = 1e-5
UNIT = 5e-4                        # of normals: divided by lengths down to 0.01 or so
TINY = [*tiny.PAPER, "--noise", "0.3", "--steps", "3", "--save-every", "1", "--eval-every", "0", "--eval-images", "2",
        "--eval-steps", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each target."""
    root = tmp_path_factory.mktemp("e2e")
    tiny.text_parts(root / "text")
    text = embed_prompts(root / "text", EMPTY, 12)
    for target in ("depth", "normals"):
        unet = tiny.fill(UNet(tiny.unet_config(1) | tiny.SMALL))
        vae = tiny.fill(VAE(tiny.VAE_CONFIG | dict(layers_per_block=1)))
        about = INDEX | dict(default_processing_resolution=48)
        E2E(unet, vae, Schedule(DDPM, **E2E.forced), text, about, root / "text", target).save(root / target)
    return {target: root / target for target in ("depth", "normals")}


@pytest.fixture
def copied(folders, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(folders["depth"], tmp_path / "copied"))


@torch.no_grad()
def rule(model, rgb, target):
    """The map of a photo (1, 3, H, W), sides x 8, by the formulas of e2e.py; depth also before its stretch."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - beta)[999]
    z = model.vae.encode(2 * rgb - 1) * 0.18215
    v = model.unet(torch.cat((z, torch.zeros_like(z)), 1), torch.tensor(999), model.text)
    x = model.vae.decode(-math.sqrt(1 - abar) * v / 0.18215)
    if target == "normals":
        x = x / (x.norm(dim=1, keepdim=True) + 1e-5)
        return x * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1), None
    x = (x.mean(1, keepdim=True).clamp(-1, 1) + 1) / 2
    return (x - x.min()) / (x.max() - x.min()), x


def photo(H=48, W=40):
    return torch.from_numpy(tiny.photo(H, W)).permute(2, 0, 1)[None].float() / 255


# the rule ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", ["depth", "normals"])
def test_the_map_is_the_written_out_rule(folders, target):
    one = load_predictor(folders[target])
    want = rule(one, photo(), target)[0]
    got = one.predict(tiny.photo(48, 40), processing_res=0)[target]
    assert np.abs(got.transpose(2, 0, 1) - want[0].numpy()).max() < UNIT and got.std() > 0.05


@pytest.mark.parametrize("target, modality", [("depth", "depth"), ("normals", "normal")])
def test_the_sampler_of_training_ends_at_the_same_map(folders, target, modality):
    """One Euler step, whatever the number of steps and the noise; the depth of training is not stretched."""
    one = load_predictor(folders[target])
    assert one.modalities == (modality,)
    stretched, plain = rule(one, photo(), target)
    for steps, seed in ((1, 0), (10, 1)):
        got = sample_ode(one, photo(), modality, steps, seeded(seed))
        torch.testing.assert_close(got, stretched if plain is None else plain, rtol=0, atol=UNIT)
    assert one.times(7) == one.times(1) and one.times(1)[1] == 0
    sigma, alpha = math.sqrt(1 - 0.0046598), math.sqrt(0.0046598)
    assert abs(one.times(1)[0] - sigma / (sigma + alpha)) < 1e-5


def test_the_scheduler_of_diffusers_gives_the_same_clean_latent(folders):
    diffusers = pytest.importorskip("diffusers")
    one = load_predictor(folders["depth"])
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders["depth"] / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(folders["depth"] / "vae")
    ddim = diffusers.DDIMScheduler.from_pretrained(folders["depth"] / "scheduler", timestep_spacing="trailing")
    ddim.set_timesteps(1)
    assert ddim.timesteps.tolist() == [999]
    with torch.no_grad():
        z = vae.encode(2 * photo() - 1).latent_dist.mean * 0.18215
        x = torch.zeros_like(z)
        v = unet(torch.cat((z, x), 1), ddim.timesteps[0], one.text).sample
        want = ddim.step(v, ddim.timesteps[0], x).pred_original_sample
        got = one._sample(torch.randn(x.shape, generator=seeded()), one.encode(photo()), 4, True)
    torch.testing.assert_close(got, want, rtol=0, atol=PARITY)


def test_diffusers_opens_what_was_saved(folders):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders["depth"])
    want = load_predictor(folders["depth"]).unet.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in pipe.unet.state_dict().items())


def test_nothing_but_the_photo_decides_the_map(folders):
    one = load_predictor(folders["normals"])
    base = one.photo_maps(photo(33, 50)[0])["normals"]
    other = one.photo_maps(photo(33, 50)[0], steps=4, seed=5, ensemble=2)["normals"]
    assert torch.equal(base, other) and base.shape == (3, 33, 50)
    torch.testing.assert_close(base.norm(dim=0), torch.ones(33, 50), rtol=0, atol=1e-3)


def test_depth_fills_0_to_1_before_it_is_resized(folders):
    """At the size that the network sees; a smaller photo gets an anti-aliased map."""
    one = load_predictor(folders["depth"])
    same = one.photo_maps(photo()[0], processing_res=48)["depth"]
    assert same.min() == 0 and same.max() == 1
    small = one.photo_maps(photo(24, 20)[0], processing_res=48)["depth"]
    up = F.interpolate(photo(24, 20), (48, 40), mode="bilinear", antialias=True)
    want = F.interpolate(rule(one, up, "depth")[0], (24, 20), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(small, want, rtol=0, atol=UNIT)


# GRPO -------------------------------------------------------------------------------------------------------------

def test_only_the_unet_has_a_gradient_and_an_update_favours_the_better_sample(folders):
    policy = load_predictor(folders["depth"])
    ref = frozen_copy(policy)
    cfg = parse([*TINY, "--policy", "P", "--judge", "J", "--images", "I", "--kl-weight", "0"])[1]
    pts = torch.randint(32, (3, cfg.bank_pairs, 2, 2), generator=seeded(1))
    batch = one_step.batch_of(cfg, policy, torch.randint(256, (3, 3, 32, 32), generator=seeded(2)).byte(), pts,
                              torch.rand(3, cfg.bank_pairs, 4, generator=seeded(3)), seeded(4))
    (step,), credit, _ = one_step.explore(policy, batch, seeded(5))
    assert (step.A, step.B, step.s) == (1, -step.t, 0) and step.std == 0.3 and not step.x.any()
    credit = torch.tensor([[1.0, -1.0]] * len(credit))
    stats = one_step.learn(policy, ref, batch, [step], credit, update=0)
    assert stats["policy/ratio_min"] == stats["policy/ratio_max"] == 1 and stats["policy/gap"] == 0
    assert all(p.grad.any() for p in policy.unet.parameters())
    assert all(p.grad is None for p in policy.vae.parameters())
    before = policy_mean(policy, batch, step)
    with torch.no_grad():
        for p in policy.unet.parameters():
            p -= 1e-3 * p.grad
    better = step.x_next[:, 0] - step.x_next[:, 1]                              # (B, 4, h, w)
    assert ((policy_mean(policy, batch, step) - before) * better).sum() > 0


@torch.no_grad()
def policy_mean(policy, batch, step):
    times = torch.full((len(step.x),), step.t)
    return step.x - step.t * policy.velocity(step.x, times, policy.encode(batch.rgb))


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """train.py --stage grpo --policy on eleven photos: a function of further flags, and the folder of results."""
    root = tiny.write_inputs(tmp_path_factory.mktemp("run"))

    def go(name, *flags, policy=folders["depth"]):
        train.main([*TINY, "--policy", str(policy), "--judge", str(root / "judge"), "--images", str(root / "photos"),
                    "--bank", str(root / "bank"), "--out", str(root / name), *flags])
        return root / name / "photos"
    return go, root


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_three_steps_have_a_ratio_of_exactly_one_and_resume_bitwise(run, folders):
    result = run[0]("whole")
    rows = log(result)
    assert len(rows) == 3 and all(r["grad/norm"] > 0 and r["policy/gap"] == 0 for r in rows)
    assert all(r["policy/ratio_min"] == r["policy/ratio_max"] == 1 for r in rows)
    assert tiny.changed(result / "unet", folders["depth"] / "unet")
    assert not tiny.changed(result / "vae", folders["depth"] / "vae")
    run[0]("parts", "--stop-at", "1")
    again = run[0]("parts", "--stop-at", "3")
    assert not tiny.changed(again / "unet", result / "unet")


def test_the_result_opens_without_another_word_and_the_adapters_lie_in_peft_layout(run, folders):
    result = run[0]("lora", "--lora", "2", policy=folders["normals"])
    again = load_predictor(result)
    assert isinstance(again, E2E) and again.modalities == ("normal",)
    base = load_predictor(folders["normals"])
    lora.load_adapter(base.unet, result / "lora")
    merged = lora.merged_state(base.unet)
    assert all(torch.equal(v, merged[k]) for k, v in tiny.weights(result / "unet").items())
    card = (result / "README.md").read_text()
    assert "license: other" in card and "E2E-FT" in card and "timestep 999" in card and "targets: normals" in card
    assert json.loads((result / "scheduler" / "scheduler_config.json").read_text()) == DDPM
    index = json.loads((result / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_the_commands_take_the_folder(run, folders, tmp_path):
    """predictor.py writes what predict_photo gives; eval.py scores a benchmark."""
    image = run[1] / "photos" / "0.png"
    predictor.main([str(image), "--checkpoint", str(folders["depth"]), "--out", str(tmp_path / "maps"),
                    "--device", "cpu"])
    want = predict_photo(load_predictor(folders["depth"]), photo(40, 50)[0])["depth"]
    np.testing.assert_allclose(np.load(tmp_path / "maps" / "0_depth.npy"), want, rtol=0, atol=PARITY)
    official.make(official.bench_of("diode"), tmp_path / "data", 1)
    evaluation_command.main(["--dataset", "diode", "--data", str(tmp_path / "data"), "--checkpoint",
                             str(folders["depth"]), "--limit", "1", "--processing-res", "16", "--out",
                             str(tmp_path / "o"), "--json", str(tmp_path / "n.json")])
    assert np.isfinite(json.loads((tmp_path / "n.json").read_text())["metrics"]["abs_rel"]["value"])


# files ------------------------------------------------------------------------------------------------------------

def test_a_folder_whose_target_nobody_says_is_refused_with_what_to_write(copied):
    (copied / "reasonx.json").unlink()
    shutil.rmtree(copied / "unet")                                              # before any weights are read
    words = '{"family": "e2e-ft", "target": "depth"}', '{"family": "e2e-ft", "target": "normals"}'
    refused(ValueError, lambda: load_predictor(copied), "'StableDiffusionPipeline'", str(copied / "reasonx.json"),
            *words)


@pytest.mark.parametrize("words", [dict(family="e2e-ft"), dict(family="e2e-ft", target="albedo"),
                                   dict(family="marigold", target="depth"), dict(family="e2e-ft", target=["depth"])])
def test_other_words_are_refused_with_what_to_write(copied, words):
    (copied / "reasonx.json").write_text(json.dumps(words))
    refused(ValueError, lambda: load_predictor(copied), "reasonx.json", '"target": "normals"')


@pytest.mark.parametrize("name", ["MarigoldDepthPipeline", "MarigoldPipeline", "StableDiffusionPipeline"])
def test_the_users_word_comes_before_the_index(copied, name):
    edit(copied / "model_index.json", _class_name=name)
    assert isinstance(load_predictor(copied), E2E)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_spacing_and_last_level_are_forced_whatever_the_file_says(copied, name):
    edit(copied / "scheduler" / "scheduler_config.json", _class_name=name, set_alpha_to_one=False)
    one = load_predictor(copied)
    assert one.schedule.steps(1) == [(999, pytest.approx(0.0046598, abs=1e-6), 1.0)]


def test_marigold_does_not_take_that_scheduler(copied):
    (copied / "reasonx.json").unlink()
    edit(copied / "model_index.json", **tiny.index_of("depth"))
    refused(ValueError, lambda: Marigold.load(copied), "'DDPMScheduler'")


@pytest.mark.parametrize("key, value", [("prediction_type", "epsilon"), ("_class_name", "EulerDiscreteScheduler")])
def test_another_scheduler_is_refused_by_name(copied, key, value):
    edit(copied / "scheduler" / "scheduler_config.json", **{key: value})
    refused(ValueError, lambda: load_predictor(copied), repr(value))


def test_an_ordinary_stable_diffusion_is_refused_by_its_channels(copied):
    edit(copied / "unet" / "config.json", in_channels=4)
    refused(ValueError, lambda: load_predictor(copied), "conv_in.weight")


def test_a_published_id_says_its_target_itself(folders, tmp_path, monkeypatch):
    bare = Path(shutil.copytree(folders["normals"], tmp_path / "bare"))
    (bare / "reasonx.json").unlink()
    monkeypatch.setattr("runtime.weights.snapshot_download", lambda name, allow_patterns: str(bare))
    assert len(PUBLISHED) == 4 and all(name.endswith(target) for name, target in PUBLISHED.items())
    one = load_predictor("GonzaloMG/marigold-e2e-ft-normals")
    assert isinstance(one, E2E) and one.targets == ("normals",)
    one.save(tmp_path / "saved")
    assert load_predictor(tmp_path / "saved").targets == ("normals",)
