"""The judge that is trained from scratch: its sizes and tokenizer, the probe that carries it, its loss.

A judge of a million weights that is trained on answers alone stays at chance. Three more tasks on its vision tokens
(dense maps, pairs of tokens, places of the markers) teach it to see. Their heads, the probe, are not saved.
differs: the paper fine-tunes a pre-trained MLLM (finetune.py, train.tune_judge) and needs none of this.
"""
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from data.maps import center_map
from data.questions import true_relations
from kernels import send
from models.families import END, FAMILIES, TURN, UNKNOWN
from models.positions import grid_positions
from relations import LUMA, MODALITIES, NAMES, draw_markers, sample_pairs
from runtime.ranks import mean_over_ranks, on_device, own_part, world

INTERNVL = FAMILIES["internvl"]
IMG = INTERNVL.image
EMPHASIS = dict(depth=1.2, normal=2.0, albedo=0.4, irradiance=0.4)     # in the pair loss; shape is learnt slower; or 1
DENSE_EMPHASIS = dict(depth=3.0, normal=(1.0, 1.0, 3.0), albedo=0.5)   # of a map, or of each of its channels; or 1
SPECIAL = (TURN, END, INTERNVL.opening, INTERNVL.closing.rstrip(), IMG)


@dataclass
class MiniSizes:
    """Sizes of the judge that is trained from scratch."""

    size: int = 32           # px, side of the square photo
    patch: int = 4           # px, side of a vision token
    width: int = 128
    vision_layers: int = 5
    text_layers: int = 2
    heads: int = 4


def mini_tokenizer(whole_questions=True):
    """Tokenizer over the official questions (one token each, or one per word) and answers (one token per word)."""
    questions = "".join(rf"{re.escape(m.question)}|" for m in MODALITIES.values() if whole_questions)
    split = pre_tokenizers.Split(Regex(rf"{questions}\w+|[^\w\s]"), "removed", invert=True)
    texts = [text for m in MODALITIES.values() for text in (m.question, *m.answers)]
    tokens = sorted({w for text in [*texts, "system user assistant"] for w, _ in split.pre_tokenize_str(text)})
    vocab = {w: i for i, w in enumerate([*SPECIAL, UNKNOWN, *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN,
                                   additional_special_tokens=list(SPECIAL))


def mini_network(sizes, tokenizer, rng):
    """A randomly initialised InternVL of these sizes; the same rng seed gives the same weights."""
    n = sizes.size // sizes.patch
    vision = InternVLVisionConfig(
        hidden_size=sizes.width, num_hidden_layers=sizes.vision_layers, num_attention_heads=sizes.heads,
        attention_bias=True, intermediate_size=4 * sizes.width, image_size=[sizes.size] * 2,
        patch_size=[sizes.patch] * 2, layer_scale_init_value=1.0)
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=sizes.width, intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.text_layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
        tie_word_embeddings=False, use_cache=False)
    config = InternVLConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_seq_length=n * n, downsample_ratio=1.0,
        image_token_id=tokenizer.convert_tokens_to_ids(IMG), tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        model = InternVLForConditionalGeneration(config)
        with torch.no_grad():
            positions = model.model.vision_tower.embeddings.position_embeddings
            positions[0, 1:] = 0.5 * grid_positions(n, n, sizes.width)
            for name, m in model.named_modules():                               # the default std of 0.02 is too small
                if isinstance(m, nn.Linear) and name != "lm_head":
                    nn.init.trunc_normal_(m.weight, std=m.in_features**-0.5)
            nn.init.normal_(model.get_input_embeddings().weight)
    return model


class Probe(nn.Module):
    """Heads on the vision tokens for training alone; they are not saved with the judge.

    `dense` regresses the maps under every token, `pairs` compares many random pairs of tokens of one photo, and
    `marker_head` says which token holds the red and which the green marker, so that the language model can find them.
    """

    def __init__(self, sizes, rng):
        super().__init__()
        self.patch = sizes.patch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
            self.norm = nn.LayerNorm(sizes.width)
            self.dense = nn.Linear(sizes.width, len(dense_emphasis()) * sizes.patch**2)
            self.pairs = nn.Sequential(nn.Linear(2 * sizes.width, sizes.width), nn.GELU(),
                                       nn.Linear(sizes.width, len(MODALITIES)))
            self.marker_head = nn.Linear(sizes.width, 3)
        self.side = sizes.size // sizes.patch

    def index(self, pts):
        """Number of the token that holds a point: (..., 2) px -> (...)."""
        place = pts // self.patch
        return place[..., 0] * self.side + place[..., 1]

    def forward(self, tokens, pts):
        """tokens (B, L, D), pts (B, P, 2, 2) px -> dense (B, L, K), pair logits (B, P, M), marker logits (B, L, 3)."""
        tokens = self.norm(tokens)
        B, P = pts.shape[:2]
        index = self.index(pts).flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])          # (B, 2P, D)
        return self.dense(tokens), self.pairs(tokens.gather(1, index).view(B, P, -1)), self.marker_head(tokens)


def class_weights(rel):
    """Weights (..., M), mean 1: both answers of a modality get the same total, pairs without an answer get 0."""
    yes = (rel > 0).float()
    no = (rel < 0).float()
    axes = tuple(range(rel.ndim - 1))
    least = 1 / world()                                                         # where no rank has such an answer
    weight = yes / mean_over_ranks(yes.sum(axes)).clamp_min(least)
    weight = weight + no / mean_over_ranks(no.sum(axes)).clamp_min(least)
    return weight * rel.shape[:-1].numel() / 2


def dense_emphasis():
    """Weights of the K channels that the probe regresses, modality by modality."""
    weights = []
    for m, row in MODALITIES.items():
        one = torch.tensor(DENSE_EMPHASIS.get(m, 1.0))
        weights += one.expand(1 if row.rule == "brighter" else row.channels).tolist()
    return weights


def dense_targets(maps, patch):
    """All modalities in [-1, 1] under every token, luma where that is compared: (B, L, K p^2) and their mask."""
    mask = maps["mask"]
    targets = []
    for m, row in MODALITIES.items():
        x = maps[m]
        if row.rule == "brighter":
            x = torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMA))[:, None]
        targets.append(center_map(x, row.kind, mask))
    maps = torch.where(mask, torch.cat(targets, 1), 0.0)                        # (B, K, H, W)
    return _tokens(maps, patch), _tokens(mask.float().expand_as(maps), patch)


def _tokens(x, patch):
    """The values under every token: (B, C, H, W) -> (B, L, C p^2)."""
    return F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


def marker_loss(logits, index, shown):
    """Cross-entropy of "no marker, red, green" per token; the three classes have the same total weight.

    logits (B, L, 3); index (B, 2) tokens of red and green; shown (B,) bool, False: the photo has no markers
    """
    target = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    target.scatter_(1, index, torch.arange(1, 3, device=logits.device) * shown[:, None])
    weight = send(torch.tensor([1.0, logits.shape[1] / 2, logits.shape[1] / 2], dtype=logits.dtype), logits.device)
    total = weight[target].sum()                                                # of this rank's rows
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), weight=weight.float())
    return loss * (total / mean_over_ranks(total))


def choose_pairs(rel, rng):
    """Number of the pair that is marked in each photo: relations (B, P, M) -> (B, 1).

    "Yes" is a rare answer, so every other photo marks a pair with it if it has one.
    """
    n = len(rel) * world()                                                      # photos of all ranks
    order = own_part(torch.rand(n, rel.shape[1], generator=rng, device=rel.device))
    even = own_part(torch.arange(n, device=rel.device))[:, None] % 2 == 0
    for k, row in enumerate(MODALITIES.values()):
        if row.yes_no:
            order += even * (rel[..., k] > 0)
    return order.argmax(1)[:, None]


def answer_loss(judge, images, features, rel, pair_logits):
    """Cross-entropy of the deciding words of all questions about marked photos.

    features  of judge.vision;  rel (B, M) of the marked pairs;  pair_logits (B, M) of the probe for them
    The target of a pair without an answer (dead zone, sky) is 50/50. Any other target is the mean of the truth and the
    probe's probability for the same pair, which is smoother early in training.
    differs: only the deciding word is supervised; the released recipe supervises the whole sentence.
    """
    logp = judge.logits(images, features=features).float().log_softmax(-1)      # (B, M, vocab)
    two = judge.prompt.answer_values(logp, NAMES)                               # (B, M, 2)
    taught = pair_logits.detach().float().sigmoid()
    first = torch.where(rel == 0, 0.5, (0.5 + 0.5 * rel + taught) / 2)          # (B, M) share of answer one
    return -(torch.stack((first, 1 - first), -1) * two).sum(-1).mean()


def judge_loss(judge, probe, maps, answers, draw, pairs=128):
    """Loss of one step of training a judge from scratch.

    maps     dict of scenes with rgb, all modalities, mask
    answers  False: the vision tower alone (dense, pairs, markers)
             True: the answers to all questions about one marked pair as well
    returns  scalar, dict of its 0-dim parts
    """
    rgb = maps["rgb"]
    B, _, H, W = rgb.shape
    n = draw.batch                                                              # photos of all ranks
    rng = on_device(draw.rng, rgb.device)
    pts = own_part(sample_pairs(n, (H, W), pairs, rng, grid=judge.grid))        # (B, P, 2, 2)
    rel = true_relations(maps, pts)                                             # (B, P, M)
    pick = choose_pairs(rel, rng)                                               # (B, 1)
    marked_pts = pts.gather(1, pick[..., None, None].expand(-1, -1, 2, 2))      # (B, 1, 2, 2)
    images = draw_markers(rgb, marked_pts)[:, 0]
    shown = own_part(torch.rand(n, generator=rng, device=rgb.device) < (1.0 if answers else 0.5))  # others: no marker
    images = torch.where(shown.view(-1, 1, 1, 1), images, rgb)
    features = judge.vision(images)
    dense, pair_logits, marker_logits = probe(features[0], pts)
    target, ok = dense_targets(maps, probe.patch)
    ok = ok * send(torch.tensor(dense_emphasis()), ok.device).repeat_interleave(probe.patch**2)
    emphasis = send(torch.tensor([EMPHASIS.get(m, 1.0) for m in NAMES], dtype=dense.dtype), dense.device).float()
    loss_dense = ((dense - target).square() * ok).sum() / mean_over_ranks(ok.sum()).clamp_min(1)
    loss_pairs = (F.binary_cross_entropy_with_logits(pair_logits.float(), (rel > 0).float(), reduction="none")
                  * class_weights(rel) * emphasis).mean()
    loss_marker = marker_loss(marker_logits, probe.index(marked_pts)[:, 0], shown)
    stats = {"loss/dense": loss_dense.detach(), "loss/pairs": loss_pairs.detach(), "loss/marker": loss_marker.detach()}
    loss = loss_dense + loss_pairs + loss_marker
    if answers:
        one = pick[..., None].expand(-1, -1, rel.shape[-1])                     # (B, 1, M)
        loss_answers = answer_loss(judge, images, features, rel.gather(1, one)[:, 0], pair_logits.gather(1, one)[:, 0])
        stats["loss/answers"] = loss_answers.detach()
        loss = loss + loss_answers
    return loss, stats
