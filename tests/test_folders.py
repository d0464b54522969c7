"""Folders of weights as real people have them: two sets, twins of macOS, older names, half a download, hub pages."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import chat
import numpy as np
import pytest
import torch
from expect import edit, enter, equal, refused, seeded
from PIL import Image
from safetensors.torch import load_file, save_file
from test_marigold import SMALL, VAE_CONFIG, ZERO_SNR, fill, half, index_of, text_parts, unet_config

import judge as judging
import predictor
from data import questions
from judge import LazyJudge, build_mini_judge, load_judge
from models import checkpoint, lora, vlm
from models.diffusers_files import EMPTY, WEIGHTS, embed_prompts
from models.dit import DiT, DiTConfig
from models.marigold import Marigold
from models.mini_judge import MiniSizes
from models.schedule import Schedule
from models.sd2 import VAE, UNet
from predictor import load_predictor
from runtime import files, weights
from runtime.files import find_files
from runtime.weights import hub_folder, read_spec, weights_digest

ROOT = Path(__file__).resolve().parents[1]
TINY = MiniSizes(16, 4, 32, 1, 1, 2)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A judge in OpenGVLab's layout."""
    folder = tmp_path_factory.mktemp("folders") / "original"
    chat.write_original(folder)
    return folder


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A small Marigold for depth, with a text encoder."""
    root = tmp_path_factory.mktemp("marigold")
    text_parts(root / "text")
    parts = fill(UNet(unet_config(1) | SMALL)), fill(VAE(VAE_CONFIG | dict(layers_per_block=1)))
    text = embed_prompts(root / "text", EMPTY, 12)
    Marigold(*parts, Schedule(ZERO_SNR), text, index_of("depth"), root / "text").save(root / "whole")
    return root / "whole"


@pytest.fixture
def copied(diffusion, tmp_path):
    return Path(shutil.copytree(diffusion, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def say_again():
    checkpoint.say_once.cache_clear()


def answers(judge):
    """Logits about a fixed photo."""
    with torch.no_grad():
        return judge.logits(torch.rand(1, 3, judge.size, judge.size, generator=seeded()))


def sharded(folder, stem, variant=""):
    """Split STEM.safetensors into two shards and an index."""
    single = folder / f"{stem}.safetensors"
    state = load_file(single)
    names = [f"{stem}{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    keys = sorted(state)
    for i, name in enumerate(names):
        save_file({k: state[k] for k in keys[i::2]}, folder / name, metadata=dict(format="pt"))
    (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(dict(
        metadata={}, weight_map={k: names[i % 2] for i, k in enumerate(keys)})))
    single.unlink()


def double(folder, stem="model"):
    """All weights of a file times two."""
    path = folder / f"{stem}.safetensors"
    save_file({k: v * 2 for k, v in load_file(path).items()}, path, metadata=dict(format="pt"))


# two sets in one folder -------------------------------------------------------------------------------------------

def test_a_judge_saved_over_shards_and_an_adapter_reopens_as_what_was_saved(tmp_path):
    chat.write_original(tmp_path, shards=3)
    for name in lora.FILES:                                             # transformers would add it
        (tmp_path / name).write_text("{}")
    other = build_mini_judge(TINY, seeded(3)).eval()
    other.save(tmp_path)
    assert torch.equal(answers(load_judge(tmp_path)), answers(other))
    assert [p.name for p in find_files(tmp_path, "*.safetensors*")] == ["model.safetensors"]
    assert not [p for p in tmp_path.iterdir() if p.name in lora.FILES]


def test_a_judge_saved_in_shards_over_one_file_reopens_as_what_was_saved(original, tmp_path, monkeypatch):
    chat.write_original(tmp_path, seed=4)
    judge = load_judge(original)
    save = type(judge.model).save_pretrained
    monkeypatch.setattr(type(judge.model), "save_pretrained", lambda self, folder: save(
        self, folder, max_shard_size="50KB"))
    judge.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and len(find_files(tmp_path, "model-*.safetensors")) > 1
    assert torch.equal(answers(load_judge(tmp_path)), answers(judge))


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_one_file_beside_an_index_is_read_as_transformers_does_and_said(original, tmp_path, capsys, shards_are_there):
    judge = load_judge(original)
    judge.save(tmp_path)
    sharded(tmp_path, "model")
    judge.model.save_pretrained(tmp_path / "again")
    shutil.copyfile(tmp_path / "again" / "model.safetensors", tmp_path / "model.safetensors")
    double(tmp_path)
    if not shards_are_there:
        for path in find_files(tmp_path, "model-*.safetensors"):
            path.unlink()
    theirs = type(judge.model).from_pretrained(tmp_path)
    assert equal(dict(theirs.state_dict()), dict(load_judge(tmp_path).model.state_dict()))
    said = capsys.readouterr().err.splitlines()
    assert sum("model.safetensors and model.safetensors.index.json" in line for line in said) == 1
    assert LazyJudge(tmp_path).digest() != judge.digest()


def test_a_model_beside_an_adapter_is_read_alone_and_said(original, tmp_path, capsys):
    judge = load_judge(original)
    judge.save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path="some/base")))
    assert torch.equal(answers(load_judge(tmp_path)), answers(judge))
    assert "a model and an adapter; the model alone is read" in capsys.readouterr().err


def test_an_index_without_its_shards_is_named_and_fp16_is_enough(original, tmp_path):
    judge = load_judge(original)
    judge.save(tmp_path)
    sharded(tmp_path, "model")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(FileNotFoundError, lambda: load_judge(tmp_path), "model-00002-of-00002.safetensors")
    judge.model.half().save_pretrained(tmp_path / "half")
    os.replace(tmp_path / "half" / "model.safetensors", tmp_path / "model.fp16.safetensors")
    assert (answers(load_judge(tmp_path)) - answers(judge.float())).abs().max() < 0.1


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_marigold_in_shards_opens_and_a_save_over_it_leaves_one_set(diffusion, copied, variant):
    for name in ("unet", "vae"):
        sharded(copied / name, WEIGHTS, variant)
    sharded(copied / "text_encoder", "model", variant)
    model = Marigold.load(copied)
    assert equal(model.unet.state_dict(), load_file(diffusion / "unet" / f"{WEIGHTS}.safetensors"))
    (copied / "empty_text_embedding.safetensors").unlink()
    assert torch.allclose(Marigold.load(copied).text, model.text, atol=1e-6)
    lora.inject(model.unet, model.lora_targets, 2, 2)
    model.save(copied)
    assert find_files(copied / "lora", "*")
    whole = Marigold.load(diffusion)
    whole.save(copied)
    found = {p.relative_to(copied).as_posix() for p in copied.rglob("*.safetensors*")}
    assert found == {f"{name}/{WEIGHTS}.safetensors" for name in ("unet", "vae")} | {
        "text_encoder/model.safetensors", "empty_text_embedding.safetensors"}


def test_a_marigold_saved_over_its_fp16_twin_leaves_no_old_weights_to_open(diffusion, copied):
    half(copied)
    Marigold.load(diffusion).save(copied)
    assert not [p for p in copied.rglob("*.safetensors") if ".fp16." in p.name]


def test_our_predictor_saved_over_a_marigold_is_what_opens(copied, tmp_path):
    ours = DiT(DiTConfig(16, 8, 16, 1, 1, 2), seed=5)
    ours.save(copied)
    assert equal(dict(load_predictor(copied).state_dict()), dict(ours.state_dict()))


# names ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_a_wrapper_s_name_is_stripped_when_it_is_the_whole_difference(original, diffusion, copied, tmp_path, wrapper):
    def wrap(path):
        save_file({f"{wrapper}{k}": v for k, v in load_file(path).items()}, path, metadata=dict(format="pt"))
    ours = DiT(DiTConfig(16, 8, 16, 1, 1, 2), seed=5)
    ours.save(tmp_path / "ours")
    wrap(tmp_path / "ours" / "predictor.safetensors")
    assert equal(dict(load_predictor(tmp_path / "ours").state_dict()), dict(ours.state_dict()))
    for path in copied.glob("*/*.safetensors"):
        wrap(path)
    (copied / "empty_text_embedding.safetensors").unlink()
    assert equal(Marigold.load(copied).unet.state_dict(), Marigold.load(diffusion).unet.state_dict())
    judge = load_judge(original)
    for k, folder in enumerate((original, tmp_path / "native")):
        judge.save(tmp_path / "native")
        here = Path(shutil.copytree(folder, tmp_path / f"wrapped_{k}"))
        wrap(here / "model.safetensors")
        assert torch.equal(answers(load_judge(here)), answers(judge))
    chat.write_qwen(tmp_path / "qwen", "qwen3_vl")
    want = answers(load_judge(tmp_path / "qwen"))
    wrap(tmp_path / "qwen" / "model.safetensors")
    assert torch.equal(answers(load_judge(tmp_path / "qwen")), want)


def test_weights_that_lack_one_more_are_one_line_though_wrapped(tmp_path, capfd):
    chat.write_qwen(tmp_path, "qwen3_vl")
    state = load_file(tmp_path / "model.safetensors")
    gone = next(k for k in state if k.endswith("q_proj.weight"))
    state["surplus"] = state.pop(gone)
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "model.safetensors")
    refused(ValueError, lambda: load_judge(tmp_path), str(tmp_path), "q_proj.weight")
    assert capfd.readouterr().err.count("\n") == 0                              # no report of transformers


def test_a_class_of_the_user_s_with_a_part_called_module_keeps_it():
    net = torch.nn.ModuleDict(dict(module=torch.nn.Linear(2, 2)))
    state = net.state_dict()
    assert weights.strip_wrappers(state, state) is state
    weights.load_strict(net, dict(state), "here")


def test_twins_of_macos_do_not_exist(original, copied, tmp_path):
    native, adapter = tmp_path / "native", tmp_path / "adapter"
    judge = load_judge(original)
    judge.save(native)
    want = {}
    lora.inject(judge.model, ("0.self_attn.q_proj",), 2, 4, rng=seeded())
    for layer in lora.adapters(judge.model).values():
        layer.lora_B.data.normal_(generator=seeded(1))
    lora.save_adapter(judge.model, adapter, base=str(native))
    (copied / "empty_text_embedding.safetensors").unlink()
    folders = native, adapter, copied, Path(shutil.copytree(original, tmp_path / "chat"))
    for folder in folders:
        want[folder] = weights_digest(folder)
        chat.write_twins(folder)
        assert weights_digest(folder) == want[folder]
    for folder in (native, adapter, folders[3]):
        load_judge(folder)
        LazyJudge(folder).digest()
    Marigold.load(copied).save(tmp_path / "saved")
    assert not [p for p in (tmp_path / "saved").rglob("._*")]


def test_adapters_of_older_names_fit_the_same_network(original, tmp_path):
    native = tmp_path / "native"
    load_judge(original).save(native)
    chat.write_qwen(tmp_path / "qwen", "qwen2_5_vl")
    older = {
        native: ((".model.language_model.layers.", ".language_model.model.layers."),
                 (".model.language_model.layers.", ".model.layers."), (".lora_A.", ".lora_A.default.")),
        tmp_path / "qwen": ((".model.language_model.layers.", ".model.layers."), (".model.visual.", ".visual."))}
    for base, renames in older.items():
        judge = load_judge(base)
        targets = ("q_proj", "fc1", "mlp.gate_proj") if base == native else ("q_proj", "gate_proj")
        lora.inject(judge.model, targets, 2, 4, rng=seeded())
        for k, layer in enumerate(lora.adapters(judge.model).values()):
            layer.lora_B.data.normal_(generator=seeded(k))
        lora.save_adapter(judge.model, tmp_path / "adapter", base=str(base))
        want = answers(load_judge(tmp_path / "adapter"))
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        state = load_file(path)
        for old, new in renames:
            save_file({k.replace(old, new): v for k, v in state.items()}, path)
            assert torch.equal(answers(load_judge(tmp_path / "adapter")), want), new
        save_file({k.replace("layers.0", "h.0"): v for k, v in state.items()}, path)
        refused(ValueError, lambda: load_judge(tmp_path / "adapter"), "h.0.", "layers.0.", "another base")


def test_the_older_name_of_every_layer_is_its_own():
    """OpenGVLab's path of a layer and the native one are one to one."""
    paths = {"language_model.model.layers.3.mlp.up_proj": "model.language_model.layers.3.mlp.up_proj",
             "model.layers.3.mlp.up_proj": "model.language_model.layers.3.mlp.up_proj",
             "vision_model.encoder.layers.2.mlp.fc1": "model.vision_tower.encoder.layer.2.mlp.fc1",
             "vision_model.encoder.layers.2.attn.proj": "model.vision_tower.encoder.layer.2.attention.projection_layer",
             "mlp1.3": "model.multi_modal_projector.linear_2",
             "visual.blocks.1.attn.qkv": "model.visual.blocks.1.attn.qkv",
             "language_model.lm_head": "lm_head", "lm_head": "lm_head",
             "model.language_model.layers.3.mlp.up_proj": "model.language_model.layers.3.mlp.up_proj"}
    assert {old: vlm.native_path(old) for old in paths} == paths


def test_two_keys_of_one_layer_are_refused(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    lora.inject(net, ("0",), 2, 4)
    lora.save_adapter(net, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    save_file(state | {k.replace(".0.", ".old.0."): v.clone() for k, v in state.items()}, path)
    refused(ValueError, lambda: lora.load_adapter(torch.nn.Sequential(torch.nn.Linear(3, 3)), tmp_path,
                                                  lambda name: name.removeprefix("old.")), "2 of 4 keys")


@pytest.mark.parametrize("init, good", [
    (True, True), (False, True), (None, True), ("gaussian", True), ("Gaussian", True), ("eva", True),
    ("orthogonal", True), ("pissa", False), ("pissa_niter_16", False), ("olora", False), ("corda", False),
    ("loftq", False), ("lora_ga", False), ("something", False), ([], False), (3, False)])
def test_an_adapter_whose_start_changed_the_base_is_refused_by_name(tmp_path, init, good):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    lora.inject(net, ("0",), 2, 4)
    lora.save_adapter(net, tmp_path)
    edit(tmp_path / "adapter_config.json", init_lora_weights=init)

    def load():
        lora.load_adapter(torch.nn.Sequential(torch.nn.Linear(3, 3)), tmp_path)
    if good:
        load()
    else:
        refused(ValueError, load, f"init_lora_weights = {init!r}", "gaussian")


@pytest.mark.parametrize("option", ["layer_replication", "alora_invocation_tokens", "use_qalora", "use_anything",
                                    "lora_bias", "target_parameters", "trainable_token_indices"])
def test_an_option_that_changes_what_is_computed_is_refused_by_name(tmp_path, option):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    lora.inject(net, ("0",), 2, 4)
    lora.save_adapter(net, tmp_path)
    edit(tmp_path / "adapter_config.json", **{option: [[0, 1]]})
    refused(ValueError, lambda: lora.load_adapter(torch.nn.Sequential(torch.nn.Linear(3, 3)), tmp_path), option)


# the hub ----------------------------------------------------------------------------------------------------------

PAGE = "https://huggingface.co/"


@pytest.mark.parametrize("text", [
    "prs-eth/marigold", "prs-eth/marigold/", f"{PAGE}prs-eth/marigold", f"{PAGE}prs-eth/marigold/",
    f"{PAGE}prs-eth/marigold/tree/main", f"{PAGE}prs-eth/marigold?library=diffusers", "hf.co/prs-eth/marigold",
    "huggingface.co/prs-eth/marigold#usage"])
def test_a_hub_id_is_read_from_its_page_and_with_a_slash(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prs-eth").mkdir()                                              # empty: it is no model
    assert read_spec(text).hub == read_spec(text).text == "prs-eth/marigold"
    (tmp_path / "prs-eth" / "marigold" / ".cache").mkdir(parents=True)          # what a failed download leaves
    assert read_spec(text).hub == "prs-eth/marigold"
    (tmp_path / "prs-eth" / "marigold" / "config.json").touch()
    assert read_spec("prs-eth/marigold/").folder and not read_spec("prs-eth/marigold").hub


@pytest.mark.parametrize("text", [f"{PAGE}datasets/a/b", f"{PAGE}datasets/a", f"{PAGE}a/b/blob/main/x.safetensors",
                                  f"{PAGE}a/b/tree/v2", PAGE, f"{PAGE}spaces/a"])
def test_another_page_of_the_hub_is_explained(text):
    refused(FileNotFoundError, lambda: read_spec(text), text, "ORG/NAME", "download it")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Function: a folder as hub id org/name in a cache without a connection; `absent`: files that were not fetched."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, *absent):
        commit = "0123456789abcdef0123456789abcdef01234567"
        store = tmp_path / "hub" / "models--org--name"
        (store / "refs").mkdir(parents=True)
        (store / "refs" / "main").write_text(commit)
        shutil.copytree(folder, store / "snapshots" / commit)
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        try:
            from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
        except ImportError:                                                     # older: it does not know what lacks
            return "org/name"
        write_tree_cache(str(store), commit, {name: TreeCacheEntry(
            size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None) for name in (*names, *absent)})
        return "org/name"
    return put


def test_half_of_a_marigold_in_the_cache_is_enough(copied, cache):
    want = Marigold.load(copied)
    name = cache(half(copied), "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                 "unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder/model.safetensors")
    got = load_predictor(name)
    assert max((a - b).abs().max() for a, b in zip(got.parameters(), want.parameters(), strict=True)) < 2e-3
    assert weights_digest(name) == weights_digest(name)


def test_what_lacks_in_the_cache_is_named(copied, cache):
    for path in (copied / "unet").glob("*.safetensors"):
        path.unlink()
    name = cache(copied, "unet/diffusion_pytorch_model.safetensors")
    refused(FileNotFoundError, lambda: load_predictor(name), "diffusion_pytorch_model.safetensors", "unet")


def test_a_judge_with_one_more_file_on_the_hub_opens_without_a_connection(original, cache):
    name = cache(original, "consolidated.safetensors")
    assert torch.equal(answers(load_judge(name)), answers(load_judge(original)))


def test_a_model_that_is_not_in_the_cache_is_one_line(cache):
    refused(FileNotFoundError, lambda: hub_folder("org/other", ["*"]), "org/other", "hub")


# tokenizers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_tokens_that_stand_in_tokenizer_config_alone_are_known(tmp_path, kind):
    chat.write_qwen(tmp_path, kind)
    want = load_judge(tmp_path)
    chat.move_tokens(tmp_path)
    got = load_judge(tmp_path)
    assert got.prompt.key() == want.prompt.key() and torch.equal(answers(got), answers(want))


@pytest.mark.parametrize("lost", ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|im_start|>", "<|im_end|>"])
def test_a_mark_that_no_file_knows_is_refused_by_name(tmp_path, lost):
    chat.write_qwen(tmp_path, "qwen3_vl")
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != lost]
    state["model"]["vocab"].pop(lost, None)
    path.write_text(json.dumps(state))
    refused(ValueError, lambda: load_judge(tmp_path), lost, "one token")
    refused(ValueError, lambda: LazyJudge(tmp_path), lost)


def test_a_number_that_does_not_follow_the_others_is_refused(tmp_path):
    chat.write_qwen(tmp_path, "qwen3_vl")
    chat.move_tokens(tmp_path, "<|endoftext|>")                                 # all others move down by one
    refused(ValueError, lambda: load_judge(tmp_path), "tokenizer_config.json", "'<|im_start|>'")


def test_an_image_token_of_another_number_is_refused(tmp_path):
    chat.write_qwen(tmp_path, "qwen3_vl")
    edit(tmp_path / "config.json", image_token_id=7)
    refused(ValueError, lambda: load_judge(tmp_path), "'<|image_pad|>'", "7")


# scores in 16 bits ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_scores_of_a_bf16_judge_with_shifted_logits_are_as_fine_as_in_fp32(original, shift):
    """The same bf16 hidden states, the head in bf16 and in fp32: a shift of all logits rounds them to .125."""
    judge = load_judge(original, dtype=torch.bfloat16)
    head = judge.model.lm_head
    judge.model.lm_head = torch.nn.Linear(head.in_features, head.out_features, dtype=torch.bfloat16)
    judge.model.lm_head.weight.data.copy_(head.weight * 0.2)                    # answers near one half
    judge.model.lm_head.bias.data.fill_(shift)
    images = torch.rand(48, 3, judge.size, judge.size, generator=seeded())
    with torch.no_grad():
        hidden = judge.hidden(images)
        whole = judge.prompt.answer_values(judge.model.lm_head(hidden), tuple(judging.NAMES))
        rough = (whole[..., 0] - whole[..., 1]).sigmoid()
        head = judge.model.lm_head.float()
        exact = judge.prompt.answer_values(head(hidden.float()), tuple(judging.NAMES))
        exact = (exact[..., 0] - exact[..., 1]).sigmoid()
        head.bfloat16()
    got = torch.stack([judge.score(images, m) for m in judging.NAMES], 1)
    packed = judge.decide(images).sigmoid()
    assert got.dtype == torch.float32 and (packed - exact).abs().max() < 1e-5
    assert packed.unique().numel() == packed.numel() and (packed == 0.5).sum() == 0
    assert ((packed > 0.5) == (exact > 0.5)).all() and (got - packed).abs().max() < 0.02     # bf16 of two sequences
    if shift:
        assert rough.unique().numel() < 60 and (rough == 0.5).any()             # what whole logits in bf16 give


def test_rows_of_the_head_give_the_bits_of_the_whole_head_in_fp32():
    judge = build_mini_judge(MiniSizes(), seeded()).eval()
    images = torch.rand(7, 3, judge.size, judge.size, generator=seeded())
    with torch.no_grad():
        whole = judge.prompt.answer_values(judge.logits(images), judging.NAMES)
        assert torch.equal(judge.decide(images), whole[..., 0] - whole[..., 1])
        with torch.autocast("cpu", torch.bfloat16):                             # autocast does not reach the rows
            hidden = judge.hidden(images)
            values = judge.prompt.compare_answers(judge.model.lm_head, hidden, judging.NAMES)
        assert values.dtype == torch.float32
        assert torch.equal(values, judge.prompt.compare_answers(judge.model.lm_head, hidden, judging.NAMES))


# commands ---------------------------------------------------------------------------------------------------------

OWN = """
import torch, torch.nn as nn
class Map(nn.Module):
    modalities, size = ("depth", "normal"), 16
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8),
                                 nn.ConvTranspose2d(8, 3, 3, padding=1))
    def predict(self, rgb, modality):
        x = self.net(rgb + torch.linspace(0, 1, rgb.shape[-1]))                 # a table in fp32
        return x[:, :1] if modality == "depth" else x
class Flow(nn.Module):
    modalities, size = ("albedo",), 16
    def __init__(self):
        super().__init__()
        self.net = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    def velocity(self, x, t, cond, modality):
        both = torch.cat((x, cond), 1) + torch.sin(t.view(-1, 1, 1, 1) * torch.arange(x.shape[-1]))
        return self.net(both.flatten(2).transpose(1, 2)).transpose(1, 2)[:, :3].view_as(x)
    def decode(self, x, modality):
        return x.clamp(0, 1)
"""


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("heads", ["a", {}, 0, -1, 2_000_000, [2, "a"], [2, 5]])
def test_a_number_of_heads_that_does_not_divide_the_channels_is_refused(copied, heads):
    edit(copied / "unet" / "config.json", attention_head_dim=heads)
    refused(ValueError, lambda: Marigold.load(copied), "heads" if heads != {} else "a whole diffusers folder")


@pytest.mark.parametrize("change", [dict(pts="ab"), dict(pts=[]), dict(pts=[[1, 2], [1, 99]]), dict(pts=[[1, 2]]),
                                    dict(pts=[[1, 2], [1, 2.0]]), dict(modality="depths"), dict(first=1),
                                    dict(margin=None), dict(scene="../../x"), dict(scene=3), dict(id=None),
                                    dict(image="/etc/passwd"), None, 7, "rows"])
def test_cached_questions_are_checked_before_they_are_used(rooms, tmp_path, change):
    path = tmp_path / "questions.json"
    scenes = ["room_1.cam.0"]
    rows = questions.load_questions(path, rooms, scenes, 2, 16, 0)
    assert questions.load_questions(path, rooms, scenes, 2, 16, 0) == rows
    kept = json.loads(path.read_text())
    rows = [*rows[:2], rows[2] | change] if isinstance(change, dict) else change
    path.write_text(json.dumps(kept | dict(rows=rows)))
    refused(ValueError, lambda: questions.load_questions(path, rooms, scenes, 2, 16, 0), str(path), "want")


@pytest.mark.parametrize("family", ["ours", "marigold", "mine_in_half:Map", "mine_in_half:Flow"])
def test_half_works_for_every_family(family, copied, photo, tmp_path, monkeypatch):
    enter(monkeypatch, tmp_path, mine_in_half=OWN)
    torch.manual_seed(0)
    spec = family
    if family == "ours":
        net = DiT(DiTConfig(16, 4, 32, 1, 1, 2))
        for p in net.parameters():
            p.data.add_(torch.randn(p.shape, generator=seeded(p.numel())) * 0.05)
        net.save(tmp_path / "ours")
        spec = str(tmp_path / "ours")
    elif family == "marigold":
        spec = str(copied)
    maps = {}
    for flags in ((), ("--half",)):
        out = tmp_path / "-".join(("out", *flags))
        torch.manual_seed(0)                                                    # weights of a class of the user's
        predictor.main([str(photo), "--checkpoint", spec, "--out", str(out), "--denoise-steps", "2", *flags])
        maps[flags] = {p.name: np.load(p) for p in out.rglob("*.npy")}
    full, rough = maps.values()
    assert full.keys() == rough.keys() and full
    for name, x in full.items():
        assert np.isfinite(rough[name]).all() and rough[name].dtype == x.dtype
        assert 0 < np.abs(rough[name].astype(float) - x).mean() < 0.05, name


@pytest.mark.parametrize("green, one", [((3, 2), True), ((2, 2), True), ((8, 8), False)])
def test_two_points_that_are_one_to_the_judge_are_refused(photo, tmp_path, capsys, green, one):
    build_mini_judge(TINY, seeded()).save(tmp_path / "judge")                   # cells of 4 of 16 px: 5 x 6 px here
    argv = [str(photo), "--red", "2", "2", "--green", *map(str, green), "--model", str(tmp_path / "judge")]
    if not one:
        judging.main(argv)
        assert "p = " in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as error:
        judging.main(argv)
    assert error.value.code == 2 and "one point to the judge" in capsys.readouterr().err


def command(*argv, cwd=ROOT, **env):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, timeout=300, check=False,
                          env=os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") | env)


TOY = ("--size 16 --width 32 --heads 2 --encoder-layers 1 --layers 1 --patch 4 --base-scenes 8 --base-steps 2 "
       "--base-batch 4 --device cpu").split()


def test_no_command_fails_for_want_of_a_character(photo, tmp_path):
    """Four commands in one process whose console knows no Cyrillic letter; two of them have nothing to open."""
    DiT(DiTConfig(16, 4, 32, 1, 1, 2)).save(tmp_path / "ours")
    name = tmp_path / "карты"
    lines = [["predictor.py", photo, "--checkpoint", tmp_path / "ours", "--out", name],
             ["train.py", "--stage", "base", "--out", f"{name}2", *TOY],
             ["judge.py", photo, "--red", 1, 1, "--green", 9, 9, "--model", name],
             ["data/prepare.py", "jsonl", name, tmp_path / "x"]]
    (tmp_path / "lines.json").write_text(json.dumps([[str(word) for word in line] for line in lines]))
    (tmp_path / "runner.py").write_text("""
import importlib, json, sys
from runtime.command import run_command
for line in json.load(open(sys.argv[1])):
    main = importlib.import_module(line[0].removesuffix(".py").replace("/", ".")).main
    try:
        run_command(lambda: main(line[1:]), line[0])
        print("code 0")
    except SystemExit as stop:
        print("code", stop.code)
""")
    done = command(tmp_path / "runner.py", tmp_path / "lines.json", PYTHONIOENCODING="cp1252", PYTHONPATH=str(ROOT))
    assert re.findall(rb"code (\d)", done.stdout) == [b"0", b"0", b"2", b"2"], done.stderr
    assert done.stdout.count(b"\\u043a") >= 2
    assert b"Traceback" not in done.stderr and b"codec" not in done.stderr
    assert list(name.rglob("*.npy"))


@pytest.mark.parametrize("name", ["/no/such/compiler"])
def test_compile_without_a_compiler_is_one_line(tmp_path, name):
    git = shutil.which("git")
    (tmp_path / "bin").mkdir()
    if git:
        (tmp_path / "bin" / "git").symlink_to(git)
    done = command("train.py", "--stage", "base", "--compile", "--out", tmp_path / "out", *TOY,
                   PATH=str(tmp_path / "bin"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
                   **({} if name is None else dict(CXX=name, CC=name)))
    text = [line for line in re.split(r"[\r\n]+", done.stderr.decode()) if line and "step" not in line]
    assert done.returncode == 2 and len(text) == 1 and "--compile: got no compiler" in text[0], done.stderr


# packages ---------------------------------------------------------------------------------------------------------

def test_transformers_brings_what_requirements_txt_leaves_to_it():
    needs = [line for line in requires("transformers") if "extra ==" not in line]
    brought = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in needs}
    assert {"tqdm", "huggingface_hub", "tokenizers"} <= brought


def test_a_file_that_vanishes_or_is_replaced_is_not_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, dict(x=torch.zeros(3)))
    whole = files.Tensors

    class Racing(whole):
        """Another process changes the file between the header and the tensors."""
        turn = 0

        def __init__(self, name, **keep):
            super().__init__(name, **keep)
            Racing.turn += 1
            if Racing.turn == 1:
                files.write_tensors(path, dict(x=torch.ones(3), y=torch.ones(9)))
            elif Racing.turn == 3:
                path.unlink()
    monkeypatch.setattr(files, "Tensors", Racing)
    assert files.read_checked(path)[0]["x"].sum() in (0, 3)
    Racing.turn = 2
    with contextlib.suppress(FileNotFoundError):                                # the file may be mapped already
        files.read_checked(path)
