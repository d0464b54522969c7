"""rgbx.py: the written-out pipeline, diffusers' sampler, three modalities in one policy, files both ways, the licence.

Tiny random networks in the layout of the released rgb2x folder.
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
from PIL import Image
from torch.nn import functional as F

import eval as evaluation_command
import predictor
import train
from models import lora
from models.copies import frozen_copy
from models.diffusers_files import embed_prompts
from models.rgbx import RGBX
from models.schedule import Schedule
from models.sd2 import VAE, UNet
from predictor import load_predictor, predict_photo, sample_ode
from relations import NAMES, srgb_encode
from runtime.flags import parse

SCHEDULER = dict(                  # as in Stable Diffusion 2.1: what the pipeline forces is otherwise in the file
    _class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    num_train_timesteps=1000, prediction_type="v_prediction", set_alpha_to_one=False, skip_prk_steps=True,
    steps_offset=1, trained_betas=None, timestep_spacing="leading", rescale_betas_zero_snr=False)
INDEX = dict(
    _class_name="StableDiffusionAOVMatEstPipeline", _diffusers_version="0.21.0",
    unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
    scheduler=["diffusers", "DDIMScheduler"], text_encoder=["transformers", "CLIPTextModel"],
    tokenizer=["transformers", "CLIPTokenizer"])
PROMPTS = {"albedo": "Albedo (diffuse basecolor)", "normals": "Camera-space Normal",
           "irradiance": "Irradiance (diffuse lighting)"}
LETTERS = "abcdefghijklmnopqrstuvwxyz()-"
PARITY = 1e-5
UNIT = 5e-4                        # of normals: divided by lengths down to 0.01 or so
TINY = [*tiny.PAPER, "--modalities", "joint", "--steps", "3", "--save-every", "1", "--eval-every", "0",
        "--eval-images", "2", "--eval-steps", "2", "--lr", "1e-3"]


def text_parts(folder):
    """A tiny CLIP text encoder, and a tokenizer of single letters that pads with "!" as Stable Diffusion 2's does."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    folder.mkdir(parents=True)
    words = ["!", *LETTERS, *(f"{x}</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77,
                  pad_token="!").save_pretrained(folder / "tokenizer")
    tiny.fill(CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=0))).save_pretrained(folder / "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny rgb2x folder, with its licence."""
    root = tmp_path_factory.mktemp("rgbx")
    text_parts(root / "text")
    (root / "text" / "LICENSE.md").write_text("noncommercial research")
    unet = tiny.fill(UNet(tiny.unet_config(1) | tiny.SMALL))
    vae = tiny.fill(VAE(tiny.VAE_CONFIG | dict(layers_per_block=1)))
    text = embed_prompts(root / "text", RGBX.prompts, 12)
    RGBX(unet, vae, Schedule(SCHEDULER, **RGBX.forced), text, INDEX, root / "text").save(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def model(folder):
    """The folder, opened; tests that train open their own."""
    return load_predictor(folder)


@pytest.fixture
def copied(folder, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def prompt_text(folder, prompt):
    """(1, 77, 12) by transformers alone: padded to 77 tokens, no mask, last hidden state."""
    from transformers import CLIPTextModel, CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, 77) and ids[0, 0] == tokenizer.bos_token_id and ids[0, -1] == 0
    with torch.no_grad():
        return CLIPTextModel.from_pretrained(folder / "text_encoder")(ids).last_hidden_state


def levels():
    """abar of the 1000 timesteps with zero terminal SNR (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@torch.no_grad()
def pipeline(model, rgb, text, x, visited, after):
    """Clean latent of photos (1, 3, H, W), written out. visited, after: timesteps of each step's start and end."""
    photo = model.vae.encode(2 * rgb**2.2 - 1) * 0.18215
    abar = levels()
    for t, s in zip(visited, after, strict=True):
        v = model.unet(torch.cat((x, photo), 1), torch.tensor(t), text)
        signal, noise = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        clean, eps = signal * x - noise * v, noise * x + signal * v
        end = abar[max(s, 0)]                                                   # set_alpha_to_one is off
        x = math.sqrt(end) * clean + math.sqrt(1 - end) * eps
    return x


@torch.no_grad()
def shown(model, z, target):
    """The decoded map: colours linear in [0, 1]; normals unit vectors."""
    x = (model.vae.decode(z / 0.18215) / 2 + 0.5).clamp(0, 1)
    return F.normalize(2 * x - 1, dim=1) if target == "normals" else x


def photo(H=48, W=40):
    return torch.from_numpy(tiny.photo(H, W)).permute(2, 0, 1)[None].float() / 255


# the pipeline -----------------------------------------------------------------------------------------------------

def test_prediction_is_the_written_out_pipeline(folder, model):
    latents = torch.randn(1, 4, 6, 5, generator=seeded())
    got = model.predict(tiny.photo(48, 40), 3, latents=latents, processing_res=0)
    assert list(got) == list(PROMPTS)
    for target, prompt in PROMPTS.items():
        z = pipeline(model, photo(), prompt_text(folder, prompt), latents, (999, 666, 332), (666, 333, -1))
        want = shown(model, z, target)[0].permute(1, 2, 0).numpy()
        assert np.abs(got[target] - want).max() < (UNIT if target == "normals" else PARITY) and want.std() > 0.01
    assert np.abs(got["albedo"] - got["irradiance"]).max() > 1e-3               # the prompt acts


def test_diffusers_sampler_and_networks_give_the_same(folder, model):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    file = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    ddim = diffusers.DDIMScheduler.from_config(file.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    latents = torch.randn(1, 4, 6, 5, generator=seeded())
    for steps in (3, 4):
        ddim.set_timesteps(steps)
        got = model.predict(tiny.photo(48, 40), steps, latents=latents, processing_res=0)
        for target, prompt in PROMPTS.items():
            z, text = latents * ddim.init_noise_sigma, prompt_text(folder, prompt)
            with torch.no_grad():
                c = vae.encode(2 * photo() ** 2.2 - 1).latent_dist.mode() * vae.config.scaling_factor
                for t in ddim.timesteps:
                    z = ddim.step(unet(torch.cat((z, c), 1), t, text).sample, t, z).prev_sample
                x = (vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
            want = (F.normalize(2 * x - 1, dim=1) if target == "normals" else x)[0].permute(1, 2, 0).numpy()
            assert np.abs(got[target] - want).max() < (UNIT if target == "normals" else PARITY)


@pytest.mark.parametrize("H, W, edge, want", [
    (53, 71, 48, (32, 48)), (20, 30, 60, (40, 56)), (33, 50, 0, (32, 48)), (750, 1000, None, (744, 1000))])
def test_the_longer_side_is_scaled_up_or_down_and_both_are_floored_to_8(model, H, W, edge, want):
    x, size = model._fit(torch.rand(1, 3, H, W), model.size if edge is None else edge)
    assert tuple(x.shape[2:]) == tuple(size) == want


def test_a_photo_whose_side_is_below_8_px_there_is_refused(model):
    refused(ValueError, lambda: model.predict(np.zeros((9, 300, 3), np.uint8), 1, processing_res=64), "9 x 300",
            "--processing-res")


def test_the_defaults_are_the_authors(model):
    assert (model.size, model.steps, model.modalities) == (1000, 50, ("albedo", "normal", "irradiance"))
    assert model.times(3)[0] == 1


def test_maps_of_the_sampler_are_in_the_encodings_of_the_table(folder, model):
    noise = torch.randn(1, 4, 6, 5, generator=seeded(1))
    for target, prompt in PROMPTS.items():
        z = pipeline(model, photo(), prompt_text(folder, prompt), noise, (999, 666, 332), (666, 332, -1))
        want = shown(model, z, target)
        got = sample_ode(model, photo(), "normal" if target == "normals" else target, 3, noise=noise)
        torch.testing.assert_close(got, want if target == "normals" else srgb_encode(want), rtol=0, atol=UNIT)


def test_rows_of_mixed_modalities_are_the_rows_alone(model):
    x, cond = torch.randn(4, 4, 5, 4, generator=seeded()), torch.randn(4, 4, 5, 4, generator=seeded(1))
    t = torch.tensor([1.0, 0.7, 0.4, 0.2])
    names = ("irradiance", "normal", "albedo", "irradiance")
    with torch.no_grad():
        whole = model.velocity(x, t, cond, torch.tensor([NAMES.index(m) for m in names]))
        alone = torch.cat([model.velocity(x[i:i + 1], t[i:i + 1], cond[i:i + 1], m) for i, m in enumerate(names)])
        other = model.velocity(x, t, cond, "normal")
    torch.testing.assert_close(whole, alone, rtol=0, atol=2e-5)
    assert (whole - other).abs().amax((1, 2, 3)).gt(1e-3).tolist() == [True, False, True, True]


def test_a_modality_that_it_does_not_predict_is_refused_by_name(model):
    refused(ValueError, lambda: model.decode(torch.zeros(1, 4, 2, 2), "depth"), "albedo, normals, irradiance",
            "'depth'")


# GRPO -------------------------------------------------------------------------------------------------------------

def test_the_modalities_train_together_and_only_the_unet_has_a_gradient(folder):
    policy = load_predictor(folder)
    ref = frozen_copy(policy)
    cfg = parse([*TINY, "--policy", "P", "--judge", "J", "--images", "I"])[1]
    pts = torch.randint(32, (3, cfg.bank_pairs, 2, 2), generator=seeded(1))
    batch = one_step.batch_of(cfg, policy, torch.randint(256, (3, 3, 32, 32), generator=seeded(2)).byte(), pts,
                              torch.rand(3, cfg.bank_pairs, 4, generator=seeded(3)), seeded(4))
    taken, advantage, stats = one_step.explore(policy, batch, seeded(5))
    assert batch.modalities == ("albedo", "normal", "irradiance") and len(advantage) == 3 * cfg.batch
    assert {f"reward/{m}" for m in batch.modalities} <= stats.keys()
    stats = one_step.learn(policy, ref, batch, taken, torch.randn(advantage.shape, generator=seeded(6)), update=0)
    assert stats["policy/ratio_min"] == stats["policy/ratio_max"] == 1 and stats["policy/gap"] == 0
    assert all(p.grad.any() for p in policy.unet.parameters())
    assert all(p.grad is None for p in policy.vae.parameters())


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """train.py --stage grpo --policy with adapters on eleven photos; the folder of the run."""
    root = tiny.write_inputs(tmp_path_factory.mktemp("run"))
    train.main([*TINY, "--policy", str(folder), "--judge", str(root / "judge"), "--images", str(root / "photos"),
                "--out", str(root / "out"), "--lora", "2"])
    return root


def test_three_steps_have_a_ratio_of_exactly_one_and_a_result_that_opens(run, folder):
    """Its adapters lie in PEFT layout too."""
    rows = [json.loads(line) for line in (run / "out" / "photos" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(r["grad/norm"] > 0 and r["policy/gap"] == 0 for r in rows)
    assert all(r["policy/ratio_min"] == r["policy/ratio_max"] == 1 for r in rows)
    result = run / "out" / "photos"
    again, base = load_predictor(result), load_predictor(folder)
    assert isinstance(again, RGBX) and again.cfg == base.cfg and torch.equal(again.text, base.text)
    lora.load_adapter(base.unet, result / "lora")
    merged = lora.merged_state(base.unet)
    assert all(torch.equal(v, merged[k]) for k, v in tiny.weights(result / "unet").items())
    assert tiny.changed(result / "unet", folder / "unet") and not tiny.changed(result / "vae", folder / "vae")
    for part in ("text_encoder/model.safetensors", "tokenizer/tokenizer_config.json"):
        assert (result / part).is_file()


def test_the_noncommercial_licence_stands_in_the_card_and_goes_with_the_weights(model, tmp_path):
    model.save(tmp_path, base="zheng95z/rgb-to-x")
    card = (tmp_path / "README.md").read_text()
    assert "license: other" in card and "Adobe Research License" in card and "noncommercial research only" in card
    assert "albedo: linear" in card and "diffusers." not in card.split("opens with")[1].splitlines()[0]
    assert (tmp_path / "LICENSE.md").read_text() == "noncommercial research"
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text()) == SCHEDULER


def test_the_commands_take_the_folder(folder, tmp_path):
    """predictor.py writes what predict_photo gives; eval.py scores a benchmark."""
    flags = ["--checkpoint", str(folder), "--denoise-steps", "2", "--processing-res", "48"]
    Image.fromarray(tiny.photo(40, 50)).save(tmp_path / "0.png")
    predictor.main([str(tmp_path / "0.png"), *flags, "--out", str(tmp_path / "maps"), "--device", "cpu"])
    native = load_predictor(folder).photo_maps(photo(40, 50)[0], 48, 2)
    for name, target in (("albedo", "albedo"), ("normal", "normals"), ("irradiance", "irradiance")):
        np.testing.assert_allclose(np.load(tmp_path / "maps" / f"0_{name}.npy"), native[target], rtol=0, atol=UNIT)
    assert set(predict_photo(load_predictor(folder), photo(40, 50)[0], 48, 1)) == {"albedo", "normal", "irradiance"}
    official.make(official.bench_of("ibims"), tmp_path / "data", 1)
    evaluation_command.main(["--dataset", "ibims", "--data", str(tmp_path / "data"), *flags, "--limit", "1",
                             "--out", str(tmp_path / "o"), "--json", str(tmp_path / "n.json")])
    values = [x["value"] for x in json.loads((tmp_path / "n.json").read_text())["metrics"].values()]
    assert values and np.isfinite(values).all()


# files ------------------------------------------------------------------------------------------------------------

def test_the_text_encoder_may_be_absent_once_the_prompts_are_kept(copied, model):
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(copied / part)
    assert torch.equal(load_predictor(copied).text, model.text) and model.text.shape == (3, 77, 12)
    (copied / "prompt_embeddings.safetensors").unlink()
    refused(FileNotFoundError, lambda: load_predictor(copied), "text_encoder", "prompt_embeddings.safetensors")


def test_prompts_that_are_not_kept_are_computed(copied, model):
    (copied / "prompt_embeddings.safetensors").unlink()
    torch.testing.assert_close(load_predictor(copied).text, model.text, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change, words", [
    (lambda s: {k: v[:, :2] for k, v in s.items()}, ("(1, 2, 12)", "(1, 77, 12)")),
    (lambda s: {k: v for k, v in s.items() if k != "normals"}, ("normals",))])
def test_embeddings_that_do_not_fit_are_refused(copied, change, words):
    tiny.rewrite(copied / "prompt_embeddings.safetensors", change)
    refused(ValueError, lambda: load_predictor(copied), *words)


def test_a_network_of_other_channels_is_refused(copied, model):
    config = model.unet.config | dict(in_channels=12)
    unet = tiny.fill(UNet(config))
    refused(ValueError, lambda: RGBX(unet, model.vae, model.schedule, model.text, INDEX), "12 -> 4", "want 8 -> 4")


@pytest.mark.parametrize("key, value", [("prediction_type", "epsilon"), ("_class_name", "EulerDiscreteScheduler")])
def test_another_scheduler_is_refused_by_name(copied, key, value):
    edit(copied / "scheduler" / "scheduler_config.json", **{key: value})
    refused(ValueError, lambda: load_predictor(copied), repr(value))
