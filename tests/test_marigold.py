"""marigold.py: diffusers' numbers, the flow view of its sampler, GRPO through it, files both ways, refusals.

A tiny Marigold folder is written without diffusers; every weight is a sine of its index, so the golden numbers below
depend on no random number generator. They were stored once diffusers had given the same on the very same weights
(test_diffusers_gives_the_golden_numbers repeats that where diffusers is installed).
"""
import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import config
import grpo
import lora
import marigold
import predictor
import runtime
import train
from judge import MiniJudge, build_mini
from marigold import UNet, VAE, Marigold, Schedule
from predictor import NAMES, load_predictor, sample_ode
from scenes import srgb_encode

PARITY = 1e-5                      # fp32 against diffusers, maps in [0, 1] or [-1, 1]
UNIT = 5e-5                        # the same for normals: divided by lengths down to 0.1 or so
GOLDEN = 1e-4                      # fp32 on another processor: other orders of summation, 4 network passes deep
SPACES = {"lighting": dict(albedo=("linear", False), shading=("linear", True), residual=("linear", True)),
          "appearance": dict(albedo=("srgb", False), material=("linear", False))}
TARGETS = {k: list(v) for k, v in SPACES.items()} | {
    "depth": ["depth"], "depth-v1-0": ["depth"], "normals": ["normals"]}
KINDS = list(TARGETS)
VAE_CONFIG = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[4, 8, 12, 12], layers_per_block=2, latent_channels=4,
    norm_num_groups=4, act_fn="silu", scaling_factor=0.18215, sample_size=64)
ZERO_SNR = dict(
    _class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, set_alpha_to_one=False,
    clip_sample=False, num_train_timesteps=1000)
V1_0 = ZERO_SNR | dict(timestep_spacing="leading", rescale_betas_zero_snr=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unet_config(n):
    """A tiny U-Net for n targets."""
    return dict(
        _class_name="UNet2DConditionModel", sample_size=16, in_channels=4 * n + 4, out_channels=4 * n,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, block_out_channels=[16, 24, 32, 32],
        layers_per_block=2, cross_attention_dim=12, attention_head_dim=[2, 3, 4, 4], use_linear_projection=True,
        norm_num_groups=8, act_fn="silu")


@torch.no_grad()
def fill(module):
    """Give every parameter sines of its index, scaled as usual: the same numbers on every machine and version."""
    for k, (name, p) in enumerate(sorted(module.named_parameters())):
        i = torch.arange(p.numel(), dtype=torch.float64)
        wave = torch.sin(0.7 * i * i + 0.3 * i + k).view(p.shape).to(p.dtype)
        if p.ndim > 1:
            p.copy_(wave * (2 / p[0].numel()) ** 0.5)
        else:
            p.copy_(1 + 0.2 * wave if name.endswith("weight") else 0.1 * wave)
    return module.eval()


def waves(*shape, k=0):
    """Inputs by the same recipe, variance 1/2."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.9 * i * i + k).view(shape).float()


def index_of(kind):
    """model_index.json of a kind of pipeline."""
    name = "Intrinsics" if kind in SPACES else "Normals" if kind == "normals" else "Depth"
    about = dict(
        _class_name=f"Marigold{name}Pipeline", _diffusers_version="0.32.0", unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"], scheduler=["diffusers", "DDIMScheduler"],
        text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
        default_denoising_steps=10 if kind == "depth-v1-0" else 4, default_processing_resolution=48,
        prediction_type=name.lower())
    if kind in SPACES:
        about["target_properties"] = dict(target_names=TARGETS[kind]) | {
            k: dict(prediction_space=space, up_to_scale=scale) for k, (space, scale) in SPACES[kind].items()}
    elif kind == "normals":
        about["use_full_z_range"] = True
    else:
        about |= dict(scale_invariant=True, shift_invariant=True)
    return about


def text_parts(folder):
    """A tiny CLIP text encoder and tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77).save_pretrained(
        folder / "tokenizer")
    fill(CLIPTextModel(CLIPTextConfig(
        vocab_size=3, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1))).save_pretrained(folder / "text_encoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny Marigold folder of each kind, in diffusers layout, written without diffusers."""
    root = tmp_path_factory.mktemp("marigold")
    text_parts(root / "text")
    text = marigold.empty_prompt(root / "text", 12)
    for kind in KINDS:
        parts = fill(UNet(unet_config(len(TARGETS[kind])))), fill(VAE(VAE_CONFIG))
        schedule = Schedule(V1_0 if kind == "depth-v1-0" else ZERO_SNR)
        Marigold(*parts, schedule, text, index_of(kind), root / "text").save(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders):
    """The folders, opened; tests that train open their own."""
    return {kind: Marigold.load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def pipes(folders):
    """The folders, opened by diffusers."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    opened = {kind: getattr(diffusers, index_of(kind)["_class_name"]).from_pretrained(folder)
              for kind, folder in folders.items()}
    for pipe in opened.values():
        pipe.set_progress_bar_config(disable=True)
    return opened


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of a folder that a test may break."""
    return Path(shutil.copytree(folders["lighting"], tmp_path / "copied"))


def photo(H=71, W=53):
    return ((waves(H, W, 3, k=2).numpy() * 0.5 + 0.5) * 255).astype(np.uint8)


def theirs(pipe, image, steps, latents, **more):
    """diffusers' prediction as dict target -> (H, W, C)."""
    out = pipe(Image.fromarray(image), num_inference_steps=steps, latents=latents.clone(), **more).prediction
    return dict(zip(getattr(pipe, "target_properties", None) and pipe.target_properties["target_names"] or ["it"], out,
                    strict=True))


def worst(a, b):
    """Largest difference of two dicts of maps, in order."""
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(a.values(), b.values(), strict=True))


# diffusers --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, W", [(8, 8), (9, 13)])
def test_the_unet_is_diffusers(models, pipes, H, W):
    x, text = waves(2, 16, H, W), waves(2, 3, 12, k=1)
    with torch.no_grad():
        want = pipes["lighting"].unet(x, torch.tensor([7, 951]), text).sample
        got = models["lighting"].unet(x, torch.tensor([7, 951]), text)
    torch.testing.assert_close(got, want, rtol=0, atol=PARITY)
    assert got.std() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_of_the_unet_are_diffusers(models, pipes, checkpointing):
    found = []
    for net in (pipes["lighting"].unet, models["lighting"].unet):
        net.requires_grad_(True)
        x, text = waves(1, 16, 9, 6).requires_grad_(), waves(1, 2, 12, k=1).requires_grad_()
        if net is models["lighting"].unet:
            net.checkpointing = checkpointing
        out = net(x, torch.tensor(500), text)
        out = getattr(out, "sample", out)
        (out * waves(*out.shape, k=3)).mean().backward()
        found.append({"x": x.grad, "text": text.grad} | {k: p.grad for k, p in net.named_parameters()})
        net.zero_grad(set_to_none=True)
        net.checkpointing = False
    want, got = found
    assert want.keys() == got.keys() and len(got) == 688
    scale = max(g.abs().max() for g in want.values())
    for k in want:
        assert (got[k] - want[k]).abs().max() < PARITY * max(scale, 1) and got[k].any(), k


def test_the_vae_is_diffusers(models, pipes):
    ours, image = models["lighting"].vae, waves(2, 3, 64, 40)
    with torch.no_grad():
        want = pipes["lighting"].vae.encode(image).latent_dist.mean
        torch.testing.assert_close(ours.encode(image), want, rtol=0, atol=PARITY)
        torch.testing.assert_close(ours.decode(want), pipes["lighting"].vae.decode(want).sample, rtol=0, atol=PARITY)
    assert want.std() > 0.05


@pytest.mark.parametrize("kind", ["lighting", "depth-v1-0"])
def test_the_schedule_is_diffusers(models, pipes, kind):
    ours, scheduler = models[kind].schedule, pipes[kind].scheduler
    np.testing.assert_allclose(ours.abar, scheduler.alphas_cumprod.numpy(), rtol=0, atol=1e-6)      # theirs is fp32
    assert abs(ours.final - float(scheduler.final_alpha_cumprod)) < 1e-6
    for T in (1, 2, 3, 4, 7, 10, 15, 50, 999, 1000):
        scheduler.set_timesteps(T)
        assert ours.timesteps(T) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind, steps", [("lighting", n) for n in (1, 4, 10, 15, 50)] + [
    ("appearance", 4), ("depth", 4), ("depth", 15), ("depth-v1-0", 1), ("depth-v1-0", 10), ("depth-v1-0", 15),
    ("normals", 4)])
def test_the_pipeline_is_diffusers(models, pipes, kind, steps):
    image, n = photo(), len(TARGETS[kind])
    latents = torch.randn(1, 4 * n, 6, 5, generator=seeded(steps))              # 71 x 53 px -> 48 x 35, padded to 40
    got = models[kind].predict(image, steps, latents=latents)
    assert list(got) == TARGETS[kind] and all(v.shape[:2] == (71, 53) for v in got.values())
    assert worst(theirs(pipes[kind], image, steps, latents), got) < (UNIT if kind == "normals" else PARITY)
    assert all(v.std() > 0.01 for v in got.values())


@pytest.mark.parametrize("kind", ["lighting", "normals"])
def test_an_ensemble_is_diffusers(models, pipes, kind):
    """Median, and for normals the member closest to the mean; 3 members, since with 2 both are equally close."""
    image, n = photo(40, 56), len(TARGETS[kind])
    latents = torch.randn(3, 4 * n, 5, 6, generator=seeded(1))
    got = models[kind].predict(image, 2, latents=latents, ensemble=3)
    want = theirs(pipes[kind], image, 2, latents, ensemble_size=3)
    assert worst(want, got) < (UNIT if kind == "normals" else PARITY)
    assert worst(models[kind].predict(image, 2, latents=latents[:1]), got) > 0.01


@pytest.mark.parametrize("resolution", [0, 40, 64])
def test_any_processing_resolution_is_diffusers(models, pipes, resolution):
    image = photo(49, 33)
    h, w = {0: (7, 5), 40: (5, 4), 64: (8, 6)}[resolution]
    latents = torch.randn(1, 8, h, w, generator=seeded(2))
    got = models["appearance"].predict(image, 1, latents=latents, processing_res=resolution)
    assert worst(theirs(pipes["appearance"], image, 1, latents, processing_resolution=resolution), got) < PARITY


# golden numbers ---------------------------------------------------------------------------------------------------

GOLDENS = dict(
    unet=[-0.786968, -1.133001, -0.070126, -0.106581, 0.401119, -0.473870],
    vae=[-0.771014, 0.770926, 0.636386, 0.206211, -1.331569, 0.263902, -0.529840, -0.206464],
    albedo=[0.440867, 0.218160, 0.589515],
    shading=[0.284382, 0.268152, 0.344804],
    residual=[0.426957, 0.507495, 0.325612],
    normals=[-0.815336, -0.504123, 0.504219],
    depth=[0.465420, 0.441268, 0.481596])


def sampled(x, n=4):
    """n numbers of a tensor, spread over it."""
    flat = torch.as_tensor(x).detach().flatten().double()
    return flat[torch.linspace(0, len(flat) - 1, n).long()].tolist()


@torch.no_grad()
def golden_values(unet, encode, decode, predict):
    """The stored numbers, from whatever computes them."""
    z = encode(waves(1, 3, 32, 24))
    found = dict(unet=sampled(unet(waves(1, 16, 9, 6), torch.tensor(700), waves(1, 2, 12, k=1)), 6),
                 vae=sampled(z) + sampled(decode(z)))
    for kind in ("lighting", "normals", "depth"):
        latents = waves(1, 4 * len(TARGETS[kind]), 6, 5, k=4) * 2**0.5
        for name, value in zip(TARGETS[kind], predict(kind, photo(), 4, latents).values(), strict=True):
            found[name] = sampled(value, 3)
    return found


def assert_golden(found):
    assert found.keys() == GOLDENS.keys()
    for k, want in GOLDENS.items():
        np.testing.assert_allclose(found[k], want, rtol=0, atol=GOLDEN, err_msg=k)


def test_the_golden_numbers_without_diffusers(models):
    one = models["lighting"]
    assert_golden(golden_values(one.unet, one.vae.encode, one.vae.decode,
                                lambda kind, *args: models[kind].predict(*args[:2], latents=args[2])))


def test_diffusers_gives_the_golden_numbers(pipes):
    """From models that diffusers built and `fill` filled: our reading and writing of files takes no part."""
    import diffusers
    bare = lambda c: {k: v for k, v in c.items() if not k.startswith("_")}      # noqa: E731
    vae = fill(diffusers.AutoencoderKL(**bare(VAE_CONFIG)))
    unet = {kind: fill(diffusers.UNet2DConditionModel(**bare(unet_config(len(TARGETS[kind]))))) for kind in KINDS}

    def predict(kind, *args):
        pipe = pipes[kind]
        kept, pipe.unet, pipe.vae = (pipe.unet, pipe.vae), unet[kind], vae
        out = theirs(pipe, *args)
        pipe.unet, pipe.vae = kept
        return out
    assert_golden(golden_values(lambda *args: unet["lighting"](*args).sample, lambda x: vae.encode(x).latent_dist.mean,
                                lambda z: vae.decode(z).sample, predict))
