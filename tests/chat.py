"""Tiny random judges in the true layouts: the original InternVL chat format, native InternVL3.5 and Qwen-VL."""
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from relations import MODALITIES

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>",
           "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<think>", "</think>"]


def byte_pairs():
    """A byte-level BPE tokenizer, as Qwen2's, trained on the official questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for m in MODALITIES.values() for text in (m.question, *m.answers)] + ["system user assistant\n"]
    tokenizer.train_from_iterator(
        texts * 3, trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                       show_progress=False))
    return tokenizer


def write_tokenizer(folder, slow=False):
    """tokenizer.json, or (slow) InternVL2.5's vocab.json, merges.txt, added_tokens.json; returns how many tokens."""
    tokenizer = byte_pairs()
    state = json.loads(tokenizer.to_str())["model"]
    n = len(state["vocab"])
    if not slow:
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
        tokenizer.save(str(folder / "tokenizer.json"))
        return n + len(SPECIAL)
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in state["merges"]))
    added = {t: n + i for i, t in enumerate(SPECIAL)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    entry = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    decoder = {str(i): entry | {"content": t} for t, i in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=decoder,
        additional_special_tokens=SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        auto_map={"AutoTokenizer": ["tokenization_remote.Remote", None]})))
    return n + len(SPECIAL)


def move_tokens(folder, *lost):
    """Leave the special tokens in tokenizer_config.json alone; those in `lost` nowhere."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    added = state.pop("added_tokens")
    path.write_text(json.dumps(state | dict(added_tokens=[])))
    decoder = {str(t.pop("id")): t for t in added if t["content"] not in lost}
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(added_tokens_decoder=decoder)))


def write_twins(folder):
    """The "._NAME" that macOS writes beside every file on a disk of another system."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(bytes.fromhex("00051607000200004d6163204f532058") + bytes(66))


def network(vocab, size=56, seed=0):
    """A native InternVL of a few thousand weights whose parameters are all random: none is at its initial value."""
    vision = InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, attention_bias=True, intermediate_size=48,
        image_size=[size] * 2, patch_size=[14] * 2, layer_scale_init_value=0.1)
    text = Qwen2Config(
        vocab_size=vocab, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e6))
    config = InternVLConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), downsample_ratio=0.5,
        image_seq_length=(size // 28) ** 2, image_token_id=vocab - len(SPECIAL) + SPECIAL.index("<IMG_CONTEXT>"),
        tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name and name.endswith("weight")))
    return model


def original_state(model):
    """Tensors of a native model under the original chat names: written by hand, layer by layer, not by our table."""
    s, out = model.state_dict(), {}
    take = lambda new, old: out.__setitem__(new, s[old].clone())                # noqa: E731
    take("language_model.lm_head.weight", "lm_head.weight")
    for key in s:
        if key.startswith("model.language_model."):
            take("language_model.model." + key[21:], key)
    for i, name in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
        for w in ("weight", "bias"):
            take(f"mlp1.{i}.{w}", f"model.multi_modal_projector.{name}.{w}")
    eye = "model.vision_tower.embeddings."
    take("vision_model.embeddings.class_embedding", eye + "cls_token")
    take("vision_model.embeddings.position_embedding", eye + "position_embeddings")
    for w in ("weight", "bias"):
        take(f"vision_model.embeddings.patch_embedding.{w}", f"{eye}patch_embeddings.projection.{w}")
    for n in range(model.config.vision_config.num_hidden_layers):
        a, b = f"vision_model.encoder.layers.{n}.", f"model.vision_tower.encoder.layer.{n}."
        take(a + "ls1", b + "lambda_1")
        take(a + "ls2", b + "lambda_2")
        for w in ("weight", "bias"):
            take(f"{a}norm1.{w}", f"{b}layernorm_before.{w}")
            take(f"{a}norm2.{w}", f"{b}layernorm_after.{w}")
            take(f"{a}mlp.fc1.{w}", f"{b}mlp.fc1.{w}")
            take(f"{a}mlp.fc2.{w}", f"{b}mlp.fc2.{w}")
            take(f"{a}attn.proj.{w}", f"{b}attention.projection_layer.{w}")
            out[f"{a}attn.qkv.{w}"] = torch.cat([s[f"{b}attention.{k}_proj.{w}"] for k in "qkv"])
    return out


def unmerged(state, r=4, seed=1):
    """The same weights with every linear layer of the language model split into a base and a LoRA of scale 2."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for key, value in state.items():
        name = key.replace("language_model.", "language_model.base_model.model.", 1) if key.startswith(
            "language_model.") else key
        if name != key and ("_proj." in key) and value.ndim == 2:
            A = torch.randn(r, value.shape[1], generator=rng) * 0.1
            B = torch.randn(value.shape[0], r, generator=rng) * 0.1
            stem = name.removesuffix(".weight")
            out |= {f"{stem}.base_layer.weight": value - 2 * B @ A, f"{stem}.lora_A.default.weight": A,
                    f"{stem}.lora_B.default.weight": B}
        elif name != key and "_proj.bias" in key:
            out[name.replace("_proj.bias", "_proj.base_layer.bias")] = value
        else:
            out[name] = value
    return out


def original_config(model, **changes):
    """config.json of the original chat format."""
    eye, llm = model.config.vision_config, model.config.text_config
    return dict(
        architectures=["InternVLChatModel"], auto_map={"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        model_type="internvl_chat", downsample_ratio=0.5, dynamic_image_size=True, force_image_size=eye.image_size[0],
        ps_version="v2", select_layer=-1, template="internvl2_5", use_backbone_lora=0, use_llm_lora=0,
        vision_config=dict(
            architectures=["InternVisionModel"], attention_dropout=0.0, dropout=0.0, drop_path_rate=0.0,
            hidden_act="gelu", hidden_size=eye.hidden_size, image_size=eye.image_size[0], initializer_factor=0.1,
            initializer_range=1e-10, intermediate_size=eye.intermediate_size, layer_norm_eps=1e-6,
            model_type="intern_vit_6b", norm_type="layer_norm", num_attention_heads=eye.num_attention_heads,
            num_hidden_layers=eye.num_hidden_layers, patch_size=14, qk_normalization=False, qkv_bias=True),
        llm_config=dict(
            architectures=["Qwen2ForCausalLM"], hidden_act="silu", hidden_size=llm.hidden_size,
            intermediate_size=llm.intermediate_size, max_position_embeddings=32768, model_type="qwen2",
            num_attention_heads=llm.num_attention_heads, num_hidden_layers=llm.num_hidden_layers,
            num_key_value_heads=llm.num_key_value_heads, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1e6,
            use_sliding_window=False, vocab_size=llm.vocab_size)) | changes


def write_original(folder, size=56, lora=False, shards=1, state=None, seed=0, **changes):
    """Write a folder as OpenGVLab's; returns the native network with the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model = network(write_tokenizer(folder, slow=True), size, seed)
    state = state or original_state(model)
    state = unmerged(state) if lora else state
    (folder / "config.json").write_text(json.dumps(original_config(model, **changes)))
    keys = sorted(state)
    if shards == 1:
        save_file({k: state[k].contiguous() for k in keys}, folder / "model.safetensors", metadata=dict(format="pt"))
        return model
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        save_file({k: state[k].contiguous() for k in keys[i::shards]}, folder / name, metadata=dict(format="pt"))
    place = {k: names[i % shards] for i, k in enumerate(keys)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=place)))
    return model


def need(kind):
    """Skip a test when the installed transformers has no such network."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")


def write_qwen(folder, kind):
    """A native Qwen2.5-VL, Qwen3-VL or Qwen3.5 folder; returns the network."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    ids = {name: vocab - len(SPECIAL) + SPECIAL.index(token) for name, token in
           (("image_token_id", "<|image_pad|>"), ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"))}
    text = dict(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False)
    axes = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2], mrope_interleaved=True)
    eye = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)
    if kind == "qwen2_5_vl":
        name = "Qwen2_5_VL"
        text |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]))
        eye |= dict(fullatt_block_indexes=[1], window_size=56)
    elif kind == "qwen3_vl":
        name = "Qwen3VL"
        text |= dict(head_dim=16, rope_parameters=axes)
        eye |= dict(depth=3, patch_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    else:                                                                       # three layers are recurrent
        name = "Qwen3_5"
        text |= dict(num_hidden_layers=4, head_dim=32, linear_key_head_dim=8, linear_value_head_dim=8,
                     linear_num_key_heads=2, linear_num_value_heads=4,
                     rope_parameters=axes | dict(mrope_section=[2, 1, 1], partial_rotary_factor=0.25))
        eye |= dict(patch_size=16, num_position_embeddings=16)
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=eye, video_token_id=0,
                                                    tie_word_embeddings=False, **ids)
    model = randomise(getattr(transformers, f"{name}ForConditionalGeneration"), config)
    model.save_pretrained(folder)
    return model


def randomise(kind, config):
    """A network of a class of transformers whose weights are all random, at the size at which answers differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name and name.endswith("weight")))
    return model


def write_internvl3(folder):
    """A native InternVL3.5 folder: its language model is Qwen3, whose heads are wider than width / heads."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    vision = InternVLVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, attention_bias=True,
                                  intermediate_size=48, image_size=[56] * 2, patch_size=[14] * 2)
    text = Qwen3Config(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1, head_dim=24, tie_word_embeddings=False)
    config = InternVLConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_seq_length=4,
                            image_token_id=vocab - len(SPECIAL) + SPECIAL.index("<IMG_CONTEXT>"),
                            tie_word_embeddings=False)
    model = randomise(InternVLForConditionalGeneration, config)
    model.save_pretrained(folder)
    return model


def fast(folder):
    """The tokenizer of a folder with tokenizer.json."""
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
