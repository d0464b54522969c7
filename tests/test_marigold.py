"""marigold.py: diffusers' numbers, the flow view of its sampler, GRPO through it, files both ways, refusals.

A tiny Marigold folder is written without diffusers; every weight is a sine of its index, so the golden numbers below
depend on no random number generator. They were stored once diffusers had given the same on the very same weights
(test_diffusers_gives_the_golden_numbers repeats that where diffusers is installed).
"""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import one_step
import pytest
import torch
from expect import edit, refused, seeded
from formulas import STEPS, flow_eta_step, log_prob
from PIL import Image
from safetensors.torch import load_file, save_file

import grpo
import predictor
import train
from judge import build_mini_judge
from models import latent_flow, lora, sd2
from models.copies import frozen_copy, keep_in_bf16
from models.diffusers_files import EMPTY, embed_prompts
from models.marigold import Marigold
from models.mini_judge import MiniSizes
from models.schedule import Schedule, flow_time
from models.sd2 import VAE, UNet
from predictor import COEFFICIENTS, ddim_sde_step, load_predictor, plan_walk, rollout, sample_ode
from relations import NAMES, srgb_encode
from runtime.command import run_command
from runtime.flags import parse
from runtime.ranks import Draw

PARITY = 1e-5                      # fp32 against diffusers, maps in [0, 1] or [-1, 1]
UNIT = 5e-5                        # the same for normals: divided by lengths down to 0.1 or so
GOLDEN = 1e-4                      # fp32 on another processor: other orders of summation, 4 network passes deep
SPACES = {"lighting": dict(albedo=("linear", False), shading=("linear", True), residual=("linear", True)),
          "appearance": dict(albedo=("srgb", False), material=("linear", False))}
TARGETS = {k: list(v) for k, v in SPACES.items()} | {
    "depth": ["depth"], "depth-v1-0": ["depth"], "normals": ["normals"]}
KINDS = list(TARGETS)
SMALL = dict(                      # for tests that train
    block_out_channels=[16, 24], attention_head_dim=[2, 3], layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
BLOCKS = 4                         # its transformer blocks: down, middle, twice up; 2 attentions of 4 matrices each
VAE_CONFIG = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[4, 8, 12, 12], layers_per_block=2, latent_channels=4,
    norm_num_groups=4, act_fn="silu", scaling_factor=0.18215, sample_size=64)
ZERO_SNR = dict(
    _class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, set_alpha_to_one=False,
    clip_sample=False, num_train_timesteps=1000)
V1_0 = ZERO_SNR | dict(timestep_spacing="leading", rescale_betas_zero_snr=False)


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
    """One tiny Marigold folder of each kind, in diffusers layout, written without diffusers; `small` is the lighting
    kind with fewer layers."""
    root = tmp_path_factory.mktemp("marigold")
    text_parts(root / "text")
    text = embed_prompts(root / "text", EMPTY, 12)
    for kind in KINDS:
        parts = fill(UNet(unet_config(len(TARGETS[kind])))), fill(VAE(VAE_CONFIG))
        schedule = Schedule(V1_0 if kind == "depth-v1-0" else ZERO_SNR)
        Marigold(*parts, schedule, text, index_of(kind), root / "text").save(root / kind)
    small = fill(UNet(unet_config(3) | SMALL)), fill(VAE(VAE_CONFIG | dict(layers_per_block=1)))
    Marigold(*small, Schedule(ZERO_SNR), text, index_of("lighting"), root / "text").save(root / "small")
    return {kind: root / kind for kind in [*KINDS, "small"]}


@pytest.fixture(scope="module")
def models(folders):
    """The folders, opened; tests that train open their own."""
    return {kind: Marigold.load(folders[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def pipes(folders):
    """The folders, opened by diffusers."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    opened = {kind: getattr(diffusers, index_of(kind)["_class_name"]).from_pretrained(folders[kind])
              for kind in KINDS}
    for pipe in opened.values():
        pipe.set_progress_bar_config(disable=True)
    return opened


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of a folder that a test may break."""
    return Path(shutil.copytree(folders["small"], tmp_path / "copied"))


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
    for T in (1, 2, 3, 4, 7, 10, 15, 50, 999, *[1000] * (kind == "lighting")):  # theirs leaves the table at 1000 + 1
        scheduler.set_timesteps(T)
        assert ours.timesteps(T) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind, steps", [                                       # more: test_the_schedule_is_diffusers
    *((kind, n) for kind in ("lighting", "depth-v1-0") for n in (1, 4, 10, 15)), ("appearance", 4), ("depth", 4),
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


def test_normalisation_constants_are_the_checkpoints(models):
    """Too small a change for the golden numbers: 1e-6 in transformers and the whole VAE, 1e-5 elsewhere."""
    eps = lambda module: {name: m.eps for name, m in module.named_modules()     # noqa: E731
                          if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))}
    found = eps(models["lighting"].unet)
    assert {e for name, e in found.items() if ".attentions." in name and "blocks.0.norm" not in name} == {1e-6}
    assert {e for name, e in found.items() if ".attentions." not in name or "blocks.0.norm" in name} == {1e-5}
    assert set(eps(models["lighting"].vae).values()) == {1e-6} and len(found) == 2 * 22 + 16 * 4 + 1


# the schedule -----------------------------------------------------------------------------------------------------

def test_zero_terminal_snr_ends_at_exactly_no_signal_and_keeps_the_first_level():
    one = Schedule(ZERO_SNR)
    assert one.abar[999] == 0 and one.abar[0] == one.final and abs(one.final - 0.99915) < 1e-12
    assert (np.diff(one.abar) < 0).all() and len(one.abar) == 1000


def test_without_zero_terminal_snr_some_signal_is_left():
    assert abs(Schedule(V1_0).abar[999] - 0.0046598) < 1e-6                     # Stable Diffusion's well-known number


def test_set_alpha_to_one_ends_at_a_clean_latent():
    assert Schedule(ZERO_SNR | dict(set_alpha_to_one=True)).final == 1


@pytest.mark.parametrize("T, want", [
    (1, [999]), (4, [999, 749, 499, 249]), (10, list(range(999, 0, -100))),
    (15, [999, 932, 866, 799, 732, 666, 599, 532, 466, 399, 332, 266, 199, 132, 66]), (50, list(range(999, 0, -20)))])
def test_trailing_timesteps(T, want):
    assert Schedule(ZERO_SNR).timesteps(T) == want


def test_leading_timesteps_have_the_offset():
    assert Schedule(V1_0).timesteps(10) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]


def test_the_quirk_ends_a_step_at_933_though_the_next_timestep_is_932():
    one = Schedule(ZERO_SNR)
    assert one.steps(15, quirk=True)[0] == (999, 0.0, one.abar[933])
    assert one.steps(15)[0] == (999, 0.0, one.abar[932])


@pytest.mark.parametrize("spacing", [ZERO_SNR, V1_0])
def test_quirk_and_visited_timesteps_agree_exactly_when_the_steps_divide_1000(spacing):
    one = Schedule(spacing)
    agree = {T for T in range(1, 101) if one.steps(T) == one.steps(T, quirk=True)}
    divides = {T for T in range(1, 101) if 1000 % T == 0}
    assert divides <= agree and (spacing is V1_0 or agree == divides)           # leading spacing floors, as the quirk


@pytest.mark.parametrize("T", [0, 1001, -3])
def test_a_number_of_steps_outside_1_to_1000_is_refused(T):
    with pytest.raises(ValueError, match=rf"{T} denoising steps; want 1 .. 1000"):
        Schedule(ZERO_SNR).steps(T)


def test_every_number_of_steps_visits_that_many_descending_timesteps():
    one = Schedule(ZERO_SNR)
    for T in range(1, 1001):                                                    # 61 once gave a 62nd, by rounding
        visited = one.timesteps(T)
        assert len(visited) == T and visited[0] == 999 and visited[-1] >= 0
        assert all(a > b for a, b in zip(visited, visited[1:], strict=False))


@pytest.mark.parametrize("key", ["beta_schedule", "prediction_type", "beta_start"])
def test_a_scheduler_config_that_leaves_a_setting_open_is_refused(key):
    with pytest.raises(ValueError, match=f"scheduler_config.json has no {key}"):
        Schedule({k: v for k, v in ZERO_SNR.items() if k != key})


def test_another_scheduler_is_refused_by_name():
    with pytest.raises(ValueError, match="PNDMScheduler"):
        Schedule(ZERO_SNR | dict(_class_name="PNDMScheduler"))


def test_leading_spacing_with_an_offset_leaves_its_last_timestep_unused():
    assert Schedule(V1_0).steps(999)[0][0] == 999
    with pytest.raises(ValueError, match="1000 denoising steps; want 1 .. 999"):
        Schedule(V1_0).steps(1000)


# the flow view ----------------------------------------------------------------------------------------------------

def native(model, T):
    """alphas_cumprod at each of the T + 1 times."""
    steps = model.schedule.steps(T)
    return [abar for _, abar, _ in steps] + [steps[-1][2]]


def size_of(abar):
    """alpha + sigma: what a native state is divided by."""
    return math.sqrt(abar) + math.sqrt(1 - abar)


@pytest.mark.parametrize("kind, T", [
    *((kind, T) for kind in ("lighting", "depth-v1-0") for T in (1, 4, 15)), ("normals", 4)])   # one of each schedule
def test_euler_steps_of_the_flow_are_the_native_ddim_sampler(models, kind, T):
    one, rgb = models[kind], torch.rand(1, 3, 64, 40, generator=seeded(3))
    noise = torch.randn(1, *one.shape(rgb), generator=seeded(T))
    clean = one._sample(noise, one.encode(rgb), T, quirk=False)
    for k, target in enumerate(one.targets):
        m = latent_flow.MODALITY.get(target)
        if m:
            want = one._encoded(one._native(clean[:, 4 * k:4 * k + 4], target), target)
            got = sample_ode(one, rgb, m, T, noise=noise)
            # fp32 of T network passes; srgb_encode is 13 times as steep near black, normals are divided by lengths
            assert got.shape == want.shape and (got - want).abs().max() < 5e-4 and got.std() > 0.01


@pytest.mark.parametrize("kind", ["lighting", "depth-v1-0"])
def test_a_velocity_is_noise_minus_the_clean_latent(models, kind, monkeypatch):
    """A network that knows noise and clean latent answers v_vp; the flow's velocity must be their difference."""
    one, steps = models[kind], models[kind].schedule.steps(7)
    shape = (1, 4 * len(one.targets), 3, 2)
    clean, noise = torch.randn(shape, generator=seeded(1)), torch.randn(shape, generator=seeded(2))
    for t, abar, _ in steps:
        a, s = math.sqrt(abar), math.sqrt(1 - abar)

        def answer(x, index, text, a=a, s=s, t=t):
            torch.testing.assert_close(x[:, 4:], a * clean + s * noise, rtol=0, atol=PARITY)        # x_vp
            assert index.tolist() == [t] and (x[:, :4] == 3).all()
            return a * noise - s * clean
        monkeypatch.setattr(one.unet, "forward", answer)
        ours = flow_time(abar)
        x = (1 - ours) * clean + ours * noise
        got = one.velocity(x, torch.tensor([ours]), torch.full((1, 4, 3, 2), 3.0))
        torch.testing.assert_close(got, noise - clean, rtol=0, atol=PARITY)


@pytest.mark.parametrize("kind", ["lighting", "depth-v1-0"])
def test_the_unet_is_told_the_timesteps_of_the_schedule(models, kind, monkeypatch):
    one, told = models[kind], []
    monkeypatch.setattr(one.unet, "forward", lambda x, index, text: (told.append(index), x[:, 4:])[1])
    for T in (*range(1, 51), 500):
        told.clear()
        x = torch.zeros(T, 4 * len(one.targets), 1, 1)
        one.velocity(x, torch.tensor(one.times(T)[:-1]), torch.zeros(T, 4, 1, 1))                  # times in fp32
        assert told[0].tolist() == one.schedule.timesteps(T)


def test_the_times_fall_and_start_at_one_and_end_at_the_final_noise_level(models):
    for T in (1, 4, 15, 50):
        grid = models["lighting"].times(T)
        assert len(grid) == T + 1 and grid[0] == 1 and all(a > b for a, b in zip(grid, grid[1:], strict=False))
        sigma, alpha = math.sqrt(1 - 0.99915), math.sqrt(0.99915)
        assert abs(grid[-1] - sigma / (alpha + sigma)) < 1e-9


def test_the_start_is_the_noise_in_units_of_the_flow(models):
    noise = torch.randn(1, 4, 2, 2, generator=seeded())
    assert torch.equal(models["depth"].start(noise, 4), noise)
    old = models["depth-v1-0"]
    torch.testing.assert_close(old.start(noise, 10), noise / size_of(native(old, 10)[0]))


@pytest.mark.parametrize("kind", ["lighting", "depth-v1-0"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("T", [2, 4, 10, 15, 50])
def test_exploration_in_the_flow_is_ddim_with_noise_rescaled(models, kind, T, eta):
    """fp64: the same numbers but for rounding."""
    shape = (1, 2, 3, 3)
    x_vp, v_vp, eps = (torch.randn(shape, generator=seeded(i)).double() for i in range(3))
    abars, grid = native(models[kind], T), models[kind].times(T)
    for abar, abar_s, t, s in zip(abars, abars[1:], grid, grid[1:], strict=False):
        a, sigma = math.sqrt(abar), math.sqrt(1 - abar)
        v = (sigma * x_vp + a * v_vp) - (a * x_vp - sigma * v_vp)                                   # noise - clean
        ours = flow_eta_step(x_vp / size_of(abar), v, t, s, eta, eps)
        for mine, theirs in zip(ours, ddim_sde_step(x_vp, v_vp, abar, abar_s, eta, eps), strict=True):
            torch.testing.assert_close(mine * size_of(abar_s), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ddim", "flow"])
def test_exploration_is_finite_for_every_number_of_steps(models, name):
    x, v, eps = (torch.randn(1, 1, 2, 2, generator=seeded(i)) for i in range(3))
    for T in range(2, 101):
        grid = models["lighting"].times(T)
        for i in range(T - 1):
            x_next, mean, std = STEPS[name](x, v, grid[i], grid[i + 1], 1.0, eps)
            assert x_next.isfinite().all() and mean.isfinite().all() and std > 0, (T, i)


def test_the_last_step_is_deterministic_and_not_trained(models):
    one = models["lighting"]
    grid, noise = one.times(4), torch.randn(1, 12, 2, 2, generator=seeded())
    seen = []

    def velocity(x, t):
        seen.append((x, 0.1 * x))
        return seen[-1][1]
    draw = Draw(seeded(1), 1)
    plan = plan_walk(grid, 3, "ddim", 1.0, draw)
    x0, taken = rollout(velocity, noise, plan, 3, lambda shape: torch.randn(shape, generator=draw.rng))
    assert [(s.t, s.s) for s in taken] == [(grid[i], grid[i + 1]) for i in range(3)]
    x, v = seen[-1]
    assert torch.equal(x0.flatten(0, 1), x + (grid[4] - grid[3]) * v)


# the predictor interface ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, want", [("lighting", ("albedo", "irradiance")), ("appearance", ("albedo",)),
                                        ("depth", ("depth",)), ("normals", ("normal",))])
def test_the_modalities_are_the_targets_that_the_judge_knows(models, kind, want):
    assert models[kind].modalities == want and set(want) <= set(NAMES)


def test_shapes_are_four_latents_a_target_at_an_eighth(models):
    rgb = torch.rand(2, 3, 40, 64)
    assert models["lighting"].shape(rgb) == (12, 5, 8) and models["depth"].shape(rgb) == (4, 5, 8)
    assert models["lighting"].encode(rgb).shape == (2, 4, 5, 8) and models["lighting"].multiple == 8


def test_the_condition_is_the_scaled_latent_of_the_photo(models):
    one, rgb = models["lighting"], torch.rand(1, 3, 16, 16, generator=seeded())
    torch.testing.assert_close(one.encode(rgb), 0.18215 * one.vae.encode(2 * rgb - 1))


def test_sides_that_are_no_multiple_of_8_are_refused(models):
    with pytest.raises(ValueError, match="20 x 64 px.*multiple of 8"):
        models["lighting"].encode(torch.rand(1, 3, 20, 64))


def test_a_modality_that_it_does_not_predict_is_refused_by_name(models):
    with pytest.raises(ValueError, match="predicts albedo, shading, residual; got modality 'depth'"):
        models["lighting"].decode(torch.zeros(1, 12, 2, 2), "depth")


@pytest.mark.parametrize("kind, m, place", [("lighting", "albedo", 0), ("lighting", "irradiance", 1)])
def test_a_modality_is_decoded_from_its_own_four_channels(models, kind, m, place):
    one, x = models[kind], torch.randn(1, 12, 2, 2, generator=seeded())
    own, others = x.clone(), x.clone()
    own[:, 4 * place:4 * place + 4] += 1
    others += 1
    others[:, 4 * place:4 * place + 4] = x[:, 4 * place:4 * place + 4]
    before = one.decode(x, m)
    assert torch.equal(one.decode(others, m), before) and (one.decode(own, m) - before).abs().max() > 0.01


def test_linear_targets_are_srgb_encoded_and_srgb_ones_are_left(models):
    """Of the same latent the two pipelines (equal VAE weights) give maps that differ by the encoding alone."""
    x = torch.randn(1, 12, 2, 2, generator=seeded())
    plain, linear = models["appearance"].decode(x[:, :8], "albedo"), models["lighting"].decode(x, "albedo")
    torch.testing.assert_close(linear, srgb_encode(plain))
    assert (linear - plain).abs().max() > 0.1


def test_an_irradiance_is_not_divided_by_its_maximum(models, monkeypatch):
    """The target is up to scale; still, one bright pixel must not move the others."""
    one, x = models["lighting"], torch.zeros(1, 12, 1, 1)
    flat = torch.full((1, 3, 8, 8), -0.5)
    monkeypatch.setattr(one.vae, "decode", lambda z, tile=0: flat.clone())
    before = one.decode(x, "irradiance")
    flat[..., 0, 0] = 0.9
    after = one.decode(x, "irradiance")
    torch.testing.assert_close(before, srgb_encode(torch.full((1, 3, 8, 8), 0.25)))
    assert torch.equal(after[..., 1:], before[..., 1:]) and (after[..., 0, 0] > before[..., 0, 0]).all()


def test_depth_is_the_mean_of_the_channels_and_normals_have_unit_length(models):
    x = torch.randn(2, 4, 3, 2, generator=seeded())
    depth, normal = models["depth"].decode(x, "depth"), models["normals"].decode(x, "normal")
    assert depth.shape == (2, 1, 24, 16) and 0 <= depth.min() and depth.max() <= 1
    assert normal.shape == (2, 3, 24, 16)
    torch.testing.assert_close(normal.norm(dim=1), torch.ones(2, 24, 16))
    clean = x * size_of(models["depth"].schedule.final)
    colours = models["depth"].vae.decode(clean / 0.18215)
    torch.testing.assert_close(depth, (colours.mean(1, keepdim=True).clamp(-1, 1) + 1) / 2)


def test_a_vanishing_normal_is_finite(models, monkeypatch):
    monkeypatch.setattr(models["normals"].vae, "decode", lambda z, tile=0: torch.zeros(1, 3, 8, 8))
    assert (models["normals"].decode(torch.zeros(1, 4, 1, 1), "normal") == 0).all()


def test_maps_are_decoded_one_at_a_time(models, monkeypatch):
    """A decoder pass at 768 px holds gigabytes: a group must not pass at once."""
    one, seen = models["depth"], []
    real = one.vae.decoder.forward
    monkeypatch.setattr(one.vae.decoder, "forward", lambda z: (seen.append(len(z)), real(z))[1])
    one.decode(torch.randn(3, 4, 2, 2, generator=seeded()), "depth")
    assert seen == [1, 1, 1]


def test_a_batch_of_states_is_every_state_alone(models):
    one, rgb = models["lighting"], torch.rand(3, 3, 32, 32, generator=seeded())
    x, t, cond = torch.randn(3, 12, 4, 4, generator=seeded(1)), torch.tensor([1.0, 0.6, 0.2]), one.encode(rgb)
    with torch.no_grad():
        whole = one.velocity(x, t, cond)
        alone = torch.cat([one.velocity(x[i:i + 1], t[i:i + 1], cond[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=2e-5)                 # velocities up to 5
    assert (whole[0] - whole[1]).abs().max() > 0.1


@pytest.mark.parametrize("change", ["x", "t", "cond"])
def test_every_input_moves_the_velocity(models, change):
    one = models["lighting"]
    args = dict(x=waves(1, 12, 4, 4), t=torch.tensor([0.5]), cond=waves(1, 4, 4, 4, k=1))
    with torch.no_grad():
        before = one.velocity(**args)
        args[change] = args[change] * 0.8
        assert (one.velocity(**args) - before).abs().max() > 0.01


def test_the_empty_prompt_acts(models, monkeypatch):
    one = models["lighting"]
    x, t, cond = waves(1, 12, 4, 4), torch.tensor([0.5]), waves(1, 4, 4, 4, k=1)
    with torch.no_grad():
        before = one.velocity(x, t, cond)
        monkeypatch.setitem(one._buffers, "text", one.text + 1)
        assert (one.velocity(x, t, cond) - before).abs().max() > 1e-3


def test_replay_is_refused_with_the_flag_to_use(models):
    with pytest.raises(ValueError, match="--replay 0"):
        models["lighting"].loss({}, ("albedo",), seeded())


# prediction -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("image", [np.zeros((8, 8)), np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8),
                                   np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8), np.uint8)])
def test_an_image_that_is_not_uint8_hwc_is_refused(models, image):
    with pytest.raises(ValueError, match=r"want \(H, W, 3\) uint8"):
        models["depth"].predict(image, 1)


def test_latents_of_another_shape_are_refused_with_both_shapes(models):
    with pytest.raises(ValueError, match=r"latents \(1, 4, 5, 5\); want \(1, 4, 6, 5\)"):
        models["depth"].predict(photo(), 1, latents=torch.zeros(1, 4, 5, 5))


def test_a_photo_so_long_that_its_short_side_vanishes_is_refused(models):
    with pytest.raises(ValueError, match="2 x 300 px.*larger --processing-res"):
        models["depth"].predict(np.zeros((2, 300, 3), np.uint8), 1)


def test_one_seed_gives_one_prediction(models):
    one = models["depth"]
    a, b, c = (one.predict(photo(), 1, generator=seeded(s)) for s in (1, 1, 2))
    assert worst(a, b) == 0 and worst(a, c) > 1e-3


def test_the_defaults_come_from_model_index(models):
    one = models["depth-v1-0"]
    assert (one.size, one.steps) == (48, 10)
    assert worst(one.predict(photo(), generator=seeded()),
                 one.predict(photo(), 10, processing_res=48, generator=seeded())) == 0


def test_a_depth_ensemble_undoes_scale_and_shift():
    """Members that are one map up to scale and shift give that map: as the first member has it."""
    first = torch.rand(1, 1, 6, 7, generator=seeded()) * 0.5 + 0.2
    members = torch.cat([first, 0.3 * first + 0.4, 0.9 * first])
    torch.testing.assert_close(latent_flow.combine_members(members, "depth"), first, rtol=0, atol=1e-6)


def test_an_ensemble_of_one_is_its_member():
    for target, channels in (("albedo", 3), ("depth", 1), ("normals", 3)):
        one = torch.randn(1, channels, 2, 2)
        assert torch.equal(latent_flow.combine_members(one, target), one)


def test_an_iid_ensemble_is_the_median_and_a_normal_one_a_member():
    members = torch.tensor([0.1, 0.9, 0.2]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert (latent_flow.combine_members(members, "albedo") == 0.2).all()
    directions = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.6, 0.8], [1.0, 0.0, 0.0]]).view(3, 3, 1, 1)
    assert latent_flow.combine_members(directions, "normals").flatten().tolist() == pytest.approx([0.0, 0.6, 0.8])


@pytest.mark.parametrize("tile", [6, 7, 100])
def test_one_tile_that_covers_all_is_the_whole_decode(models, tile):
    z = torch.randn(2, 4, 6, 5, generator=seeded())
    assert torch.equal(models["depth"].vae.decode(z, tile), models["depth"].vae.decode(z))


def test_a_tiled_decode_is_close_to_the_whole():
    """Random weights look far; with residual branches a tenth as strong a pixel depends on its surroundings, as in a
    trained VAE. What is left are the tiles' own statistics."""
    vae = fill(VAE(VAE_CONFIG))
    z = torch.randn(1, 4, 24, 24, generator=seeded())
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if name.endswith(("conv2.weight", "to_out.0.weight")):
                p *= 0.1
        whole, tiled = vae.decode(z), vae.decode(z, 16)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert (tiled - whole).std() < 0.1 * whole.std()


@pytest.mark.parametrize("h, w, tile", [(9, 5, 4), (13, 20, 8), (3, 11, 4), (5, 5, 1)])
def test_tiles_cover_every_pixel_and_their_weights_sum_to_one(h, w, tile):
    """A decoder that repeats pixels: what overlapping tiles blend is what one pass gives."""
    vae = VAE(VAE_CONFIG)
    vae.post_quant_conv = torch.nn.Identity()
    vae.decoder = torch.nn.Upsample(scale_factor=8)
    z = torch.randn(2, 4, h, w, generator=seeded())
    torch.testing.assert_close(vae.decode(z, tile), vae.decode(z), rtol=0, atol=1e-5)


# real sizes -------------------------------------------------------------------------------------------------------

REAL = dict(block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
            norm_num_groups=32)


def header(state):
    """Bytes before the tensors of a safetensors file in fp16: its length and the JSON of names, shapes, places."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for k in sorted(state):
        size = 2 * state[k].numel()
        entries[k] = dict(dtype="F16", shape=list(state[k].shape), data_offsets=[at, at + size])
        at += size
    return 8 + math.ceil(len(json.dumps(entries, separators=(",", ":"))) / 8) * 8


@pytest.mark.parametrize("n, params", [(3, 865_968_332), (2, 865_945_288), (1, 865_922_244)])
def test_the_real_unet_has_the_published_parameters(n, params):
    with torch.device("meta"):
        state = UNet(unet_config(n) | REAL).state_dict()
    assert sum(v.numel() for v in state.values()) == params and len(state) == 686
    if n == 3:
        assert header(state) + 2 * params == 1_732_019_968                      # bytes of the file on the hub


def test_the_real_vae_has_the_published_parameters():
    with torch.device("meta"):
        state = VAE(VAE_CONFIG | dict(block_out_channels=[128, 256, 512, 512], norm_num_groups=32)).state_dict()
    assert sum(v.numel() for v in state.values()) == 83_653_863 and len(state) == 248
    assert header(state) + 2 * 83_653_863 == 167_335_342


# GRPO -------------------------------------------------------------------------------------------------------------

PAPER = ["--preset", "paper", "--stage", "grpo", "--device", "cpu", "--precision", "fp32",
         "--size", "32", "--sample-steps", "3", "--group", "2", "--pairs", "8", "--bank-pairs", "8", "--batch", "2"]


def training(folder, *flags):
    """What train_grpo sets up before its loop: settings, policy, frozen reference; and the batch of a step."""
    cfg = parse([*PAPER, "--policy", "P", "--judge", "J", "--images", "I", *map(str, flags)])[1]
    policy = load_predictor(folder)
    if cfg.lora:
        lora.inject(policy.network, policy.lora_targets, cfg.lora, cfg.lora, rng=seeded(7))
    policy.checkpointing(cfg.checkpointing)
    ref = frozen_copy(policy)
    lora.disable(ref)
    pts = torch.randint(32, (3, cfg.bank_pairs, 2, 2), generator=seeded(1))
    batch = one_step.batch_of(cfg, policy, torch.randint(256, (3, 3, 32, 32), generator=seeded(2)).byte(), pts,
                              torch.rand(3, cfg.bank_pairs, 4, generator=seeded(3)), seeded(4))
    return SimpleNamespace(cfg=cfg, policy=policy, ref=ref, batch=batch)


def learn(one, taken, advantage):
    """Gather the gradient of one update; the log of it, and the gradients by name."""
    one.policy.zero_grad(set_to_none=True)
    stats = one_step.learn(one.policy, one.ref, one.batch, taken, advantage)
    return stats, {k: p.grad for k, p in one.policy.named_parameters() if p.grad is not None}


def test_exploration_is_flow_grpos_with_the_papers_estimator_and_ddims_own_noise_with_ours(folders):
    for flags, name in (((), "flow"), (("--exploration", "auto"), "ddim"), (("--exploration", "ddim"), "ddim"),
                        (("--estimator", "pair", "--exploration", "flow"), "flow")):
        one = training(folders["small"], *flags)
        for step in one_step.explore(one.policy, one.batch, seeded(5))[0]:
            assert (step.A, step.B, step.std) == COEFFICIENTS[name](step.t, step.s, one.cfg.noise)
    assert training(folders["small"], "--estimator", "pair").cfg.exploration == "auto"


@pytest.mark.parametrize("flags", [
    "--batch 1 --rollout full --exploration ddim", "--batch 1 --rollout branch --exploration flow --lora 2",
    "--batch 4 --rollout full --exploration flow --micro 3", "--batch 4 --rollout branch --micro 3 --checkpointing",
    "--batch 8 --rollout full --lora 2 --checkpointing", "--batch 8 --rollout branch --exploration flow",
    "--batch 8 --rollout full --micro 3 --lora 2", "--batch 4 --rollout branch --lora 2 --micro 3 --modalities joint",
    "--batch 4 --rollout full --modalities joint --checkpointing --credit pair"])
def test_the_ratio_is_exactly_one_at_the_first_update(folders, flags):
    one = training(folders["small"], *flags.split())
    taken, advantage, _ = one_step.explore(one.policy, one.batch, seeded(5))
    assert len(taken) == (1 if "branch" in flags else 2)
    stats, gradients = learn(one, taken, torch.ones_like(advantage))
    assert stats["policy/ratio_min"] == stats["policy/ratio_max"] == 1
    assert any(g.any() for g in gradients.values())
    assert all(("lora_" in k) == ("--lora" in flags) and k.startswith("unet.") for k in gradients)


def test_a_halved_network_gives_the_same_bits_under_autocast(folders):
    one = training(folders["small"], "--precision", "bf16")
    keep_in_bf16(one.ref.network)
    halved = sum(p.dtype == torch.bfloat16 for p in one.ref.unet.parameters())
    assert 0 < halved < len(list(one.ref.unet.parameters()))                    # norms stay fp32
    x = torch.randn(2, *one.policy.shape(one.batch.rgb), generator=seeded(1))
    with torch.no_grad():
        a, b = (grpo.Conditioned(net, one.batch).velocities(x, 0.5) for net in (one.policy, one.ref))
    assert torch.equal(a, b)


def test_the_kl_is_rounding_at_the_first_update_and_then_not(folders):
    """Not exactly zero: matrix products may differ in the last bit where the reference's copies lie in memory."""
    one = training(folders["small"], "--lora", 2)
    taken, advantage, _ = one_step.explore(one.policy, one.batch, seeded(5))
    assert learn(one, taken, advantage)[0]["policy/kl"] < 1e-10
    for layer in lora.adapters(one.policy.unet).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=seeded(6))
    assert learn(one, taken, advantage)[0]["policy/kl"] > 1e-6


def scored(folder, *flags):
    """Rollout with the whole batch at once and an advantage that does not depend on the reward."""
    one = training(folder, "--batch", 2, "--group", 4, *flags)
    taken, advantage, _ = one_step.explore(one.policy, one.batch, seeded(5))
    values = torch.tensor([[1.0, -1.0, 0.5, -0.5], [-1.5, 0.2, 0.3, 1.0]])
    return one, taken, values * torch.ones_like(advantage)


@pytest.mark.parametrize("extra", [(), ("--lora", 2)])
def test_checkpointing_gives_the_same_gradients(folders, extra):
    one, taken, advantage = scored(folders["small"], *extra)
    plain = learn(one, taken, advantage)[1]
    one.policy.checkpointing(True)
    recomputed = learn(one, taken, advantage)[1]
    assert plain.keys() == recomputed.keys()
    assert len(plain) == (BLOCKS * 16 if extra else len(list(one.policy.unet.parameters())))
    assert all(torch.equal(plain[k], recomputed[k]) for k in plain)


def test_checkpointing_really_recomputes(folders, monkeypatch):
    one, calls = load_predictor(folders["small"]), []
    real = sd2.Resnet.forward
    monkeypatch.setattr(sd2.Resnet, "forward", lambda *args: (calls.append(1), real(*args))[1])
    x, t, cond = waves(1, 12, 4, 4), torch.tensor([0.5]), waves(1, 4, 4, 4, k=1)
    counts = []
    for on in (False, True):
        one.checkpointing(on)
        calls.clear()
        one.velocity(x, t, cond).sum().backward()
        counts.append(len(calls))
    assert counts == [8, 16]


@pytest.mark.parametrize("rollout", ["full", "branch"])
def test_portions_give_the_gradients_of_the_whole_batch(folders, rollout):
    one, taken, advantage = scored(folders["small"], "--rollout", rollout)
    whole = learn(one, taken, advantage)[1]
    one.batch.cfg.micro = 3 if rollout == "full" else 1                         # 8 states, or 2 shared ones
    portions = learn(one, taken, advantage)[1]
    scale = max(g.abs().max() for g in whole.values())
    assert whole.keys() == portions.keys() and scale > 0
    for k in whole:                                                             # fp32 sums of another batch
        assert (whole[k] - portions[k]).abs().max() < 1e-4 * scale, k


def test_only_the_drawn_modality_is_decoded(folders, monkeypatch):
    one, seen = training(folders["small"], "--batch", 3), []
    real = one.policy.vae.decode
    monkeypatch.setattr(one.policy.vae, "decode", lambda z, *tile: (seen.append(tuple(z.shape)), real(z, *tile))[1])
    _, advantage, stats = one_step.explore(one.policy, one.batch, seeded(5))
    assert len(one.batch.modalities) == 1 and f"reward/{one.batch.modalities[0]}" in stats
    assert seen == [(6, 4, 4, 4)] and advantage.shape == (3, 2)                   # 3 photos x 2 samples, one target


def test_joint_modalities_decode_each_once(folders, monkeypatch):
    one, seen = training(folders["small"], "--batch", 3, "--modalities", "joint"), []
    real = one.policy.vae.decode
    monkeypatch.setattr(one.policy.vae, "decode", lambda z, *tile: (seen.append(tuple(z.shape)), real(z, *tile))[1])
    one_step.explore(one.policy, one.batch, seeded(5))
    assert one.batch.modalities == ("albedo", "irradiance") and seen == [(6, 4, 4, 4)] * 2


@pytest.mark.parametrize("extra", [(), ("--lora", 2)])
def test_the_reference_stays_the_base(folders, extra):
    """With adapters the reference shares the frozen base; without it is a copy. Its copies lie elsewhere in memory,
    where products may round otherwise: the weights are equal, the velocities equal to rounding."""
    one, base = training(folders["small"], *extra), load_predictor(folders["small"])
    with torch.no_grad():
        for p in (p for p in one.policy.parameters() if p.requires_grad):
            p += 0.1
        kept = {k.replace(".base.", "."): v for k, v in one.ref.state_dict().items() if "lora_" not in k}
        want = base.state_dict()
        assert kept.keys() == want.keys() and all(torch.equal(kept[k], want[k]) for k in want)
        x, t, cond = waves(2, 12, 4, 4), torch.tensor([0.5, 0.2]), waves(2, 4, 4, 4, k=1)
        torch.testing.assert_close(one.ref.velocity(x, t, cond), base.velocity(x, t, cond), rtol=0, atol=2e-5)
        assert (one.policy.velocity(x, t, cond) - base.velocity(x, t, cond)).abs().max() > 0.01
    assert not any(p.requires_grad for p in one.ref.parameters())
    assert one.ref.vae.quant_conv.weight is one.policy.vae.quant_conv.weight
    assert (one.ref.unet.conv_in.weight is one.policy.unet.conv_in.weight) == bool(extra)


def test_adapters_off_is_the_base_bit_for_bit(folders):
    """The base frozen too, as with adapters: torch folds a product otherwise when its weight trains."""
    one = load_predictor(folders["small"]).requires_grad_(False)
    x, t, cond = waves(2, 12, 4, 4), torch.tensor([0.5, 0.2]), waves(2, 4, 4, 4, k=1)
    with torch.no_grad():
        before = one.velocity(x, t, cond)
        paths = lora.inject(one.network, one.lora_targets, 2, 2, rng=seeded())
        fresh = one.velocity(x, t, cond)
        for layer in lora.adapters(one.network).values():
            layer.lora_B += 0.1
        moved = one.velocity(x, t, cond)
        lora.disable(one.network)
        assert torch.equal(fresh, before) and torch.equal(one.velocity(x, t, cond), before)
    assert (moved - before).abs().max() > 0.01 and len(paths) == BLOCKS * 8


@pytest.mark.parametrize("extra", [(), ("--lora", 2), ("--checkpointing",)])
def test_a_velocity_has_the_same_bits_with_and_without_gradient(folders, extra):
    """The ratio is 1 because rollout (without) and update (with) compute the same, not because a mean rounds to it."""
    one, x = training(folders["small"], *extra).policy, waves(3, 12, 5, 4)
    t, cond = torch.tensor([1.0, 0.5, 0.1]), waves(3, 4, 5, 4, k=1)
    with torch.no_grad():
        want = one.velocity(x, t, cond)
    assert torch.equal(one.velocity(x, t, cond), want)


@pytest.mark.parametrize("rollout", ["full", "branch"])
def test_an_update_makes_samples_with_positive_advantage_likelier(folders, rollout):
    """A small step down the loss raises the advantage-weighted log-probability, by step size x gradient norm^2."""
    one, taken, advantage = scored(folders["small"], "--rollout", rollout, "--kl-weight", 0)
    gradients, rate = learn(one, taken, advantage)[1], 1e-3
    with torch.no_grad():
        for k, p in one.policy.named_parameters():
            p -= rate * gradients.get(k, 0)
        net, gain = grpo.Conditioned(one.policy, one.batch), 0.0
        for step in taken:
            mean = step.A * step.x + step.B * net.velocities(step.x, step.t)
            many = [(step.x_next[:, k].double(), m.double()) for k in range(step.x_next.shape[1])
                    for m in (mean, step.mean)]
            change = [log_prob(*new, step.std) - log_prob(*old, step.std)
                      for new, old in zip(many[::2], many[1::2], strict=True)]
            gain += float((torch.stack(change, 1).reshape(advantage.shape) * advantage).mean()) / len(taken)
    expected = rate * float(sum(g.square().sum() for g in gradients.values()))
    assert gain == pytest.approx(expected, rel=0.1) and gain > 0                # first order in the step


@pytest.mark.parametrize("rollout", ["full", "branch"])
def test_a_few_steps_with_a_reward_for_bright_maps_brighten_the_maps(folders, monkeypatch, rollout):
    """Pins the sign from the reward to the map: rollout, credit, loss, update, sampling. A plain decoder: the random
    VAE's brightness hardly depends on the latent. Other seeds gained 0.08 to 0.1."""
    one = training(folders["small"], "--batch", 3, "--group", 6, "--kl-weight", 0, "--clip", 0.2,
                   "--rollout", rollout)

    def bright(pred, pts, prob, modality, cfg):
        agree = pred.mean((2, 3, 4))[..., None].expand(-1, -1, prob.shape[1])
        return agree, torch.full_like(prob, 1 / prob.shape[1]), agree.mean(2)
    monkeypatch.setattr(grpo, "agreement", bright)
    monkeypatch.setattr(one.policy.vae, "decode", lambda z, tile=0: torch.nn.functional.interpolate(
        0.05 * z[:, :3], scale_factor=8.0))
    noise, (m,) = torch.randn(8, 12, 4, 4, generator=seeded(8)), one.batch.modalities
    rgb = one.batch.rgb[:1].expand(8, -1, -1, -1)
    before = sample_ode(one.policy, rgb, m, 3, noise=noise).mean()
    optimizer, rng = torch.optim.AdamW(one.policy.unet.parameters(), lr=3e-3), seeded(9)
    for _ in range(5):
        taken, advantage, _ = one_step.explore(one.policy, one.batch, rng)
        learn(one, taken, advantage)
        optimizer.step()
    assert sample_ode(one.policy, rgb, m, 3, noise=noise).mean() > before + 0.03


# a whole run ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny judge and eleven photos, of which eight will be held out."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(root):
    """A judge and eleven photos in a folder, which it returns."""
    build_mini_judge(MiniSizes(32, 8, 32, 1, 1, 2), seeded()).eval().save(root / "judge")
    (root / "photos").mkdir()
    for i in range(11):
        Image.fromarray(photo(40 + i, 50)).save(root / "photos" / f"{i}.png")
    return root


def go(folders, inputs, out, *extra):
    """Run train.py in this process: `--preset paper` on a tiny Marigold, a tiny judge and eleven photos."""
    train.main([*PAPER, "--policy", str(folders["small"]), "--judge", str(inputs / "judge"),
                "--images", str(inputs / "photos"), "--bank", str(inputs / "bank"), "--out", str(out),
                "--steps", "2", "--save-every", "1", "--eval-every", "0", "--eval-images", "2", "--eval-steps", "2",
                "--lr", "1e-3", *map(str, extra)])


@pytest.fixture(scope="module")
def runs(folders, inputs, tmp_path_factory):
    """Two finished runs: all weights, and adapters."""
    out = tmp_path_factory.mktemp("runs")
    go(folders, inputs, out / "all", "--micro", 3, "--checkpointing")
    go(folders, inputs, out / "lora", "--lora", 2)
    return {name: out / name / "photos" for name in ("all", "lora")}


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def changed(a, b):
    """Names of the tensors that differ between two components."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


@pytest.mark.parametrize("name", ["all", "lora"])
def test_the_paper_preset_runs_on_a_marigold_folder(runs, name):
    rows = log(runs[name])
    assert [row["step"] for row in rows] == [0, 1] and all(row["grad/norm"] > 0 for row in rows)
    assert all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 for row in rows)
    report = json.loads((runs[name] / "report.json").read_text())
    assert {"reward/albedo", "reward/irradiance"} <= report.keys() and (runs[name] / "panel.png").is_file()


@pytest.mark.parametrize("name", ["all", "lora"])
def test_a_run_writes_a_diffusers_folder_that_opens_here(runs, name):
    for part in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
                 "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
                 "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer_config.json",
                 "empty_text_embedding.safetensors", "README.md"):
        assert (runs[name] / part).stat().st_size > 0, part
    assert isinstance(load_predictor(runs[name]), Marigold)


def test_a_run_trains_the_unet_and_never_the_vae(runs, folders):
    assert len(changed(runs["all"] / "unet", folders["small"] / "unet")) > 110
    assert not changed(runs["all"] / "vae", folders["small"] / "vae")


def test_a_lora_run_changes_the_attention_matrices_and_nothing_else(runs, folders):
    moved = changed(runs["lora"] / "unet", folders["small"] / "unet")
    want = {k for k in weights(folders["small"] / "unet")
            if k.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight"))}
    # attention to two text tokens has hardly any gradient in some layers; what moves is inside, and most of it does
    assert moved <= want and len(want) == BLOCKS * 8 and len(moved) > BLOCKS * 6
    assert not changed(runs["lora"] / "vae", folders["small"] / "vae")


def test_a_lora_run_writes_the_adapters_alone_too(runs, folders):
    """The base with the adapters in OUT/lora is the merged model."""
    cfg = json.loads((runs["lora"] / "lora" / "adapter_config.json").read_text())
    assert (cfg["r"], cfg["lora_alpha"], cfg["base_model_name_or_path"]) == (2, 2, str(folders["small"]))
    base = Marigold.load(folders["small"])
    lora.load_adapter(base.unet, runs["lora"] / "lora")
    merged = lora.merged_state(base.unet)
    assert all(torch.equal(v, merged[k]) for k, v in weights(runs["lora"] / "unet").items())
    assert not (runs["all"] / "lora").exists()


@pytest.mark.parametrize("name, extra", [("all", ["--micro", 3, "--checkpointing"]), ("lora", ["--lora", 2])])
def test_stopping_and_resuming_is_bitwise_the_whole_run(runs, folders, inputs, tmp_path, name, extra):
    go(folders, inputs, tmp_path, *extra, "--stop-at", 1)
    assert len(log(tmp_path / "photos")) == 1
    go(folders, inputs, tmp_path, *extra, "--stop-at", 2)
    assert not changed(tmp_path / "photos" / "unet", runs[name] / "unet")


def test_the_checkpoint_of_a_lora_run_holds_adapters_only(runs):
    keys = [k for k in load_file(runs["lora"] / "checkpoint.safetensors") if not k.startswith("opt")]
    assert keys and all("lora_" in k for k in keys) and len(keys) == 2 * BLOCKS * 16


def test_diffusers_opens_what_a_run_wrote_and_predicts_the_same(runs):
    diffusers = pytest.importorskip("diffusers")
    for folder in runs.values():
        pipe = diffusers.MarigoldIntrinsicsPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        latents = torch.randn(1, 12, 6, 5, generator=seeded())
        got = Marigold.load(folder).predict(photo(), 2, latents=latents)
        assert worst(theirs(pipe, photo(), 2, latents), got) < PARITY


def test_replay_is_refused_by_the_command(folders, inputs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: go(folders, inputs, tmp_path, "--replay", 0.1, "--base-scenes", 4), "train.py")
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train.py")]
    assert stop.value.code == 2 and len(lines) == 1 and "--replay 0" in lines[0]


def test_a_predictor_that_saw_no_procedural_scene_is_watched_on_held_out_photos_alone(folders, inputs, tmp_path):
    go(folders, inputs, tmp_path, "--eval-every", 1, "--stop-at", 1)
    row = log(tmp_path / "photos")[0]
    assert {"photos/reward/albedo", "photos/agreement/irradiance", "photos/spread/albedo"} <= row.keys()
    assert not [k for k in row if k.startswith(("wild/", "synthetic/"))]


# files ------------------------------------------------------------------------------------------------------------

def half(folder):
    """Turn a folder's weights into fp16 variants, as the hub has them, with no cached embedding."""
    for path in [*folder.glob("*/diffusion_pytorch_model.safetensors"), folder / "text_encoder" / "model.safetensors"]:
        state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        path.unlink()
        save_file(state, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    (folder / "empty_text_embedding.safetensors").unlink()
    return folder


def test_a_full_disk_leaves_whole_files_and_none_that_a_reader_opens(models, tmp_path, small_files):
    models["lighting"].save(tmp_path / "whole")
    sizes = sorted({p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file()})
    for i, most in enumerate(size - 1 for size in sizes):
        folder = tmp_path / str(i)
        with small_files(most), pytest.raises(OSError, match="File too large") as error:
            models["lighting"].save(folder)
        assert Path(error.value.filename).is_relative_to(folder) and not Path(error.value.filename).exists()
        refused(FileNotFoundError, lambda folder=folder: load_predictor(folder))
        for path in (p for p in folder.rglob("*") if p.is_file()):
            assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(folder)).read_bytes()


def test_saving_and_opening_keeps_every_bit(models, tmp_path):
    models["lighting"].save(tmp_path)
    again = Marigold.load(tmp_path)
    latents = torch.randn(1, 12, 6, 5, generator=seeded())
    want, got = (one.predict(photo(), 1, latents=latents) for one in (models["lighting"], again))
    assert worst(want, got) < PARITY                                            # equal weights, elsewhere in memory
    want, got = models["lighting"].state_dict(), again.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    assert (again.about, again.schedule.config) == (models["lighting"].about, models["lighting"].schedule.config)


def test_the_empty_prompt_is_computed_where_it_is_not_cached(copied):
    """The text encoder's last hidden state of the two tokens that begin and end a text."""
    from transformers import CLIPTextModel
    cached = load_file(copied / "empty_text_embedding.safetensors")["empty_text_embedding"]
    (copied / "empty_text_embedding.safetensors").unlink()
    with torch.no_grad():
        want = CLIPTextModel.from_pretrained(copied / "text_encoder")(torch.tensor([[0, 1]])).last_hidden_state
    got = embed_prompts(copied, EMPTY, 12)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(cached, want, rtol=0, atol=1e-6)
    assert got.shape == (1, 2, 12)


def test_a_cached_embedding_needs_no_text_encoder(copied):
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(copied / name)
    Marigold.load(copied)


def test_fp16_files_open_as_fp32_weights(copied):
    want = {k: v.half().float() for k, v in weights(copied / "unet").items()}
    got = Marigold.load(half(copied)).unet.state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v, want[k]) for k, v in got.items())


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
def test_diffusers_opens_what_was_saved_and_predicts_the_same(copied, tmp_path, variant):
    """Adapters merged; of fp16 sources plain file names come out, which open without a variant."""
    diffusers = pytest.importorskip("diffusers")
    one = Marigold.load(half(copied) if variant == "fp16" else copied)
    lora.inject(one.unet, one.lora_targets, 2, 4, rng=seeded())
    for layer in lora.adapters(one.unet).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2, generator=seeded(1))
    one.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.fp16.*"))
    pipe = diffusers.MarigoldIntrinsicsPipeline.from_pretrained(tmp_path / "saved")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 12, 6, 5, generator=seeded())
    want, got = theirs(pipe, photo(), 2, latents), one.predict(photo(), 2, latents=latents)
    # diffusers embeds the empty prompt by the fp16 text encoder where the source was fp16; ours is fp32
    assert worst(want, got) < (PARITY if variant == "fp32" else 2e-3)
    assert worst(Marigold.load(copied).predict(photo(), 2, latents=latents), got) > 0.01


def test_a_model_card_says_what_one_needs_to_know(models, tmp_path):
    models["lighting"].save(tmp_path, base="prs-eth/some-base", command="train.py --stage grpo", commit="abc123")
    card = (tmp_path / "README.md").read_text()
    for words in ("license: openrail++", "base_model: prs-eth/some-base", "MarigoldIntrinsicsPipeline",
                  "albedo, shading, residual", "albedo: linear", "48 px", "denoising steps: 4", "OpenRAIL++-M",
                  "command: train.py --stage grpo", "commit: abc123"):
        assert words in card, words
    head = card.split("---")
    assert head[0] == "" and "library_name: diffusers" in head[1]


def test_a_model_card_without_facts_claims_none(models, tmp_path):
    models["appearance"].save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model" not in card and "commit" not in card and "albedo: srgb, material: linear" in card


def test_a_run_keeps_its_command_and_commit_in_the_card(runs, folders):
    card = (runs["all"] / "README.md").read_text()
    assert "- command: " in card and "- commit: " in card and f"base_model: {folders['small']}" in card


def rewrite(path, change):
    """Change the tensors of a file: dict in, dict out."""
    state = change(load_file(path))
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})


def test_old_attention_names_of_the_vae_are_accepted(copied):
    names = {"to_q": "query", "to_k": "key", "to_v": "value"}

    def old(state):
        out = {}
        for k, v in state.items():
            head, _, leaf = k.rpartition(".")
            head = head.replace("to_out.0", "proj_attn") if "attentions" in k else head
            parent, _, last = head.rpartition(".")
            out[f"{parent}.{names.get(last, last)}.{leaf}" if "attentions" in k else k] = v
        return out
    want = Marigold.load(copied).vae.state_dict()
    rewrite(copied / "vae" / "diffusion_pytorch_model.safetensors", old)
    assert sum(".query." in k or "proj_attn" in k for k in weights(copied / "vae")) == 8
    got = Marigold.load(copied).vae.state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_weights_are_kept_in_the_dtype_asked_for(folders):
    one = Marigold.load(folders["depth"], torch.bfloat16)
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16} and one.text.dtype == torch.bfloat16


# refusals ---------------------------------------------------------------------------------------------------------

def test_another_pipeline_is_refused_before_any_weights_are_read(copied):
    edit(copied / "model_index.json", _class_name="FluxPipeline")
    shutil.rmtree(copied / "unet")
    refused(ValueError, lambda: load_predictor(copied), "'FluxPipeline'", "MarigoldDepthPipeline")


@pytest.mark.parametrize("part, key, value", [
    ("unet", "act_fn", "gelu"), ("unet", "class_embed_type", "timestep"), ("unet", "use_linear_projection", False),
    ("unet", "transformer_layers_per_block", 2), ("unet", "flip_sin_to_cos", False), ("unet", "freq_shift", 1),
    ("unet", "mid_block_type", "UNetMidBlock2D"), ("unet", "resnet_time_scale_shift", "scale_shift"),
    ("unet", "num_attention_heads", 8), ("vae", "scaling_factor", 0.13025), ("vae", "latent_channels", 16),
    ("vae", "use_quant_conv", False), ("vae", "shift_factor", 0.1),
    ("scheduler", "prediction_type", "epsilon"), ("scheduler", "timestep_spacing", "linspace"),
    ("scheduler", "beta_schedule", "linear"), ("scheduler", "clip_sample", True), ("scheduler", "thresholding", True)])
def test_an_option_that_is_not_implemented_is_refused_by_name(copied, part, key, value):
    edit(copied / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **{key: value})
    refused(ValueError, lambda: load_predictor(copied), key, repr(value), part)


def test_new_options_that_are_off_are_accepted(copied):
    edit(copied / "unet" / "config.json", new_none=None, new_false=False, new_zero=0, new_empty=[], _other="x")
    load_predictor(copied)


@pytest.mark.parametrize("key, value", [("down_block_types", ["AttnDownBlock2D"] * 4),
                                        ("up_block_types", ["UpBlock2D"] * 3)])
def test_other_blocks_are_refused_by_name(copied, key, value):
    edit(copied / "unet" / "config.json", **{key: value})
    refused(ValueError, lambda: load_predictor(copied), value[0])


def test_normals_without_the_full_z_range_are_refused(folders, tmp_path):
    folder = Path(shutil.copytree(folders["normals"], tmp_path / "copied"))
    edit(folder / "model_index.json", use_full_z_range=False)
    refused(ValueError, lambda: load_predictor(folder), "use_full_z_range")


@pytest.mark.parametrize("names", [["albedo", "material"], []])
def test_targets_that_do_not_fit_the_channels_are_refused_with_both(copied, names):
    properties = json.loads((copied / "model_index.json").read_text())["target_properties"]
    edit(copied / "model_index.json", target_properties=properties | dict(target_names=names))
    refused(ValueError, lambda: load_predictor(copied), str(tuple(names)), "16 -> 12")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_pickled_weights_alone_are_not_read(copied, part):
    path = copied / part / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    refused(FileNotFoundError, lambda: load_predictor(copied), "safetensors", ".bin", str(copied / part))


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_or_broken_json_is_refused_by_name(copied, name):
    (copied / name).write_text("{")
    refused(ValueError, lambda: Marigold.load(copied), name, "not JSON")
    (copied / name).unlink()
    refused(FileNotFoundError, lambda: Marigold.load(copied), Path(name).name)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_cut_short_are_refused_by_file(copied, part):
    path = copied / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused(ValueError, lambda: load_predictor(copied), str(path), "fetch it again")


@pytest.mark.parametrize("what, change", [
    ("conv_in.bias", lambda s: {k: v for k, v in s.items() if k != "conv_in.bias"}),
    ("extra.weight", lambda s: s | {"extra.weight": torch.zeros(1)}),
    ("conv_in.bias", lambda s: s | {"conv_in.bias": torch.zeros(3)})])
def test_a_missing_surplus_or_misshapen_key_is_refused_by_name(copied, what, change):
    rewrite(copied / "unet" / "diffusion_pytorch_model.safetensors", change)
    refused(ValueError, lambda: load_predictor(copied), what, str(copied / "unet"), "1 of 208")


def test_a_folder_without_text_encoder_and_embedding_is_refused(copied):
    (copied / "empty_text_embedding.safetensors").unlink()
    shutil.rmtree(copied / "text_encoder")
    refused(FileNotFoundError, lambda: load_predictor(copied), "text_encoder", str(copied))


def test_an_embedding_of_another_width_is_refused(copied):
    save_file({"empty_text_embedding": torch.zeros(1, 2, 7)}, copied / "empty_text_embedding.safetensors")
    refused(ValueError, lambda: load_predictor(copied), "(1, 2, 7)", "12")


def test_a_hub_id_without_a_network_is_one_line(monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub:\nname resolution failed")
    monkeypatch.setattr("runtime.weights.snapshot_download", offline)
    refused(FileNotFoundError, lambda: load_predictor("prs-eth/marigold-none"), "prs-eth/marigold-none", "the hub")


def test_a_hub_id_is_downloaded_without_pickles(folders, monkeypatch):
    import fnmatch
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folders["depth"])
    monkeypatch.setattr("runtime.weights.snapshot_download", download)
    assert load_predictor("prs-eth/marigold-some").modalities == ("depth",)
    assert asked.pop(0)[1] == ["config.json", "model_index.json", "predictor.json"]     # what it is, before its weights
    (name, patterns), = asked
    wanted = lambda path: any(fnmatch.fnmatch(path, p) for p in patterns)       # noqa: E731
    assert name == "prs-eth/marigold-some"
    assert all(wanted(str(p.relative_to(folders["depth"]))) for p in folders["depth"].rglob("*")
               if p.is_file() and p.suffix in (".json", ".safetensors", ".txt"))
    assert wanted("unet/diffusion_pytorch_model.fp16.safetensors") and not wanted("unet/diffusion_pytorch_model.bin")


# the command ------------------------------------------------------------------------------------------------------

@pytest.fixture
def predict(folders, inputs, tmp_path):
    """Run predictor.py in this process on photo 0; returns the folder of maps."""
    def run(*flags, kind="lighting"):
        out = tmp_path / f"{kind}{''.join(map(str, flags))}"
        predictor.main([str(inputs / "photos" / "0.png"), "--checkpoint", str(folders[kind]), "--out", str(out),
                        "--device", "cpu", *map(str, flags)])
        return out
    return run


def test_the_command_writes_native_numbers_and_srgb_pictures(models, predict):
    out = predict()
    want = models["lighting"].predict(photo(40, 50), generator=seeded(0))
    for name, target in (("albedo", "albedo"), ("irradiance", "shading"), ("residual", "residual")):
        array = np.load(out / f"0_{name}.npy")
        assert array.shape == (3, 40, 50) and np.abs(array.transpose(1, 2, 0) - want[target]).max() < PARITY
        with Image.open(out / f"0_{name}.png") as png:
            shown = np.asarray(png) / 255
        encoded = srgb_encode(torch.from_numpy(want[target])).numpy()
        assert np.abs(shown - encoded).max() < 0.003                            # half of an 8-bit level, and rounding
    with Image.open(out / "0_panel.png") as panel:
        assert min(panel.size) > 128
    assert len(list(out.iterdir())) == 7


@pytest.mark.parametrize("kind, names", [("depth", {"depth.npy", "depth.png", "depth_colour.png"}),
                                         ("normals", {"normal.npy", "normal.png"}),
                                         ("appearance", {"albedo.npy", "albedo.png", "material.npy", "material.png"})])
def test_the_command_names_maps_by_modality(models, predict, kind, names):
    out = predict("--denoise-steps", 1, kind=kind)
    assert {p.name for p in out.iterdir()} == {f"0_{n}" for n in names} | {"0_panel.png"}
    target = TARGETS[kind][0]
    want = models[kind].predict(photo(40, 50), 1, generator=seeded(0))[target]
    got = np.load(out / f"0_{latent_flow.MODALITY[target]}.npy").transpose(1, 2, 0)
    assert np.abs(got - want).max() < UNIT


@pytest.mark.parametrize("flags, more", [
    (("--processing-res", 64), dict(processing_res=64)), (("--denoise-steps", 15), dict(steps=15)),
    (("--ensemble-size", 3), dict(ensemble=3)), (("--seed", 5), dict(generator=5))])
def test_the_flags_of_the_command_act(models, predict, flags, more):
    """Steps as the schedule visits them, not as diffusers ends them: see Schedule.steps."""
    got = np.load(predict(*flags, kind="appearance") / "0_albedo.npy").transpose(1, 2, 0)
    rng, base = seeded(more.pop("generator", 0)), photo(40, 50)
    want = models["appearance"].predict(base, generator=rng, quirk=False, **more)["albedo"]
    plain = models["appearance"].predict(base, generator=seeded(0))["albedo"]
    assert np.abs(got - want).max() < PARITY < 1e-3 < np.abs(want - plain).max()


def test_half_precision_is_close_to_full(predict):
    full, half_ = (np.load(predict(*flags, "--denoise-steps", 1, kind="appearance") / "0_albedo.npy")
                   for flags in ((), ("--half",)))
    assert 0 < np.abs(full - half_).mean() < 0.03                               # bf16 holds 8 bits


def test_a_tile_that_covers_all_changes_nothing_and_a_small_one_little(predict):
    whole, one, many = (np.load(predict("--denoise-steps", 1, "--vae-tile", n, kind="appearance") / "0_albedo.npy")
                        for n in (0, 6, 5))
    assert np.array_equal(whole, one) and not np.array_equal(whole, many) and np.abs(whole - many).mean() < 0.1


def test_a_wrong_checkpoint_is_one_line_and_exit_code_two(inputs, copied, tmp_path, capsys):
    edit(copied / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: predictor.main([str(inputs / "photos"), "--checkpoint", str(copied), "--out",
                                                    str(tmp_path / "maps")]), "predictor.py")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "'FluxPipeline'" in err
