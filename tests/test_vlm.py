"""vlm.py: tiny judges in the true layouts load to the same logits; every trap and every refusal."""
import dataclasses
import json
import math

import chat
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import judge as judging
from bench import arithmetic
from judge import load_judge
from models import families, lora, vlm
from models.families import SYSTEM, read_answer
from models.finetune import LORA_TARGETS, add_lora, sentence_loss
from models.vlm import convert_internvl
from relations import MODALITIES

NAMES = list(MODALITIES)
ROUNDING = 2e-5                    # fp32 logits of size 1-5 over sequences of another length or padding


def images_of(size, n=3, seed=5):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(folder in the original format, native network with the same weights)."""
    folder = tmp_path_factory.mktemp("chat") / "judge"
    return folder, chat.write_original(folder)


def reference(model, judge, images, modality, tail=""):
    """Logits at the last token from transformers' own forward on the prompt written out as text."""
    n = model.config.image_seq_length
    m = MODALITIES[modality]
    text = (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>{'<IMG_CONTEXT>' * n}</img>\n{m.question}"
            f"<|im_end|>\n<|im_start|>assistant\n{m.prefix}{tail}")
    ids = judge.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.expand(len(images), -1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=(images - mean) / std, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("layout", [{}, dict(lora=True), dict(shards=3), dict(lora=True, shards=2)])
def test_the_original_layout_gives_the_logits_of_the_native_network(tmp_path, layout):
    """Every tensor is random, lm_head differs from the embedding: tying, swapped q and k, lost LoRA would show."""
    model = chat.write_original(tmp_path, **layout)
    judge, images = load_judge(tmp_path), images_of(56)
    for m in NAMES:
        want = reference(model, judge, images, m)[:, -1]
        got = judge.logits(images, (m,))[:, 0]
        assert want.std() > 0.1 and (got - want).abs().max() < 5 * ROUNDING, m


def test_key_map_is_complete_both_ways(original):
    folder, model = original
    got = convert_internvl(load_file(folder / "model.safetensors"))
    want = model.state_dict()
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)


def test_what_was_opened_stays_untied_when_transformers_opens_what_was_saved(original, tmp_path):
    folder, model = original
    judge = load_judge(folder)
    assert not judge.model.config.tie_word_embeddings and not judge.model.config.text_config.tie_word_embeddings
    judge.save(tmp_path)
    again = chat.InternVLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_unmerged_lora_is_folded_with_the_scale_given(original):
    folder, model = original
    state = chat.unmerged(chat.original_state(model))
    merged = convert_internvl(state)
    q = "model.language_model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[q], model.state_dict()[q], rtol=0, atol=1e-6)
    other = convert_internvl(state, lora_scale=1.0)[q]
    assert (other - merged[q]).abs().max() > 1e-2


def test_the_prompt_is_the_official_one_word_for_word(original):
    judge = load_judge(original[0])
    text = judge.tokenizer.decode(judge.prompt.head)
    assert text == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 4}</img>\n"
    assert SYSTEM.startswith("你是书生·万象，英文名是InternVL，") and len(SYSTEM) == 58
    for m in NAMES:
        row = MODALITIES[m]
        want = f"{row.question}<|im_end|>\n<|im_start|>assistant\n{row.prefix}"
        assert judge.tokenizer.decode(judge.prompt.blocks[m]) == want


def test_no_question_on_stdin_and_no_torchvision(original, monkeypatch):
    import builtins
    import sys
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on stdin"))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    config = json.loads((original[0] / "tokenizer_config.json").read_text())
    assert "auto_map" in config and "auto_map" in json.loads((original[0] / "config.json").read_text())
    load_judge(original[0])


def test_positions_of_448_px_become_512_px_by_bicubic_interpolation():
    table = torch.randn(1, 1025, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    got = vlm.resize_positions(table, 36)
    assert got.shape == (1, 1297, 8) and got.dtype == torch.bfloat16 and torch.equal(got[:, 0], table[:, 0])
    grid = table[0, 1:].float().view(32, 32, 8).permute(2, 0, 1)[None]
    want = F.interpolate(grid, (36, 36), mode="bicubic")[0].permute(1, 2, 0).reshape(1296, 8).to(torch.bfloat16)
    assert torch.equal(got[0, 1:], want) and torch.equal(vlm.resize_positions(table, 32), table)


def test_a_base_of_another_tile_size_is_opened_at_the_size_asked_for(tmp_path, original):
    """56 px: 4 x 4 patches, 4 image tokens; 84 px: 6 x 6 patches, 9 image tokens."""
    folder, model = original
    judge = load_judge(folder, size=84)
    assert (judge.size, judge.prompt.head.count(judge.model.config.image_token_id)) == (84, 9)
    big = chat.network(model.config.text_config.vocab_size, 84)
    state = model.state_dict()
    state[vlm.POSITIONS] = vlm.resize_positions(state[vlm.POSITIONS], 6)
    big.load_state_dict(state)
    images = images_of(84)
    want = reference(big, judge, images, "normal")[:, -1]
    assert (judge.logits(images, ("normal",))[:, 0] - want).abs().max() < 5 * ROUNDING
    forced = tmp_path / "forced"                                                # config says 84, the table is of 56
    chat.write_original(forced, state=chat.original_state(model), force_image_size=84)
    assert load_judge(forced).size == 84
    with pytest.raises(ValueError, match="got tile size 44, 3 patches a side; want a multiple of 2 patches of 14 px"):
        load_judge(folder, size=44)


def test_a_native_folder_loads_under_the_names_of_any_transformers_version(original, tmp_path):
    folder, model = original
    model.save_pretrained(tmp_path / "disk")                                    # language_model.model..., as on the hub
    chat.write_tokenizer(tmp_path / "disk")
    memory = tmp_path / "memory"
    memory.mkdir()
    chat.write_tokenizer(memory)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, memory / "model.safetensors")
    (memory / "config.json").write_text((tmp_path / "disk" / "config.json").read_text())
    images, want = images_of(56), load_judge(folder)
    for path in (tmp_path / "disk", memory):
        judge = load_judge(path)
        assert judge.system == SYSTEM                                           # the converted template has none
        assert torch.equal(judge.score(images, "depth"), want.score(images, "depth"))


def test_a_tied_native_folder_gets_its_head_from_the_embedding(original, tmp_path):
    """InternVL3.5-1B ties; its file holds no lm_head."""
    _, model = original
    model.save_pretrained(tmp_path)
    chat.write_tokenizer(tmp_path)
    state = {vlm.native_name(k): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"first: lm_head.weight"):
        load_judge(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    judge = load_judge(tmp_path)
    assert torch.equal(judge.model.lm_head.weight, judge.model.get_input_embeddings().weight)


def test_the_shapes_of_the_released_judge():
    """877 native tensors and 3,712,916,480 weights at 512 px; the official LoRA has 29,933,568."""
    made = vlm.native_config(arithmetic.JUDGE)
    assert vlm.set_tile(made) == 36 and made.image_seq_length == 324
    with torch.device("meta"):
        model = chat.InternVLForConditionalGeneration(made)
    assert len(model.state_dict()) == 877 and sum(p.numel() for p in model.parameters()) == 3_712_916_480
    names = LORA_TARGETS
    adapted = [m for path, m in model.model.language_model.named_modules() if path.split(".")[-1] in names]
    assert len(names) == 7 and len(adapted) == 7 * 36
    assert sum(16 * (m.in_features + m.out_features) for m in adapted) == 29_933_568


# refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    (dict(ps_version="v1"), "got ps_version 'v1', want 'v2'"), (dict(select_layer=-2), "got select_layer -2, want -1"),
    (dict(llm_config=dict(architectures=["InternLM2ForCausalLM"])), "got llm_config.architectures 'InternLM2For"),
    (dict(vision_config=dict(patch_size=14)), "got no vision_config.image_size"),
    (dict(model_type="qwen2", llm_config=None), "got model_type 'qwen2'"),
    (dict(model_type="llava", llm_config=None), "add a row to families.FAMILIES")])
def test_a_config_that_is_no_such_judge_is_named(tmp_path, change, words):
    chat.write_original(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as error:
        load_judge(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_and_a_surplus_key_name_themselves(original, tmp_path):
    _, model = original
    state = chat.original_state(model)
    del state["vision_model.encoder.layers.1.ls2"]
    chat.write_original(tmp_path / "a", state=state)
    with pytest.raises(ValueError, match=r"model\.vision_tower\.encoder\.layer\.1\.lambda_2"):
        load_judge(tmp_path / "a")
    for key in ("vision_model.encoder.layers.0.attn.gate", "mlp1.2.weight", "language_model.output.weight"):
        with pytest.raises(ValueError, match=key):
            convert_internvl(chat.original_state(model) | {key: torch.zeros(3)})
    chat.write_original(tmp_path / "b", state=chat.original_state(model) | {
        "language_model.model.layers.0.mlp.extra.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"language_model\.layers\.0\.mlp\.extra"):
        load_judge(tmp_path / "b")


def test_half_an_adapter_is_named(original):
    state = chat.unmerged(chat.original_state(original[1]))
    key = next(k for k in state if "lora_A" in k)
    with pytest.raises(ValueError, match="lora_B and its base"):
        convert_internvl({k: v for k, v in state.items() if k != key})
    base = next(k for k in state if "base_layer.weight" in k)
    with pytest.raises(ValueError, match="no base weight"):
        convert_internvl({k: v for k, v in state.items() if k != base})


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "config.json", "model-00002-of-00002.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    chat.write_original(tmp_path, shards=2)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_judge(tmp_path)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path):
    chat.write_original(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002", "../model-00002"))
    with pytest.raises(FileNotFoundError, match=r"\.\./model-00002"):
        load_judge(tmp_path)


def test_a_name_that_is_no_folder_and_no_hub_id_is_refused():
    with pytest.raises(FileNotFoundError, match="got './nothing here'; want a folder that exists"):
        load_judge("./nothing here")


# scores -----------------------------------------------------------------------------------------------------------

FOLDERS = ["internvl", "internvl3_5", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


@pytest.fixture(scope="module", params=FOLDERS)
def judge(request, original, tmp_path_factory):
    """A judge of each family, Qwen's at a small tile."""
    if request.param == "internvl":
        yield load_judge(original[0])
        return
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "internvl3_5":
        chat.write_internvl3(folder)
        yield load_judge(folder)
        return
    chat.need(request.param)
    chat.write_qwen(folder, request.param)
    with pytest.MonkeyPatch.context() as patch:
        row = families.FAMILIES[request.param]
        patch.setitem(families.FAMILIES, request.param, dataclasses.replace(row, size=128))
        yield load_judge(folder)


def test_four_packed_questions_equal_four_padded_prefills_and_single_ones(judge):
    """Questions of different lengths: left padding, and a 4-D mask with restarted positions, change nothing."""
    images = images_of(judge.size, 2)
    with torch.no_grad():
        packed = judge.hidden(images)                                           # (2, 4, D)
        rows = [(i, m) for i in range(2) for m in NAMES]
        padded = judge.prefill(images[[i for i, _ in rows]], [m for _, m in rows]).view_as(packed)
        single = torch.stack([torch.cat([judge.prefill(images[i:i + 1], [m]) for m in NAMES]) for i in range(2)])
    assert len({len(judge.prompt.blocks[m]) for m in NAMES}) > 1 and packed.std() > 0.1
    assert (packed - padded).abs().max() < 5 * ROUNDING and (padded - single).abs().max() < 5 * ROUNDING


def test_logits_are_those_of_the_family_s_own_forward(judge):
    images = images_of(judge.size, 2)
    pixels = (images - judge.mean) / judge.std
    for m in NAMES:
        ids = torch.tensor([judge.prompt.head + judge.prompt.blocks[m]]).expand(2, -1)
        given = dict(pixel_values=pixels)
        if judge.model.config.model_type != "internvl":
            patches, grid = families.patchify(pixels, judge.model.config.vision_config)
            given = dict(pixel_values=patches, image_grid_thw=grid,
                         mm_token_type_ids=(ids == judge.model.config.image_token_id).int())
        with torch.no_grad():
            want = judge.model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, **given).logits
            assert (judge.logits(images, (m,)) - want).abs().max() < 5 * ROUNDING


def test_forty_pairs_cost_one_vision_pass_one_prefill_and_no_decoding(judge):
    images, calls = images_of(judge.size, 1).expand(40, -1, -1, -1), []
    eye = judge.family.vision_tower(judge.model)
    hooks = [m.register_forward_hook(lambda m, a, kw, out, n=name: calls.append((n, kw or a)), with_kwargs=True)
             for name, m in (("eye", eye), ("text", judge.model.model.language_model), ("head", judge.model.lm_head))]
    judge.score(images, "depth")
    for h in hooks:
        h.remove()
    assert [name for name, _ in calls] == ["eye", "text"]                       # of the head, only the words' rows
    assert calls[1][1]["inputs_embeds"].shape[:2] == (40, len(judge.prompt.head) + len(judge.prompt.blocks["depth"]))


def test_generated_text_begins_with_the_most_likely_word(judge):
    images = images_of(judge.size, 2)
    for m in ("albedo", "normal"):                                              # albedo: no words before the answer
        said = judge.say(images, m, tokens=1)
        asked = f"{MODALITIES[m].question}<|im_end|>\n<|im_start|>assistant\n{judge.family.answer}"
        ids = judge.tokenizer(asked, add_special_tokens=False).input_ids
        stem = judge.prompt.blocks[m]
        judge.prompt.blocks[m] = ids
        with torch.no_grad():
            best = judge.logits(images, (m,))[:, 0].argmax(-1)
        judge.prompt.blocks[m] = stem
        assert said == [judge.tokenizer.decode([i], skip_special_tokens=True).strip() for i in best]


@pytest.mark.parametrize("kind, patch", [("qwen2_5_vl", 14), ("qwen3_vl", 16)])
def test_patches_are_those_of_transformers_image_processor(kind, patch):
    processor = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    mean, std = families.FAMILIES[kind].pixels
    size = 4 * patch
    photo = (images_of(size, 1) * 255).round()
    made = processor.Qwen2VLImageProcessorPil(image_mean=mean, image_std=std, patch_size=patch, min_pixels=1)(
        photo[0].byte().permute(1, 2, 0).numpy(), return_tensors="pt", do_resize=False)
    vision = type("Vision", (), dict(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    patches, grid = families.patchify((photo / 255 - mean) / std, vision)
    torch.testing.assert_close(patches, made["pixel_values"], rtol=1e-5, atol=1e-5)
    assert torch.equal(grid, made["image_grid_thw"])


def test_every_family_answers_marked_photos(judge):
    pts = torch.tensor([[[[10, 12], [40, 44]], [[40, 44], [10, 12]]]])
    prob = judge.ask(images_of(judge.size, 1), pts)
    assert prob.shape == (1, 2, 4) and ((prob > 0) & (prob < 1)).all() and (prob[0, 0] != prob[0, 1]).any()
    assert (judge.ask(images_of(judge.size, 1), pts, batch=1) - prob).abs().max() < ROUNDING


def test_the_score_is_the_probability_of_red_and_of_yes(judge):
    images = images_of(judge.size, 2)
    for m in NAMES:
        with torch.no_grad():
            two = judge.model.lm_head(judge.prefill(images, [m, m]))[:, judge.prompt.answers[m]]
        words = [judge.tokenizer.decode([i]).strip() for i in judge.prompt.answers[m]]
        assert words == (["Yes", "No"] if m == "albedo" else ["red", "green"])
        assert (judge.score(images, m) - two.softmax(-1)[:, 0]).abs().max() < ROUNDING


def test_bf16_scores_stay_near_fp32(original):
    images = images_of(56, 4)
    full, half = load_judge(original[0]), load_judge(original[0], dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    for m in NAMES:
        assert (full.score(images, m) - half.score(images, m)).abs().max() < 0.1    # 8 bits of logits of size 3


def test_text_that_is_not_the_official_wording_is_unsure():
    assert read_answer("The red point has a surface more facing", "normal") == 1.0
    assert read_answer("The green point has", "normal") == 0.0
    assert read_answer("No, the red and green points have different base colors.", "albedo") == 0.0
    for said in ("No idea" * 0, "red", "The redder point", "the compared points", "Not the same"):
        assert read_answer(said, "albedo" if said == "Not the same" else "normal") == 0.5


def test_a_judge_that_cannot_be_scored_answers_by_text(original, monkeypatch):
    judge = load_judge(original[0], text=True)
    monkeypatch.setattr(judge, "say", lambda images, m, tokens=40: [MODALITIES[m].answers[0]] * len(images))
    assert judge.score(images_of(56), "depth").tolist() == [1.0] * 3
    assert judge.ask(images_of(56, 1), torch.tensor([[[[3, 3], [30, 30]]]])).tolist() == [[[1.0] * 4]]


# digest, lazy judges, adapters ------------------------------------------------------------------------------------

def test_a_lazy_judge_has_the_digest_of_the_opened_one_and_stays_closed(original, monkeypatch):
    monkeypatch.setattr(judging, "load_judge", lambda *_: pytest.fail("opened"))
    lazy = judging.LazyJudge(original[0])
    monkeypatch.undo()
    judge = load_judge(original[0])
    assert lazy.digest() == judge.digest() and (lazy.size, lazy.grid) == (judge.size, judge.grid)
    pts = torch.tensor([[[[10, 12], [40, 44]]]])
    assert torch.equal(lazy.ask(images_of(56, 1), pts), judge.ask(images_of(56, 1), pts))


def test_the_digest_of_a_saved_judge_is_that_of_its_tensors(original, tmp_path):
    judge = load_judge(original[0])
    judge.save(tmp_path)
    loaded = load_judge(tmp_path)
    judge.origin = ""
    assert loaded.origin and loaded.digest() == judge.digest()


def test_a_peft_folder_opens_as_its_base_with_the_adapter_merged(original, tmp_path):
    judge = load_judge(original[0])
    add_lora(judge, torch.Generator().manual_seed(0), 4, 8, 0.0)
    with torch.no_grad():
        for layer in lora.adapters(judge.model).values():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    lora.save_adapter(judge.model, tmp_path, base=str(original[0]), task="CAUSAL_LM")
    got, images = load_judge(tmp_path), images_of(56)
    assert not lora.adapters(got.model)
    assert (got.score(images, "depth") - judge.score(images, "depth")).abs().max() < ROUNDING
    assert (got.score(images, "depth") - load_judge(original[0]).score(images, "depth")).abs().max() > 1e-3
    assert got.digest() != load_judge(original[0]).digest()


def test_peft_itself_reads_the_adapter(original, tmp_path):
    peft = pytest.importorskip("peft")
    judge = load_judge(original[0])
    add_lora(judge, torch.Generator().manual_seed(0), 4, 8, 0.05)
    with torch.no_grad():
        for layer in lora.adapters(judge.model).values():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    judge.eval()
    lora.save_adapter(judge.model, tmp_path, base=str(original[0]), task="CAUSAL_LM")
    other = load_judge(original[0])
    other.model = peft.PeftModel.from_pretrained(other.model, str(tmp_path)).base_model.model.eval()
    assert (other.score(images_of(56), "normal") - judge.score(images_of(56), "normal")).abs().max() < ROUNDING


# training loss ----------------------------------------------------------------------------------------------------

def test_the_loss_is_the_cross_entropy_of_the_whole_sentence_and_its_end(original):
    folder, model = original
    judge, images = load_judge(folder), images_of(56, 2)
    for m, first in (("depth", True), ("albedo", False)):
        loss, count = sentence_loss(judge, images, [m, m], [first, first])
        row = MODALITIES[m]
        answer = judge.tokenizer(row.answers[0 if first else 1] + "<|im_end|>", add_special_tokens=False).input_ids
        tail = row.answers[0 if first else 1][len(row.prefix):] + "<|im_end|>"
        logits = reference(model, judge, images, m, tail)[:, -len(answer) - 1:-1]
        want = F.cross_entropy(logits.flatten(0, 1), torch.tensor(answer * 2), reduction="sum")
        assert count == 2 * len(answer) and math.isclose(loss.item(), want.item(), rel_tol=1e-4)


def test_a_mixed_batch_has_the_loss_of_its_rows(original):
    judge, images = load_judge(original[0]), images_of(56, 3)
    names, first = ["depth", "albedo", "irradiance"], [True, False, False]
    loss, count = sentence_loss(judge, images, names, first)
    parts = [sentence_loss(judge, images[i:i + 1], names[i:i + 1], first[i:i + 1]) for i in range(3)]
    assert count == sum(n for _, n in parts)
    assert math.isclose(loss.item(), sum(p.item() for p, _ in parts), rel_tol=1e-4)


def test_lora_trains_the_seven_linears_of_the_language_model_alone(original):
    judge = load_judge(original[0])
    paths = add_lora(judge, torch.Generator().manual_seed(0), 4, 8, 0.05)
    assert {p.rsplit(".", 1)[1] for p in paths} == set(LORA_TARGETS) and len(paths) == 14
    assert all(p.startswith("model.language_model.layers.") for p in lora.adapters(judge.model))
    loss, _ = sentence_loss(judge, images_of(56, 2), ["depth", "albedo"], [True, True])
    loss.backward()
    learning = [name for name, p in judge.model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in learning) and len(learning) == 28
    assert all(p.grad is not None for p in judge.model.parameters() if p.requires_grad)


def test_checkpointing_gives_the_same_gradient(original):
    grads = []
    for on in (False, True):
        judge = load_judge(original[0])
        add_lora(judge, torch.Generator().manual_seed(0), 4, 8, 0.0, checkpointing=on)
        judge.train()
        sentence_loss(judge, images_of(56, 2), ["depth", "albedo"], [True, True])[0].backward()
        grads.append([p.grad for p in judge.model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
