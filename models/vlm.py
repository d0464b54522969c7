"""Opens a judge's weights as transformers' native network: no remote code, no pickle, no prompt on stdin.

folders   original InternVL chat (config.json has llm_config; merged, or with unmerged LoRA keys), native InternVL,
          Qwen2.5-VL, Qwen3-VL, Qwen3.5; files as in checkpoint.py; a hub id is downloaded first
traps     the original does not tie embedding and head, the native default does; a position table has 1025 rows at
          448 px, 1297 at 512 px; VLM processors need torchvision, so families.py prepares the pixels, one square tile
Source: OpenGVLab/InternVL2_5-4B's config.json and tensor names; transformers' InternVL classes.
"""
import hashlib
import re
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)

from models import checkpoint, lora
from models.families import FAMILIES, NO_JUDGES
from models.tokenizer import TOKENIZER_FILES, load_tokenizer
from runtime.files import DamageGuard, Tensors, read_json, refuse
from runtime.weights import bounded_integer, hub_folder, load_strict, plain_config

TILE = 1 << 12                        # px, largest side of a tile
PATTERNS = ["*.safetensors", "*.json", "merges.txt"]
STEM = "model"                        # of the names of weight files

RENAMES = [  # original InternVL chat name -> native name in memory
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model.language_model."),
    (r"mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding$", "model.vision_tower.embeddings.position_embeddings"),
    (r"vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    (r"vision_model\.encoder\.layers\.(\d+)\.", r"model.vision_tower.encoder.layer.\1."),
]
VISION_RENAMES = {"ls1": "lambda_1", "ls2": "lambda_2", "norm1": "layernorm_before", "norm2": "layernorm_after",
                  "attn.proj": "attention.projection_layer", "attn.q_norm": "attention.q_norm",
                  "attn.k_norm": "attention.k_norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
DISK_RENAMES = [  # names on the disk of a native InternVL folder -> in memory
    (r"language_model\.lm_head\.", "lm_head."), (r"language_model\.model\.", "model.language_model."),
    (r"(?=vision_tower\.|multi_modal_projector\.)", "model."),
]
OLDER_PATHS = [  # of linear layers in adapters: as OpenGVLab's InternVL and transformers before 4.52 named them
    *DISK_RENAMES, *RENAMES, (r"visual\.", "model.visual."), (r"model\.(?=layers\.)", "model.language_model."),
]
POSITIONS = "model.vision_tower.embeddings.position_embeddings"
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


def _rename(key, rules):
    for pattern, name in rules:
        new, hits = re.subn("^(?:" + pattern + ")", name, key)
        if hits:
            return new
    return None


def native_name(key):
    """In-memory name of a tensor of a native InternVL folder, whichever transformers version wrote it."""
    return _rename(key, DISK_RENAMES) or key


def native_path(path):
    """Path in the network of a linear layer that an adapter names as older code did; any other path as it is."""
    path = _rename(f"{path}.", OLDER_PATHS) or f"{path}."
    layer = re.fullmatch(r"(model\.vision_tower\.encoder\.layer\.\d+\.)(.+)\.", path)
    return layer[1] + VISION_RENAMES.get(layer[2], layer[2]) if layer else path[:-1]


def merge_lora(state, scale):
    """Fold unmerged LoRA keys of an original checkpoint: W + scale B A in fp32, under the plain names.

    raises  ValueError naming an adapter without its base, or half an adapter
    """
    plain = {}
    low = {}
    for key, value in state.items():
        name = re.sub(r"^(language_model|vision_model)\.base_model\.model\.", r"\1.", key)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.(?:default\.)?weight", name)
        if found:
            low.setdefault(found[1], {})[found[2]] = value
        else:
            plain[name.replace(".base_layer.", ".")] = value
    for path, pair in low.items():
        weight = f"{path}.weight"
        if set(pair) != {"A", "B"} or weight not in plain:
            raise ValueError(f"vlm.py: got adapter {path!r} with lora_{', lora_'.join(sorted(pair))} and "
                             f"{'its' if weight in plain else 'no'} base weight; want lora_A, lora_B and base_layer; "
                             "fetch the checkpoint again")
        plain[weight] = lora.merge_low_rank(plain[weight], pair["A"], pair["B"], scale)
    return plain


def convert_internvl(state_dict, lora_scale=2.0):
    """Original InternVL chat names -> transformers' native names (as in the model's state_dict).

    state_dict  merged, or with unmerged LoRA keys (language_model.base_model.model.*)
    lora_scale  alpha / r of these (judge release: 32 / 16)
    raises      ValueError naming a key that has no native counterpart
    """
    out = {}
    for key, value in merge_lora(state_dict, lora_scale).items():
        name = _rename(key, RENAMES)
        if name is None:
            raise ValueError(f"vlm.py: got tensor {key!r}; want names of an InternVL chat checkpoint with a "
                             "Qwen2 language model; use another checkpoint")
        layer = re.fullmatch(r"(model\.vision_tower\.encoder\.layer\.\d+\.)(.+?)(\.weight|\.bias)?", name)
        if layer is None:
            out[name] = value
        elif layer[2] == "attn.qkv":                                            # q, k, v are rows of one matrix
            for k, part in zip("qkv", value.chunk(3, 0), strict=True):
                out[f"{layer[1]}attention.{k}_proj{layer[3]}"] = part.contiguous()
        elif layer[2] in VISION_RENAMES:
            out[layer[1] + VISION_RENAMES[layer[2]] + (layer[3] or "")] = value
        else:
            raise ValueError(f"vlm.py: got tensor {key!r}; want attn, mlp, norm1, norm2, ls1, ls2 in a vision "
                             "layer; use another checkpoint")
    return out


def resize_positions(table, side):
    """Position table (1, 1 + n^2, D) -> (1, 1 + side^2, D): bicubic in fp32, the class token kept."""
    n = round((table.shape[1] - 1) ** 0.5)
    if n == side:
        return table
    grid = table[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)        # (1, D, n, n)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)), 1)


def native_config(old, where="config.json"):
    """InternVLConfig of an original chat config.json (a dict).

    raises  ValueError: pixel shuffle other than v2, a language model other than Qwen2, another feature layer
    """
    absent = [k for k in ("llm_config", "vision_config") if not isinstance(old.get(k), dict)]
    absent += [f"vision_config.{k}" for k in ("image_size", "patch_size") if k not in old.get("vision_config", ())]
    if absent:
        raise ValueError(f"vlm.py: {where}: got no {absent[0]}; want the config.json of an InternVL chat model")
    llm = old["llm_config"]
    eye = old["vision_config"]
    kind = (llm.get("architectures") or ["Qwen2ForCausalLM" if llm.get("model_type") == "qwen2" else "?"])[0]
    checks = [("ps_version", old.get("ps_version"), "v2"), ("select_layer", old.get("select_layer", -1), -1),
              ("llm_config.architectures", kind, "Qwen2ForCausalLM")]
    for name, got, want in checks:
        if got != want:
            raise ValueError(f"vlm.py: {where}: got {name} {got!r}, want {want!r}; "
                             "use an InternVL2.5 chat checkpoint with a Qwen2 language model (1B or 4B), or InternVL3 "
                             "or 3.5 in transformers' layout (-HF)")
    scaling = dict(llm.get("rope_scaling") or {})
    kind = scaling.pop("type", scaling.pop("rope_type", "default"))
    rope = scaling | dict(rope_theta=llm.get("rope_theta", 1e6), rope_type=kind)
    text = Qwen2Config(rope_parameters=rope, tie_word_embeddings=False, **_pick(
        llm, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range",
        "attention_dropout", "use_sliding_window", "sliding_window", "max_window_layers", "bos_token_id",
        "eos_token_id"))
    size = old.get("force_image_size") or eye["image_size"]
    vision = InternVLVisionConfig(
        image_size=[size] * 2, patch_size=[eye["patch_size"]] * 2, attention_bias=eye.get("qkv_bias", True),
        use_qk_norm=eye.get("qk_normalization", False), layer_scale_init_value=eye.get("initializer_factor", 0.1),
        use_mean_pooling=True, hidden_dropout_prob=eye.get("dropout", 0.0), **_pick(
            eye, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "layer_norm_eps", "norm_type", "attention_dropout", "initializer_range"))
    return InternVLConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), downsample_ratio=old.get("downsample_ratio", 0.5),
        image_seq_length=0, image_token_id=0, vision_feature_layer=-1, tie_word_embeddings=False)


def _pick(source, *names):
    return {k: source[k] for k in names if k in source}


def read_config(folder):
    """config.json of a folder as a dict. raises FileNotFoundError, ValueError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"vlm.py: got no config.json in {folder}; want a judge folder written by "
                                "`python train.py --stage judge`, an InternVL chat folder or a native one")
    return plain_config(read_json(path), path)


def family_of(folder, config):
    """The row of FAMILIES for a folder's config.json (a dict). raises ValueError for another kind of model."""
    kind = config.get("model_type")
    kind = "internvl" if kind == "internvl_chat" and "llm_config" in config else kind
    if kind in NO_JUDGES:
        raise ValueError(f"vlm.py: got model_type {kind!r} in {folder}, which cannot be asked here: {NO_JUDGES[kind]}; "
                         f"want {', '.join(map(repr, FAMILIES))} or 'internvl_chat'")
    if kind not in FAMILIES:
        raise ValueError(f"vlm.py: got model_type {config.get('model_type')!r} in {folder}; want "
                         f"{', '.join(map(repr, FAMILIES))} or 'internvl_chat'; a judge needs images: add a row to "
                         "families.FAMILIES for another vision-language model")
    return FAMILIES[kind]


def network_config(folder, config):
    """The network's configuration object, native, from a folder's config.json (a dict)."""
    if "llm_config" in config:
        made = native_config(config, Path(folder, "config.json"))
        set_tile(made)
        return made
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def set_tile(config, size=0):
    """Give an InternVL config a tile of `size` px (0: the one it has); returns the number of patches along a side."""
    vision = config.vision_config
    ratio = config.downsample_ratio
    size = size or vision.image_size[0]
    side = size // vision.patch_size[0]                                         # 512 px: 36 patches of 14, 8 px unused
    bounded_integer(size, 1, TILE, "tile size", "vlm.py")
    if not side or not 0 < ratio <= 1 or (side * ratio) % 1:
        raise ValueError(f"vlm.py: got tile size {size}, {side} patches a side; want a multiple of "
                         f"{int(1 / ratio)} patches of {vision.patch_size[0]} px, such as 448 or 512 px")
    vision.image_size = [size] * 2
    config.image_seq_length = int(side * ratio) ** 2
    return side


def _open_internvl(folder, config, tokenizer, size):
    """Network of an InternVL folder in either layout, weights as stored."""
    state = checkpoint.read_weights(folder, STEM)
    tied = config.get("llm_config", {}).get("tie_word_embeddings", False)
    if "llm_config" in config:
        ranks = {len(v) for k, v in state.items() if k.endswith("lora_A.default.weight")}
        if len(ranks) > 1:
            raise ValueError(f"vlm.py: got LoRA ranks {sorted(ranks)} in {folder}; want one; merge it first")
        state = convert_internvl(state)                                         # InternVL's own LoRA has alpha = 2 r
    else:
        state = {native_name(k): v for k, v in state.items()}
    config = network_config(folder, config)
    tied = tied or config.tie_word_embeddings or config.text_config.tie_word_embeddings
    if tied and HEAD not in state and EMBEDDING in state:
        state[HEAD] = state[EMBEDDING].clone()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    side = set_tile(config, size)
    config.image_token_id = tokenizer.convert_tokens_to_ids(FAMILIES["internvl"].image)
    if POSITIONS in state and state[POSITIONS].ndim == 3:
        state[POSITIONS] = resize_positions(state[POSITIONS], side)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    load_strict(model, state, folder, assign=True)
    text = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config=text.config)                 # no checkpoint holds its buffers
    return model


def _open_native(folder, config):
    """Network of any other native folder that transformers knows, weights as stored."""
    config = network_config(folder, config)
    network = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    state = checkpoint.read_weights(folder, STEM)
    return checkpoint.build_network(network, config, state, f"vlm.py: {folder}", "auto")


def find_folders(name):
    """Folders of a judge: (folder of the weights, adapter folder or None); a hub id is downloaded."""
    folder = hub_folder(name, PATTERNS)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise ValueError(f"vlm.py: {folder} is an adapter that names no base; open the merged folder beside it")
        return hub_folder(base, PATTERNS), folder
    if (folder / "adapter_config.json").is_file():
        checkpoint.say_once(f"{folder} holds a model and an adapter; the model alone is read")
    return folder, None


def files_of_a_judge(folder):
    """Names of files that must not stay in a folder beside a judge that is saved there: sets, adapter, tokenizer."""
    return *checkpoint.set_files(folder, STEM), *lora.FILES, *TOKENIZER_FILES


def read_about(folder, family):
    """judge.json of a folder, or what its family implies: dict system, grid (see judge.Judge), size (0: config's)."""
    extra = Path(folder) / "judge.json"
    implied = dict(system=family.system, grid=1, size=0)
    about = implied | (read_json(extra) if extra.is_file() else {})
    if not isinstance(about["system"], str):
        refuse(extra, f"system = {about['system']!r}", "a text")
    return about | {k: bounded_integer(about[k], least, TILE, k, extra) for k, least in (("grid", 1), ("size", 0))}


def refuse_damage(folder):
    """Context manager for reading a checkpoint's folder: errors that damaged files cause become one line."""
    return DamageGuard(f"vlm.py: {folder}", "a checkpoint that cannot be read", "a whole one",
                       keep=(ValueError, FileNotFoundError))


def _read_texts(folder, adapter):
    """All but the weights: config.json as a dict, its family, the tokenizer, judge.json."""
    config = read_config(folder)
    family = family_of(folder, config)
    return config, family, load_tokenizer(folder), read_about(adapter or folder, family)


def read_outline(name):
    """All of a checkpoint but its weights: (network config, tokenizer, dict of system and grid).

    raises  as open_network
    """
    folder, adapter = find_folders(name)
    with refuse_damage(folder):
        config, family, tokenizer, about = _read_texts(folder, adapter)
        made = network_config(folder, config)
        if family.internvl_files:
            set_tile(made, about["size"])
        return made, tokenizer, {k: about[k] for k in ("system", "grid")}


def open_network(name, size=0):
    """Open a checkpoint: (network, tokenizer, dict of system and grid), weights in the precision they are stored in.

    size    px of the tile, if not the checkpoint's own (InternVL only: the position table is resized)
    raises  FileNotFoundError, ValueError: one line that names the file or the key
    """
    folder, adapter = find_folders(name)
    with refuse_damage(folder):
        config, family, tokenizer, about = _read_texts(folder, adapter)
        if family.internvl_files:
            network = _open_internvl(folder, config, tokenizer, size or about["size"])
        else:
            network = _open_native(folder, config)
        if adapter:
            lora.load_adapter(network, adapter, native_path)
            lora.merge(network)
        return network.requires_grad_(True), tokenizer, {k: about[k] for k in ("system", "grid")}


@cache
def files_digest(name, start):
    """Hex SHA-256 over `start` (bytes), then name and bytes of every tensor of a checkpoint, streamed from disk."""
    folder, adapter = find_folders(name)
    h = hashlib.sha256(start)
    config = read_config(folder)
    rename = native_name if family_of(folder, config).internvl_files and "llm_config" not in config else str
    with ExitStack() as stack:                                                  # each file is opened once
        opened = [stack.enter_context(Tensors(path)) for path in checkpoint.weight_files(folder, STEM)]
        places = {rename(key): (f, key) for f in opened for key in f.keys()}  # noqa: SIM118
        for key, (f, on_disk) in sorted(places.items()):
            _hash_tensor(h, key, f.get_tensor(on_disk))
    if adapter:
        h.update(Path(adapter, "adapter_model.safetensors").read_bytes())
    return h.hexdigest()


def _hash_tensor(h, name, tensor):
    """Add one named tensor to a hash."""
    h.update(name.encode())
    h.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def network_digest(network, start):
    """As files_digest, of a network in memory."""
    h = hashlib.sha256(start)
    for name, tensor in sorted(network.state_dict().items()):
        _hash_tensor(h, name, tensor)
    return h.hexdigest()
