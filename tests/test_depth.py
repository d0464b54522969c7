"""Depth and normal networks of transformers as predictors: tiny random ones of each row of the table."""
import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import one_step
import pytest
import tiny_depth
import torch
import transformers
from expect import edit, enter, equal, refused, seeded
from PIL import Image
from safetensors.torch import load_file, save_file

import eval as evaluation
import predictor
import train
from data.pictures import save_png
from models import depth_families
from models.copies import Networks
from models.depth import DepthNetwork, card_license
from predictor import load_predictor, predict_photo
from relations import NAMES, relation, sample_pairs
from runtime.config import Config
from runtime.files import read_log
from runtime.weights import read_spec

every_network = pytest.mark.parametrize("name", tiny_depth.NETWORKS)
ENDS = ("anything", "prompt", "dpt", "dpt_dinov2", "depth_pro")    # a ReLU is last
CARD = "---\nlanguage: en\nlicense: apache-2.0\ntags: [depth]\n---\nlicense: other\n"


def photos(name, n=2):
    """n photos (n, 3, H, W) with the values of bytes, at a size that the network takes as it is."""
    size = tiny_depth.NETWORKS[name][2]
    return (torch.rand(n, 3, *size, generator=seeded(1)) * 255).round() / 255


@functools.cache
def opened(name):
    """A network that no test changes."""
    return load_predictor(tiny_depth.folder(name)).network


def processor_of(name, size):
    """transformers' own processor, with the size rule of the published ones."""
    sides = dict(zip(("height", "width"), size, strict=True))
    family = opened(name).family
    own = dict(keep_aspect_ratio=family.fit == "sides", size=sides) if name != "glpn" else {}
    if name not in ("zoe", "zoe_two", "glpn"):
        own |= dict(image_mean=family.pixels[0], image_std=family.pixels[1])
    multiple = {} if name == "glpn" else dict(ensure_multiple_of=32 if "zoe" in name else 16 if name == "dpt" else 14)
    if "zoe" in name:
        own |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return getattr(transformers, tiny_depth.PROCESSORS[name])(**own, **multiple)


def pixels_of(processor, rgb):
    """What a processor makes of photos (B, 3, H, W)."""
    pictures = [Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()) for one in rgb]
    return processor(images=pictures, return_tensors="pt").pixel_values


# the map ----------------------------------------------------------------------------------------------------------

@every_network
def test_the_map_is_that_of_transformers(name):
    """Its own class, opened by the Auto class where there is one: depth in our order, zeros of the ReLU included."""
    kind = tiny_depth.NETWORKS[name][0]
    net = opened(name)
    rgb = photos(name)
    official = getattr(transformers, kind).from_pretrained(tiny_depth.folder(name)).eval()
    with torch.no_grad():
        if name in tiny_depth.PROCESSORS:
            pixels = pixels_of(processor_of(name, rgb.shape[-2:]), rgb)
            torch.testing.assert_close(net.prepare(rgb)[0], pixels, rtol=0, atol=2e-5)
        else:
            pixels = rgb if name == "tips" else 2 * rgb - 1
        ones = pixels.split(1) if name == "zoe_two" else (pixels,)
        out = [official(pixel_values=one) for one in ones]
        want = torch.cat([one.predicted_depth for one in out])[:, None]
        got = net.predict(rgb, "depth")
    if "zoe" in name:                                                           # the padding goes: as the processor
        H, W = rgb.shape[-2:]
        top, left = (int(3 * (n / 2) ** 0.5) for n in (H, W))
        want = torch.nn.functional.interpolate(want, (H + 2 * top, W + 2 * left), mode="bilinear")
        want = want[..., top:-top, left:-left]
    if want.shape[-2:] != rgb.shape[-2:]:
        want = torch.nn.functional.interpolate(want, rgb.shape[-2:], mode="bilinear")
    sign = -1 if name in ("anything", "dpt", "depth_pro") else 1
    torch.testing.assert_close(got, sign * want, rtol=0, atol=3e-5 * float(want.abs().max()))
    assert got.std() > 0 and (name not in ENDS or (want == 0).any())


def test_normals_of_tips_point_right_where_its_own_point_left():
    net = opened("tips")
    rgb = photos("tips")
    with torch.no_grad():
        want = net.model(pixel_values=rgb).normals
        got = net.predict(rgb, "normal")
    want = torch.nn.functional.interpolate(torch.nn.functional.normalize(want, dim=1), rgb.shape[-2:], mode="bilinear")
    want = torch.nn.functional.normalize(want, dim=1) * torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert net.modalities == ("depth", "normal")


@pytest.mark.parametrize("kind, modalities", [("Tipsv2DptForDepthEstimation", ("depth",)),
                                              ("Tipsv2DptForNormalEstimation", ("normal",))])
def test_one_head_of_tips_alone(kind, modalities, tmp_path):
    with torch.random.fork_rng():
        getattr(transformers, kind)(tiny_depth.tips()).save_pretrained(tmp_path)
    net = load_predictor(tmp_path).network
    assert net.modalities == modalities and net.predict(photos("tips"), modalities[0]).isfinite().all()


@pytest.mark.parametrize("name", tiny_depth.PROCESSORS)
def test_a_photo_of_an_odd_size_is_prepared_as_the_processor_does(name):
    """Pillow rounds what it resizes to bytes: two of them, over the std."""
    H, W = tiny_depth.NETWORKS[name][2]
    rgb = torch.nn.functional.interpolate(photos(name, 1), (H // 4, W // 4), mode="bilinear", antialias=True)
    rgb = torch.nn.functional.interpolate(rgb, (H + 5, W + 3), mode="bicubic").clamp(0, 1).mul(255).round() / 255
    size = (H, H) if name == "dpt" else (H + 5, W + 3)
    got = opened(name).prepare(rgb)[0]
    torch.testing.assert_close(got, pixels_of(processor_of(name, size), rgb), rtol=0, atol=2 / 255 / 0.224)


def test_a_network_of_one_size_sees_every_photo_at_it():
    net = opened("depth_pro")
    assert net.size == 128 and net.multiple == 1
    rgb = torch.rand(1, 3, 20, 31, generator=seeded())
    want = torch.nn.functional.interpolate(2 * rgb - 1, (128, 128), mode="bilinear")
    torch.testing.assert_close(net.prepare(rgb)[0], want, rtol=0, atol=1e-5)
    assert net.predict(rgb, "depth").shape == (1, 1, 20, 31)


def test_the_map_of_a_photo_does_not_depend_on_the_others_of_its_batch():
    """ZoeDepth with two heads chooses one for a whole batch."""
    net = opened("zoe_two")
    rgb = photos("zoe_two", 3)
    with torch.no_grad():
        assert torch.equal(net.predict(rgb, "depth")[:1], net.predict(rgb[:1], "depth"))


def test_the_closer_point_of_a_map_is_the_one_the_network_calls_closer():
    rgb = photos("anything")
    net = opened("anything")
    pts = sample_pairs(2, rgb.shape[-2:], 40, seeded(2))
    with torch.no_grad():
        found = net.predict(rgb, "depth")
        nearness = net.model(pixel_values=net.prepare(rgb)[0]).predicted_depth
    red, green = (torch.stack([n[p[:, 0], p[:, 1]] for n, p in zip(nearness, side, strict=True)])
                  for side in pts.unbind(2))
    said = relation(found, pts, "depth")
    assert (said != 0).sum() > 20 and ((red > green)[said == 1]).all() and ((red < green)[said == -1]).all()


# training ---------------------------------------------------------------------------------------------------------

@every_network
def test_the_gradient_reaches_the_weights_and_the_zeros_of_a_relu(name):
    net = load_predictor(tiny_depth.folder(name)).network
    rgb = photos(name, 1)
    flat = net.predict(rgb, "depth") == 0
    net.begin_training()
    maps = net.predict(rgb, "depth")
    assert (not flat.any() and name not in ENDS) or (maps[flat] * depth_families.SIGN[net.family.means] <= 0).all()
    aim = maps[flat] if flat.any() else maps
    (aim * torch.randn(aim.shape, generator=seeded(3))).sum().backward()
    met = {key for key, p in net.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for target in net.lora_targets:
        assert any(f"{target}.weight" in key for key in met), target


def toy_config(**changes):
    return replace(Config(), **{**dict(
        precision="fp32", batch=2, group=3, pairs=8, bank_pairs=8, lora=0, credit="pair", modalities="joint",
        noise=0.3, jitter=1, noise_blocks=(1, 2)), **changes})


@every_network
def test_three_steps_begin_with_a_ratio_of_exactly_one(name):
    cfg = toy_config(lora=2 if name in ("anything", "tips") else 0,
                     checkpointing=int(name in ("dpt", "zoe")))
    nets = Networks(functools.partial(load_predictor, tiny_depth.folder(name)), cfg, torch.device("cpu"))
    side = tiny_depth.NETWORKS[name][2][0]
    rgb = torch.randint(256, (3, 3, side, side), generator=seeded(4), dtype=torch.uint8)
    pts = sample_pairs(3, (side, side), 8, seeded(5))
    prob = torch.rand(3, 8, len(NAMES), generator=seeded(6))
    opt = torch.optim.AdamW(nets.params, 1e-3)
    before = [p.detach().clone() for p in nets.params]
    for step in range(3):
        batch = one_step.batch_of(cfg, nets.policy, rgb, pts, prob, seeded(step))
        transitions, advantage, _ = one_step.explore(nets.actor, batch, seeded(10 + step))
        log = one_step.learn(nets.policy, nets.reference, batch, transitions, advantage, update=0)
        assert log["policy/ratio_min"] == log["policy/ratio_max"] == 1 and log["policy/gap"] == 0
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in nets.params)
        opt.step()
        opt.zero_grad(set_to_none=True)
    assert any(not torch.equal(a, b) for a, b in zip(before, nets.params, strict=True))
    assert all(p.isfinite().all() for p in nets.params)


def test_activations_are_recomputed_and_nothing_else_changes():
    net = load_predictor(tiny_depth.folder("anything")).network
    rgb = photos("anything", 1)

    def gradient():
        net.zero_grad(set_to_none=True)
        net.predict(rgb, "depth").square().sum().backward()
        return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}

    plain = gradient()
    calls = []
    layer = net.model.backbone.encoder.layer[0] if hasattr(net.model.backbone, "encoder") else next(
        m for m in net.model.modules() if hasattr(m, "gradient_checkpointing"))
    next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    net.checkpointing(True)
    assert equal(plain, gradient()) and len(calls) == 2
    refused(ValueError, lambda: load_predictor(tiny_depth.folder("glpn")).checkpointing(True), "GLPN", "checkpointing")


# files ------------------------------------------------------------------------------------------------------------

@every_network
def test_what_is_saved_opens_in_transformers_with_the_same_map(name, tmp_path):
    """All weights, names on disk as the class reads them; our own SPEC opens it too, with the same bits."""
    shutil.copytree(tiny_depth.folder(name), tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(CARD)
    policy = load_predictor(tmp_path / "source")
    with torch.no_grad():
        for p in policy.network.model.parameters():
            p.mul_(1.01)
    policy.save(tmp_path / "saved", base="org/name", trained_on="photos")
    rgb = photos(name, 1)
    net = policy.network
    official = transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        want = net.model(pixel_values=net.prepare(rgb)[0]).predicted_depth
        got = official(pixel_values=net.prepare(rgb)[0]).predicted_depth
        again = load_predictor(tmp_path / "saved").network.predict(rgb, "depth")
        assert torch.equal(again, net.predict(rgb, "depth"))
    torch.testing.assert_close(got, want.clamp_min(0) if name in ENDS else want, rtol=1e-6, atol=1e-6)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\nbase_model: org/name\n")
    assert f"transformers.{net.family.kind}" in card and net.family.means in card and "trained on: photos" in card
    about = json.loads((tmp_path / "saved" / "predictor.json").read_text())
    assert about["architecture"] == "transformers" and about["base"] == "org/name"


def test_adapters_lie_in_peft_s_layout_and_the_weights_hold_them(tmp_path):
    cfg = toy_config(lora=2)
    nets = Networks(functools.partial(load_predictor, tiny_depth.folder("tips")), cfg, torch.device("cpu"))
    with torch.no_grad():
        for p in nets.modules["average"].parameters():
            p.normal_(0, 0.1, generator=seeded(7))
    nets.save_average(tmp_path, base="org/name")
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    names = {n for n, _ in transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path).named_modules()}
    paths = {k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for k in adapter}
    assert paths <= names and all(p.endswith(depth_families.ATTENTION) for p in paths)
    rgb = photos("tips", 1)
    average = nets.average.network
    average.clips = False
    with torch.no_grad():
        torch.testing.assert_close(load_predictor(tmp_path).network.predict(rgb, "depth"),
                                   average.predict(rgb, "depth"), rtol=0, atol=1e-4)


def test_the_processor_of_the_source_is_kept_and_obeyed(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_depth.folder("anything"), source)
    about = dict(image_processor_type="DPTImageProcessor", do_rescale=False, image_mean=[127.5] * 3, do_pad=False,
                 image_std=[51.0, 127.5, 255.0], size=dict(height=70, width=98))
    (source / "preprocessor_config.json").write_text(json.dumps(about))
    policy = load_predictor(source)
    assert policy.size == 98
    rgb = photos("anything", 1)
    want = (rgb * 255 - 127.5) / torch.tensor([51.0, 127.5, 255.0]).view(3, 1, 1)
    torch.testing.assert_close(policy.network.prepare(rgb)[0], want, rtol=0, atol=1e-5)
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text()) == about


def test_weights_that_nothing_reaches_may_be_absent(tmp_path):
    """The published DPT files lack the first fusion layer's residual weights."""
    shutil.copytree(tiny_depth.folder("dpt"), tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if "layers.0.residual_layer1" not in k}
    save_file(state, path, metadata={"format": "pt"})
    rgb = photos("dpt", 1)
    with torch.no_grad():
        assert torch.equal(load_predictor(tmp_path / "old").network.predict(rgb, "depth"),
                           opened("dpt").predict(rgb, "depth"))
    save_file({k: v for k, v in state.items() if "head.head.4" not in k}, path, metadata={"format": "pt"})
    refused(ValueError, lambda: load_predictor(tmp_path / "old"), str(tmp_path / "old"))


@pytest.mark.parametrize("text, want", [
    (CARD, "apache-2.0"), ("# title\nlicense: mit\n", ""), ("---\ntags: x\n---\nlicense: mit\n", ""), ("", ""),
    ("---\nlicense: a b\n---\n", "")])
def test_the_license_is_what_the_card_s_head_says(text, want, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert card_license(tmp_path) == want


# what a name opens ------------------------------------------------------------------------------------------------

def test_a_hub_id_says_what_it_is_before_its_weights_are_fetched(monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return tiny_depth.folder("anything")

    monkeypatch.setattr("runtime.weights.snapshot_download", download)
    policy = load_predictor("depth-anything/some-hf")
    assert isinstance(policy.network, DepthNetwork) and policy.cfg == "depth-anything/some-hf"
    assert asked[0] == ["config.json", "model_index.json", "predictor.json"] and "*.safetensors" in asked[1]
    assert read_spec("depth-anything/some-hf").at("out/x") == "out/x"


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="llama"), ("'llama'", "depth_anything", "docs/models.md")),
    (dict(model_type=None), ("'None'", "zoedepth")),
    (dict(model_type="chmv2"), ("canopy height",)),
    (dict(architectures=["DepthAnythingForSomething"]), ("DepthAnythingForSomething", "DepthAnythingForDepthEst")),
    (dict(backbone="org/name"), ("backbone = 'org/name'",)),
    (dict(backbone_config=dict(model_type="timm_backbone", backbone="resnet18")), ("timm_backbone",)),
    (dict(fusion_hidden_size=4096), ("config.json",)),
    (dict(fusion_hidden_size="large"), ("fusion_hidden_size", "got str")),
])
def test_a_network_that_is_not_in_the_table_or_not_whole_is_one_line(changes, words, tmp_path):
    shutil.copytree(tiny_depth.folder("anything"), tmp_path / "net")
    edit(tmp_path / "net" / "config.json", **changes)
    refused(ValueError, lambda: load_predictor(tmp_path / "net"), *words)


@pytest.mark.parametrize("processor, word", [
    (dict(do_center_crop=True), "do_center_crop"), (dict(image_mean=[1, 2]), "image_mean"),
    (dict(image_std=[0, 1, 1]), "image_std"), (dict(size=dict(height=1 << 20)), "size"),
    (dict(rescale_factor="x"), "rescale_factor"), (dict(size=dict(height="x")), "size")])
def test_a_processor_that_cannot_be_reproduced_is_one_line(processor, word, tmp_path):
    shutil.copytree(tiny_depth.folder("anything"), tmp_path / "net")
    (tmp_path / "net" / "preprocessor_config.json").write_text(json.dumps(processor))
    refused(ValueError, lambda: load_predictor(tmp_path / "net"), word, "preprocessor_config.json")


def test_a_class_that_this_transformers_does_not_know_is_one_line(monkeypatch):
    monkeypatch.setattr("models.depth_families.transformers.CONFIG_MAPPING", {})
    refused(ValueError, lambda: load_predictor(tiny_depth.folder("anything")), "does not know", "pip install")


@pytest.mark.parametrize("name, side", [("anything", 13), ("dpt", 15), ("zoe", 31), ("glpn", 20), ("tips", 8)])
def test_a_photo_smaller_than_a_patch_is_one_line(name, side):
    net = opened(name)
    refused(ValueError, lambda: net.predict(torch.rand(1, 3, side, 64), "depth"), f"{side} x 64 px", "--size")


# commands ---------------------------------------------------------------------------------------------------------

JUDGE = '''
import torch
from relations import NAMES

class LowerIsCloser:
    size, grid = 56, 1
    def digest(self): return "lower"
    def ask(self, rgb, pts, names=None, modalities=None):
        prob = torch.full((*pts.shape[:2], len(NAMES)), torch.nan)
        prob[..., 0] = torch.sigmoid((pts[..., 0, 0] - pts[..., 1, 0]) / 4)
        return prob
'''
TOY = ("--size 56 --steps 3 --photos 4 --pairs 8 --bank-pairs 8 --group 2 --batch 2 --eval-images 2 "
       "--eval-every 1 --save-every 1 --device cpu")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with photos and a judge of the user's."""
    enter(monkeypatch, tmp_path, lower=JUDGE)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        save_png(tmp_path / "photos" / f"{i}.png", torch.rand(3, 60, 80, generator=seeded(i)).numpy())
    return tmp_path


def test_one_command_tunes_it_resumes_bit_for_bit_and_the_result_is_used(desk, capsys):
    words = ["--stage", "grpo", "--policy", str(tiny_depth.folder("anything")), "--judge", "lower:LowerIsCloser",
             "--images", "photos", *TOY.split()]
    train.main([*words, "--out", "out/whole"])
    train.main([*words, "--out", "out/parts", "--stop-at", "1"])
    train.main([*words, "--out", "out/parts"])
    whole, parts = desk / "out" / "whole" / "photos", desk / "out" / "parts" / "photos"
    assert equal(load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors"))
    assert not equal(load_file(whole / "model.safetensors"),
                     load_file(tiny_depth.folder("anything") / "model.safetensors"))
    log = read_log(whole / "metrics.jsonl")
    assert len(log) == 3
    assert all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 and row["policy/gap"] == 0 for row in log)
    card = (whole / "README.md").read_text()
    assert "photos" in card and "disparity, larger is closer" in card

    predictor.main(["photos/0.png", "--checkpoint", str(whole), "--out", "maps", "--device", "cpu",
                    "--processing-res", "56"])
    found = np.load(desk / "maps" / "0_depth.npy")
    assert found.shape == (1, 60, 80) and (found <= 0).all() and found.std() > 0
    evaluation.main(["--dataset", "photos", "--data", "photos", "--checkpoint",
                     str(tiny_depth.folder("tips")), "--compare", str(tiny_depth.folder("tips")), "--out", "out",
                     "--processing-res", "56"])
    assert "12 images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["zoe", "dpt", "tips"])
def test_a_photo_of_any_shape_gets_maps_of_its_size(name):
    policy = load_predictor(tiny_depth.folder(name))
    maps = predict_photo(policy, torch.rand(3, 45, 90, generator=seeded()), processing_res=96)
    assert all(maps[m].shape[-2:] == (45, 90) and maps[m].isfinite().all() for m in policy.modalities)
