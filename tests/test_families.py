"""families.py: Qwen3.5 is read one question a sequence, InternVL3.5 by its own head size; real words are one token."""
import dataclasses
import gzip
import json
from pathlib import Path

import chat
import pytest
import torch

from judge import LazyJudge, load_judge
from models import families, lora
from models.families import DELTA_NET, FAMILIES, Prompt
from models.finetune import LORA_TARGETS, add_lora, sentence_loss
from models.tokenizer import load_tokenizer
from relations import MODALITIES, NAMES

VOCABULARY = Path(__file__).parents[2] / "shared" / "data" / "qwen_tokenizer" / "tokenizer.qwen3.json.gz"
ROUNDING = 2e-5                    # fp32 logits of size 1-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen3.5 folder that is opened at a small tile."""
    chat.need("qwen3_5")
    path = tmp_path_factory.mktemp("qwen3_5")
    chat.write_qwen(path, "qwen3_5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "qwen3_5", dataclasses.replace(FAMILIES["qwen3_5"], size=64))
        yield path


def images_of(size, n=2):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def own_logits(judge, images, modality):
    """Logits at the last token from transformers' own forward of the whole network."""
    ids = torch.tensor([judge.prompt.head + judge.prompt.blocks[modality]]).expand(len(images), -1)
    given = judge.family.generate_inputs(judge.model, (images - judge.mean) / judge.std, ids)
    return judge.model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, **given).logits


@torch.no_grad()
def test_a_recurrent_network_is_asked_one_question_a_sequence_exactly(folder):
    """All questions at once are the network's own forward of each; packed behind one image they would not be."""
    judge = load_judge(folder)
    images = images_of(judge.size)
    want = torch.cat([own_logits(judge, images, m) for m in NAMES], 1)
    assert torch.equal(judge.logits(images), want) and want.std() > 0.1
    answers = torch.stack([want[:, k, judge.prompt.answers[m]] for k, m in enumerate(NAMES)], 1)
    assert (judge.decide(images) - (answers[..., 0] - answers[..., 1])).abs().max() < ROUNDING
    judge.family = dataclasses.replace(judge.family, packed=True)
    assert (judge.logits(images) - want).abs().max() > 0.05


def test_qwen3_5_answers_after_an_empty_thought(folder):
    judge = load_judge(folder)
    for m in NAMES:
        said = judge.tokenizer.decode(judge.prompt.blocks[m])
        assert said.endswith(f"<|im_start|>assistant\n<think>\n\n</think>\n\n{MODALITIES[m].prefix}")
        assert judge.tokenizer.decode(judge.prompt.sentences[m][0]) == f"{MODALITIES[m].answers[0]}<|im_end|>"


def test_a_saved_qwen3_5_gives_the_same_answers(folder, tmp_path):
    judge = load_judge(folder)
    judge.save(tmp_path)
    again = load_judge(tmp_path)
    assert torch.equal(again.score(images_of(judge.size), "depth"), judge.score(images_of(judge.size), "depth"))
    assert again.digest() == LazyJudge(tmp_path).digest() and again.system == ""


def test_adapters_of_qwen3_5_reach_the_recurrent_layers_learn_and_reopen(folder, tmp_path):
    judge = load_judge(folder)
    images = images_of(judge.size)
    before = judge.score(images, "depth")
    paths = add_lora(judge, torch.Generator().manual_seed(0), 4, 8, 0.0, checkpointing=True)
    assert {p.rsplit(".", 1)[1] for p in paths} == {*LORA_TARGETS, *DELTA_NET} and len(paths) == 3 * 5 + 4 + 4 * 3
    learnt = [p for p in judge.model.parameters() if p.requires_grad]
    judge.train()
    losses = []
    for _ in range(2):
        loss, n = sentence_loss(judge, images, ["depth", "albedo"], [True, False])
        losses.append(loss.item() / n)
        grads = torch.autograd.grad(loss, learnt)
        with torch.no_grad():
            for p, g in zip(learnt, grads, strict=True):
                p -= 0.02 * g
    assert losses[1] < losses[0] and all(layer.lora_B.abs().sum() > 0 for layer in lora.adapters(judge.model).values())
    lora.save_adapter(judge.model, tmp_path, base=str(folder), task="CAUSAL_LM")
    got = load_judge(tmp_path).score(images, "depth")
    assert (got - judge.eval().score(images, "depth")).abs().max() < ROUNDING and (got - before).abs().max() > 1e-3


def test_tensors_for_guessing_ahead_are_passed_over(folder, tmp_path):
    """Published Qwen3.5 files hold a head that predicts further tokens; transformers knows no such weights."""
    from safetensors.torch import load_file, save_file
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"mtp.fc.weight": torch.ones(4, 8)}, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    images = images_of(64)
    assert torch.equal(load_judge(tmp_path).score(images, "normal"), load_judge(folder).score(images, "normal"))


@torch.no_grad()
def test_internvl3_5_has_the_head_size_of_its_config_with_and_without_a_system_text(tmp_path):
    chat.write_internvl3(tmp_path)
    for system in (None, ""):
        if system is not None:
            (tmp_path / "judge.json").write_text(json.dumps(dict(system=system)))
        judge = load_judge(tmp_path)
        assert judge.model.model.language_model.layers[0].self_attn.head_dim == 24 != 32 // 2
        assert bool(judge.system) == (system is None)
        images = images_of(judge.size)
        for k, m in enumerate(NAMES):
            want = own_logits(judge, images, m)
            assert torch.equal(judge.logits(images, (m,)), want)
            assert (judge.logits(images)[:, [k]] - want).abs().max() < 5 * ROUNDING


def test_a_tied_internvl3_5_opens(tmp_path):
    from safetensors.torch import load_file, save_file
    chat.write_internvl3(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.endswith("lm_head.weight")}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_judge(tmp_path).model
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", families.NO_JUDGES)
def test_a_family_that_cannot_be_asked_is_refused_by_name(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=kind, text_config={}, vision_config={})))
    for opener in (load_judge, LazyJudge):
        with pytest.raises(ValueError, match=f"got model_type '{kind}'.*cannot be asked here: its .*want '") as error:
            opener(tmp_path)
        assert "\n" not in str(error.value) and "'qwen3_5'" in str(error.value)


# the vocabulary of the published models --------------------------------------------------------------------------

def test_official_sentences_are_whole_words_in_the_real_vocabulary(tmp_path):
    """In Qwen3's own tokenizer, for every Qwen row: read once, since that takes a second."""
    if not VOCABULARY.is_file():
        pytest.skip("no tokenizer of Qwen3 beside the checkout")
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(VOCABULARY.read_bytes()))
    tokenizer = load_tokenizer(tmp_path)
    for row in (row for kind, row in FAMILIES.items() if kind.startswith("qwen")):
        prompt = Prompt(tokenizer, row.system, row, 4)
        assert prompt.head[-6:] == [151652, *[151655] * 4, 151653]              # <|vision_start|> image <|vision_end|>
        thought = [151667, 271, 151668, 271] if row.answer else []              # <think> \n\n </think> \n\n
        for name, m in MODALITIES.items():
            assert prompt.answers[name] == ([9454, 2753] if m.yes_no else [2518, 6176])     # Yes, No; " red", " green"
            assert prompt.asked[name][-len(thought) - 5:] == [151645, 198, 151644, 77091, 198, *thought]
            said = tokenizer.decode(prompt.blocks[name])
            assert said.endswith(f"{m.question}<|im_end|>\n<|im_start|>assistant\n{row.answer}{m.prefix}")
            shared = len(prompt.blocks[name]) - len(prompt.asked[name])
            for sentence, answer, word in zip(prompt.sentences[name], m.answers, prompt.answers[name], strict=True):
                assert tokenizer.decode(sentence) == f"{answer}<|im_end|>" and sentence[shared] == word
                assert len(sentence) == len(answer.split()) + answer.count(",") + 2         # words, commas, ".", end
