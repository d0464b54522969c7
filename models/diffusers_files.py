"""The files of a pipeline in diffusers' layout: a folder or hub id is read without diffusers, and written again.

    model_index.json  unet/  vae/  scheduler/  text_encoder/  tokenizer/
Weights are safetensors, fp32 or fp16. Embeddings of the prompts are kept beside them, so that the text encoder may be
absent later. Source: diffusers' folders; CLIP text model (Radford et al. 2021) of transformers.
"""
import functools
import shutil
from dataclasses import dataclass

import torch

from models import checkpoint
from models.sd2 import VAE, UNet
from runtime import files
from runtime.weights import hub_folder, load_strict, plain_config

WEIGHTS = "diffusion_pytorch_model"
INDEX = "model_index.json"
FAMILY = "reasonx.json"                # written by the user, for what an index does not say (models/e2e.py)
PATTERNS = (INDEX, FAMILY, "LICENSE*", "*/config.json", "*/preprocessor_config.json", "scheduler/*", "tokenizer/*",
            f"unet/{WEIGHTS}*.safetensors*", f"vae/{WEIGHTS}*.safetensors*", "text_encoder/model*.safetensors*",
            "*_embedding*.safetensors")
FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}      # attention of older VAE files
COPIED = ("text_encoder", "tokenizer", "feature_extractor")                              # components that never train


@dataclass(frozen=True)
class Prompts:
    """The texts that a U-Net is told, and the file in the folder that keeps their embeddings."""

    file: str
    texts: dict          # key in the file: text
    tokens: int = 0      # each is padded to so many; 0: not padded


EMPTY = Prompts("empty_text_embedding.safetensors", {"empty_text_embedding": ""})


def pipeline_folder(spec):
    """The folder of a SPEC: itself, or that of a hub id. raises FileNotFoundError: neither."""
    return hub_folder(spec, list(PATTERNS))


def read_part(path):
    """A config of a pipeline's folder: dict without keys that load code. raises FileNotFoundError, Refusal."""
    if not path.is_file():
        raise FileNotFoundError(f"predictor: got no {path.name} in {path.parent}; want a diffusers-layout folder, such "
                                "as a download of prs-eth/marigold-iid-lighting-v1-1")
    return plain_config(files.read_json(path), path)


def read_networks(folder, dtype):
    """The U-Net and the VAE of a folder, in `dtype`. raises FileNotFoundError, ValueError: keys that do not fit."""
    parts = []
    for kind, name in ((UNet, "unet"), (VAE, "vae")):
        with torch.device("meta"):
            model = kind(read_part(folder / name / "config.json"))
        state = checkpoint.read_weights(folder / name, WEIGHTS)
        for key in [k for k in state if k.split(".")[-2] in FORMER]:
            head, last, leaf = key.rsplit(".", 2)
            state[f"{head}.{FORMER[last]}.{leaf}"] = state.pop(key)
        state = {k: state.pop(k).to(dtype) for k in list(state)}                # one copy in memory, not two
        load_strict(model, state, folder / name, assign=True)
        parts.append(model)
    return parts


def embed_prompts(folder, prompts, width):
    """Embeddings of Prompts, (texts, tokens, width): read from the folder, or computed by its text encoder.

    raises  FileNotFoundError: neither is there; ValueError: another shape
    """
    cached = folder / prompts.file
    if cached.is_file():
        found = files.read_tensors(cached)
        for key in prompts.texts:
            if key not in found:
                files.refuse(cached, f"no {key}", "that tensor")
        found = [found[key] for key in prompts.texts]
    else:
        found = _encode_texts(folder, prompts)
    for one in found:
        if one.ndim != 3 or one.shape[::2] != (1, width) or one.shape[1] != (prompts.tokens or one.shape[1]):
            raise ValueError(f"predictor: the embedding of a prompt in {folder} is {tuple(one.shape)}; "
                             f"want (1, {prompts.tokens or 'tokens'}, {width})")
    return torch.cat(found)


@torch.no_grad()
def _encode_texts(folder, prompts):
    """Last hidden states of the texts, a list of (1, tokens, width)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    if not (folder / "text_encoder" / "config.json").is_file() or not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(f"predictor: got no text_encoder and tokenizer in {folder}; want the whole "
                                f"diffusers folder (or its {prompts.file})")
    place = folder / "text_encoder"
    config = CLIPTextConfig.from_dict(read_part(place / "config.json"))
    state = checkpoint.read_weights(place, "model")
    encoder = checkpoint.build_network(CLIPTextModel, config, state, place, torch.float32)
    for path in files.find_files(folder / "tokenizer", "*.json"):               # before transformers reads hostile JSON
        files.read_json(path)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    padding = dict(padding="max_length", max_length=prompts.tokens, truncation=True) if prompts.tokens else {}
    return [encoder(tokenizer(text, return_tensors="pt", **padding).input_ids).last_hidden_state
            for text in prompts.texts.values()]


def write_networks(folder, unet, vae, unet_state):
    """Write both networks; unet_state: of the U-Net, with its adapters merged."""
    for name, module, state in (("unet", unet, unet_state), ("vae", vae, vae.state_dict())):
        files.write_weights(folder / name / f"{WEIGHTS}.safetensors", state)
        checkpoint.keep_one_set(folder / name, WEIGHTS)
        files.write_json(folder / name / "config.json", module.config)


def write_prompts(folder, prompts, text):
    """Write the embeddings (texts, tokens, width) of Prompts."""
    files.write_weights(folder / prompts.file, {
        key: text[k:k + 1].float().clone() for k, key in enumerate(prompts.texts)})


def copy_components(source, target):
    """Copy what never trains, and the licence; weights in fp16 alone are renamed, so that no `variant` is needed."""
    if source == target:
        return
    for path in source.glob("LICENSE*"):
        if path.is_file():
            files.replace_file(target / path.name, functools.partial(shutil.copyfile, path))
    for name in COPIED:
        copied = set()
        for path in files.find_files(source / name, "*"):
            plain = path.name.replace(".fp16.", ".")
            if path.suffix in (".json", ".txt", ".safetensors") and (
                    plain == path.name or not (source / name / plain).is_file()):
                (target / name).mkdir(parents=True, exist_ok=True)
                files.replace_file(target / name / plain, functools.partial(shutil.copyfile, path))
                copied.add(plain)
        for old in set(checkpoint.set_files(target / name, "model")) - copied:  # of what was saved here before
            (target / name / old).unlink(missing_ok=True)
