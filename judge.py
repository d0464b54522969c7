"""The MLLM judge: one marked photo, one question, the probability of the first answer (ReasonX sec. 3.1).

The answer is never generated as text. The prompt is extended by the words both answers share, and the logits
of the two words that can follow are compared (relations.MODALITIES):

    p = sigmoid(logit["red"] - logit["green"])        albedo: "Yes" against "No"

so no answer is unparsable and each comes with a confidence. The questions of all modalities are packed behind one
image: one vision pass, one image prefix, the questions blind to each other (position ids restart after the image).

The network is transformers' InternVLForConditionalGeneration. `MiniJudge` sizes build it from a tiny config, to be
trained from scratch at mini scale; `load_judge` opens any native InternVL folder with the same chat format.
Images are sRGB-encoded [0, 1], normalised by ImageNet mean and std, always one tile.
Source: ReasonX (arXiv 2512.04222) and its released judge (questions, answers, prompt format).
"""
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

import data
from config import Parser
from kernels.draw_markers import mark_photos
from relations import LUMA, MODALITIES, draw_markers, relation, relative_depth, sample_pairs
from runtime import run_command

logging.disable_progress_bar()       # of loading and saving weights: errors stay one line
NAMES = tuple(MODALITIES)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMG, IMG_START, IMG_END = "<IMG_CONTEXT>", "<img>", "</img>"
TURN, END = "<|im_start|>", "<|im_end|>"
EMPHASIS = (1.2, 2.0, 0.4, 0.4)      # of the probe's pair loss, in order of NAMES: shape is learnt slower than colour
DENSE_EMPHASIS = (3.0, 1.0, 1.0, 3.0, 0.5, 0.5, 0.5, 1.0)     # depth, normal x y z, albedo r g b, irradiance luma
SPECIAL = (TURN, END, IMG_START, IMG_END, IMG)
SYSTEM = ("你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
          "多模态大语言模型。")


@dataclass
class MiniJudge:
    """Sizes of the judge that is trained from scratch."""

    size: int = 32           # px, side of the square photo
    patch: int = 4           # px, side of a vision token
    width: int = 128
    vision_layers: int = 5
    text_layers: int = 2
    heads: int = 4


def mini_tokenizer():
    """Tokenizer over the official questions (one token each) and answers (one a word); a 4B judge brings its own."""
    questions = "|".join(re.escape(m.question) for m in MODALITIES.values())
    split = pre_tokenizers.Split(Regex(rf"{questions}|\w+|[^\w\s]"), "removed", invert=True)
    texts = [text for m in MODALITIES.values() for text in (m.question, *m.answers)]
    tokens = sorted({w for text in [*texts, "system user assistant"] for w, _ in split.pre_tokenize_str(text)})
    vocab = {w: i for i, w in enumerate([*SPECIAL, "<unk>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                   additional_special_tokens=list(SPECIAL))


def position_table(n, width):
    """2-D sine-cosine positions of an n x n grid: (n*n, width)."""
    freq = torch.exp(-torch.arange(width // 4) / (width // 4) * 4.0)            # 1 .. e^-4 rad per token
    angle = torch.arange(n)[:, None] * freq                                     # (n, width/4)
    one = torch.cat((angle.sin(), angle.cos()), 1)                              # (n, width/2)
    return torch.cat((one[:, None].expand(n, n, -1), one[None].expand(n, n, -1)), -1).flatten(0, 1)


def build_mini(cfg, rng):
    """A randomly initialised Judge of the sizes in `cfg`; the same rng seed gives the same weights."""
    tokenizer = mini_tokenizer()
    n = cfg.size // cfg.patch
    vision = InternVLVisionConfig(
        hidden_size=cfg.width, num_hidden_layers=cfg.vision_layers, num_attention_heads=cfg.heads, attention_bias=True,
        intermediate_size=4 * cfg.width, image_size=[cfg.size] * 2, patch_size=[cfg.patch] * 2,
        layer_scale_init_value=1.0)
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=cfg.width, intermediate_size=2 * cfg.width,
        num_hidden_layers=cfg.text_layers, num_attention_heads=cfg.heads, num_key_value_heads=cfg.heads,
        tie_word_embeddings=False, use_cache=False)
    config = InternVLConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_seq_length=n * n, downsample_ratio=1.0,
        image_token_id=tokenizer.convert_tokens_to_ids(IMG), tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        model = InternVLForConditionalGeneration(config)
        with torch.no_grad():
            model.model.vision_tower.embeddings.position_embeddings[0, 1:] = 0.5 * position_table(n, cfg.width)
            for name, m in model.named_modules():                               # std 0.02 is far too small at width 128
                if isinstance(m, nn.Linear) and name != "lm_head":
                    nn.init.trunc_normal_(m.weight, std=m.in_features**-0.5)
            nn.init.normal_(model.get_input_embeddings().weight)
    return Judge(model, tokenizer, system="", grid=cfg.patch)


class Judge(nn.Module):
    """A vision-language model that compares two marked points.

    model      InternVLForConditionalGeneration;  tokenizer  its tokenizer;  system  text of the system turn ("": none)
    grid       px, points it was trained on are centres of grid x grid cells (1: any pixel)
    """

    def __init__(self, model, tokenizer, system=SYSTEM, grid=1):
        super().__init__()
        self.model, self.tokenizer, self.system, self.grid = model, tokenizer, system, grid
        height, width = model.config.vision_config.image_size
        if height != width:
            raise ValueError(f"judge.Judge: got image size {height} x {width}; want a square tile")
        self.size = height
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.head_ids, self.blocks, self.answer_ids = self._prompt()

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _prompt(self):
        """Token ids of the shared prefix, of each question, and of the two words that decide it."""
        system = f"{TURN}system\n{self.system}{END}\n" if self.system else ""
        image = IMG_START + IMG * self.model.config.image_seq_length + IMG_END
        head = self._ids(f"{system}{TURN}user\n{image}\n")
        blocks, answers = {}, {}
        for name, m in MODALITIES.items():
            stem = f"{m.question}{END}\n{TURN}assistant\n{m.prefix}"
            blocks[name] = self._ids(stem)
            glue = " " if m.prefix else ""
            full = [self._ids(stem + glue + word) for word in m.words]
            if any(ids[:-1] != blocks[name] for ids in full):
                raise ValueError(f"judge: the answers {m.words} are not one token each for {name!r}; "
                                 "want a tokenizer that keeps them whole")
            answers[name] = [ids[-1] for ids in full]
        return head, blocks, answers

    def _packed(self, modalities, device):
        """One sequence with the image and every question: ids (L,), positions (L,), mask (L, L), last tokens (M,)."""
        ids, position, block = list(self.head_ids), list(range(len(self.head_ids))), [-1] * len(self.head_ids)
        last = []
        for k, name in enumerate(modalities):
            ids += self.blocks[name]
            position += range(len(self.head_ids), len(self.head_ids) + len(self.blocks[name]))
            block += [k] * len(self.blocks[name])
            last.append(len(ids) - 1)
        block = torch.tensor(block, device=device)
        sees = (block[None] == -1) | (block[None] == block[:, None])            # image prefix and one's own question
        sees &= torch.ones(len(ids), len(ids), dtype=torch.bool, device=device).tril()
        as_tensor = lambda x: torch.tensor(x, device=device)                    # noqa: E731
        return as_tensor(ids), as_tensor(position), sees, as_tensor(last)

    def logits(self, images, modalities=tuple(MODALITIES), features=None):
        """Logits of the whole vocabulary at the deciding token of every question.

        images    (N, 3, S, S) marked sRGB [0, 1], S = self.size
        features  output of `vision` if it was already computed
        returns   (N, M, vocab)
        """
        core = self.model.model
        if features is None:
            features = self.vision(images)
        ids, position, sees, last = self._packed(modalities, features.device)
        image_tokens = core.multi_modal_projector(features)                     # (N, L_img, D)
        embeds = core.get_input_embeddings()(ids).to(image_tokens.dtype).expand(len(features), -1, -1).clone()
        embeds[:, ids == self.model.config.image_token_id] = image_tokens
        hidden = core.language_model(
            inputs_embeds=embeds, position_ids=position[None].expand(len(embeds), -1), use_cache=False,
            attention_mask=sees.expand(len(embeds), 1, -1, -1)).last_hidden_state
        return self.model.lm_head(hidden[:, last])                              # (N, M, vocab)

    def vision(self, images, normalised=False):
        """Patch features before the projector: (N, 3, S, S) -> (N, L_img, D). normalised: by mean and std, already."""
        if tuple(images.shape[1:]) != (3, self.size, self.size):
            raise ValueError(f"judge.vision: got images {tuple(images.shape)}; want (N, 3, {self.size}, {self.size})")
        pixels = images if normalised else ((images - self.mean) / self.std).to(self.model.dtype)
        tokens = self.model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        n = int(tokens.shape[1] ** 0.5)
        tokens = tokens.unflatten(1, (n, n))
        return self.model.model.pixel_shuffle(tokens, self.model.config.downsample_ratio).flatten(1, 2)

    def decide(self, logits, modalities=tuple(MODALITIES)):
        """Difference of the two answer logits: (N, M, vocab) -> (N, M), positive = first answer."""
        pair = torch.tensor([self.answer_ids[m] for m in modalities], device=logits.device)  # (M, 2)
        two = logits.float().gather(-1, pair.expand(len(logits), -1, -1))
        return two[..., 0] - two[..., 1]

    @torch.no_grad()
    def score(self, images, modality):
        """Probability of "red" (albedo: of "yes") for marked photos: (N, 3, S, S) -> (N,) float32."""
        if modality not in MODALITIES:
            raise ValueError(f"judge.score: got modality {modality!r}; want one of {', '.join(MODALITIES)}")
        return self.decide(self.logits(images, (modality,)), (modality,))[:, 0].sigmoid()

    @torch.no_grad()
    def ask(self, rgb, pts, batch=256):
        """Ask all questions about every pair.

        rgb      (B, 3, S, S) unmarked sRGB [0, 1];  pts (B, P, 2, 2) in pixels of rgb
        returns  (B, P, M) probability of the first answer, modalities in the order of MODALITIES
        """
        B, P = pts.shape[:2]
        flat, out = pts.reshape(B * P, 2, 2), []
        for part in torch.arange(B * P, device=rgb.device).split(batch) if B * P else ():
            pixels = mark_photos(rgb, flat[part], part // P, self.mean, self.std, self.model.dtype)
            features = self.vision(pixels, normalised=True)
            out.append(self.decide(self.logits(None, features=features)).sigmoid())
        return torch.cat(out).view(B, P, -1) if out else rgb.new_zeros(B, P, len(MODALITIES))

    def digest(self):
        """Hex digest of weights, tokenizer and prompt: what the judgement bank keys its answers by."""
        h = hashlib.sha256(json.dumps([self.head_ids, self.blocks, self.answer_ids]).encode())
        for name, p in sorted(self.model.state_dict().items()):
            h.update(name.encode())
            h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    def save(self, folder):
        """Write a native transformers folder (config.json, model.safetensors, tokenizer) plus judge.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "judge.json").write_text(json.dumps(dict(system=self.system, grid=self.grid)))


def load_judge(folder):
    """Open a judge in native transformers InternVL layout, without remote code.

    raises  FileNotFoundError when config.json, tokenizer.json or the weights are missing;
            ValueError for another architecture
    """
    folder = Path(folder)
    weights = ("model.safetensors" if not (folder / "model.safetensors.index.json").is_file()
               else "model.safetensors.index.json")
    for name in ("config.json", "tokenizer.json", weights):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"judge.load_judge: got no {name} in {folder}; want a judge folder written by "
                                    "`python train.py --stage judge` or a native InternVL folder")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "internvl":
        raise ValueError(f"judge.load_judge: got model_type {kind!r} in {folder}; want 'internvl'")
    try:
        model, found = InternVLForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, use_safetensors=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"judge.load_judge: the weights in {folder} cannot be read ({error}); want model.safetensors "
                         "that fits config.json") from None
    wrong = [str(k) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in found.get(kind, ())]
    if wrong:
        raise ValueError(f"judge.load_judge: {len(wrong)} weights in {folder} do not fit config.json "
                         f"(first: {wrong[0]}); want a complete checkpoint of that architecture")
    extra = folder / "judge.json"
    about = json.loads(extra.read_text()) if extra.is_file() else dict(system=SYSTEM, grid=1)
    return Judge(model, PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")), **about).eval()


class Probe(nn.Module):
    """Training-only heads on the vision tokens; thrown away when the judge is saved.

    A judge of a million weights that sees only answers stays at chance. Three denser tasks carry it: `dense` regresses
    the maps under every token, `pairs` compares many random pairs of tokens of one photo, and `marker_head` says which
    token holds the red and which the green marker, so that the language model can find them.
    differs: the paper fine-tunes a pre-trained MLLM and needs none of them.
    """

    def __init__(self, sizes, rng, channels=8):
        super().__init__()
        self.patch = sizes.patch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
            self.norm = nn.LayerNorm(sizes.width)
            self.dense = nn.Linear(sizes.width, channels * sizes.patch**2)
            self.pairs = nn.Sequential(nn.Linear(2 * sizes.width, sizes.width), nn.GELU(),
                                       nn.Linear(sizes.width, len(MODALITIES)))
            self.marker_head = nn.Linear(sizes.width, 3)
        self.side = sizes.size // sizes.patch

    def index(self, pts):
        """Number of the token that holds a point: (..., 2) px -> (...)."""
        return (pts // self.patch * torch.tensor([self.side, 1], device=pts.device)).sum(-1)

    def forward(self, tokens, pts):
        """tokens (B, L, D), pts (B, P, 2, 2) px -> dense (B, L, K), pair logits (B, P, M), marker logits (B, L, 3)."""
        tokens = self.norm(tokens)
        B, P = pts.shape[:2]
        index = self.index(pts).flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])          # (B, 2P, D)
        return self.dense(tokens), self.pairs(tokens.gather(1, index).view(B, P, -1)), self.marker_head(tokens)


def true_relations(maps, pts):
    """Relations of all modalities from ground truth: (B, P, M) int8; 0 where a point is invalid."""
    nan = {m: maps[m].masked_fill(~maps["mask"], torch.nan) for m in MODALITIES}
    return torch.stack([relation(nan[m], pts, m) for m in MODALITIES], -1)


def class_weights(rel):
    """Weights (..., M) that make both answers of a modality count the same, pairs without an answer 0; mean 1."""
    yes, no = (rel > 0).float(), (rel < 0).float()
    axes = tuple(range(rel.ndim - 1))
    weight = yes / yes.sum(axes).clamp_min(1) + no / no.sum(axes).clamp_min(1)
    return weight * rel.shape[:-1].numel() / 2


def dense_targets(maps, patch):
    """Normalised depth, normal, albedo and irradiance luma under every token: (B, L, 8 p^2) and their mask."""
    mask = maps["mask"]
    depth = relative_depth(maps["depth"], mask)
    luma = torch.einsum("bchw,c->bhw", maps["irradiance"], maps["irradiance"].new_tensor(LUMA))[:, None]
    maps = torch.cat((2 * depth - 1, maps["normal"], 2 * maps["albedo"] - 1, 2 * luma - 1), 1)      # (B, 8, H, W)
    maps = torch.where(mask, maps, 0.0)
    tokens = lambda x: F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)   # noqa: E731
    return tokens(maps), tokens(mask.float().expand(-1, 8, -1, -1))


def marker_loss(logits, index, shown):
    """Cross-entropy of "no marker, red, green" per token, the three classes weighing the same.

    logits (B, L, 3); index (B, 2) tokens of red and green; shown (B,) bool, False: the photo has no markers
    """
    target = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    target.scatter_(1, index, torch.tensor([1, 2], device=logits.device) * shown[:, None])
    weight = logits.new_tensor([1.0, logits.shape[1] / 2, logits.shape[1] / 2])
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), weight=weight.float())


def judge_loss(judge, probe, maps, answers, rng, pairs=128):
    """Loss of one step of training a judge from scratch.

    maps     dict of scenes with rgb, depth, normal, albedo, irradiance, mask
    answers  False: the vision tower alone (dense, pairs, markers);
             True: also the answer to four questions on one marked pair
    returns  scalar, dict of its 0-dim parts
    Pairs without an answer (dead zone, sky) are taught as 50/50, so that the judge is unsure there. Other answers are
    taught half by the truth, half by the probe's probability for the same pair: a smoother target to start from.
    differs: only the deciding word is supervised; the released recipe supervises the whole sentence.
    """
    rgb = maps["rgb"]
    B, _, H, W = rgb.shape
    pts = sample_pairs(B, (H, W), pairs, rng, grid=judge.grid).to(rgb.device)         # (B, P, 2, 2)
    rel = true_relations(maps, pts)                                             # (B, P, M)
    # one pair per photo is marked; "same" albedo is rare, so every other photo marks such a pair if it has one
    order = torch.rand(B, pairs, generator=rng).to(rgb.device)
    order[::2] += (rel[::2, :, NAMES.index("albedo")] > 0).float()
    pick = order.argmax(1)[:, None]                                             # (B, 1)
    marked_pts = pts.gather(1, pick[..., None, None].expand(-1, -1, 2, 2))
    marked_rel = rel.gather(1, pick[..., None].expand(-1, -1, len(NAMES)))[:, 0]  # (B, M)
    images = draw_markers(rgb, marked_pts)[:, 0]
    shown = (torch.rand(B, generator=rng) < (1.0 if answers else 0.5)).to(rgb.device)   # the others stay unmarked
    images = torch.where(shown.view(-1, 1, 1, 1), images, rgb)
    tokens = judge.vision(images)
    dense, pair_logits, marker_logits = probe(tokens, pts)
    target, ok = dense_targets(maps, probe.patch)
    ok = ok * ok.new_tensor(DENSE_EMPHASIS).repeat_interleave(probe.patch**2)
    emphasis = dense.new_tensor(EMPHASIS).float()
    loss_dense = ((dense - target).square() * ok).sum() / ok.sum().clamp_min(1)
    loss_pairs = (F.binary_cross_entropy_with_logits(pair_logits.float(), (rel > 0).float(), reduction="none")
                  * class_weights(rel) * emphasis).mean()
    loss_marker = marker_loss(marker_logits, probe.index(marked_pts)[:, 0], shown)
    stats = {"loss/dense": loss_dense.detach(), "loss/pairs": loss_pairs.detach(), "loss/marker": loss_marker.detach()}
    loss = loss_dense + loss_pairs + loss_marker
    if answers:
        logp = judge.logits(images, features=tokens).float().log_softmax(-1)    # (B, M, vocab)
        two = logp.gather(-1, torch.tensor([judge.answer_ids[m] for m in NAMES], device=rgb.device).expand(B, -1, -1))
        taught = pair_logits.detach().float().gather(1, pick[..., None].expand(-1, -1, len(NAMES)))[:, 0].sigmoid()
        first = torch.where(marked_rel == 0, 0.5, (0.5 + 0.5 * marked_rel + taught) / 2)  # (B, M) share of answer one
        loss_answers = -(torch.stack((first, 1 - first), -1) * two).sum(-1).mean()
        stats["loss/answers"] = loss_answers.detach()
        loss = loss + loss_answers
    return loss, stats


def main(argv=None):
    """Command line: one answer, or all four, for two points of a photo."""
    p = Parser(prog="judge.py", allow_abbrev=False, description="Ask the judge to compare two points of a photo.")
    p.add_argument("image", metavar="IMAGE", help="a photo")
    p.add_argument("--red", type=int, nargs=2, required=True, metavar=("X", "Y"),
                   help="red point, pixels from the left and the top")
    p.add_argument("--green", type=int, nargs=2, required=True, metavar=("X", "Y"), help="green point")
    p.add_argument("--modality", choices=NAMES, default="depth", help="the question to ask [depth]")
    p.add_argument("--all", action="store_true", help="ask all four questions")
    p.add_argument("--model", default="out/mini/judge", help="judge folder [out/mini/judge]")
    args = p.parse_args(argv)
    rgb = data.read_rgb(args.image)
    H, W = rgb.shape[-2:]
    for name in ("red", "green"):
        x, y = getattr(args, name)
        if not (0 <= x < W and 0 <= y < H):
            p.error(f"--{name} {x} {y} lies outside the {W} x {H} photo")
    judge = load_judge(args.model)
    small = F.interpolate(rgb[None], (judge.size, judge.size), mode="bilinear", antialias=True).clamp(0, 1)
    xy = torch.tensor([args.red, args.green])                                   # (2, 2) x, y
    pts = (xy.flip(-1) * judge.size // torch.tensor([H, W])) // judge.grid * judge.grid + judge.grid // 2
    prob = judge.ask(small, pts[None, None])[0, 0]
    for m, share in zip(NAMES, prob.tolist(), strict=True):
        if args.all or m == args.modality:
            first = share >= 0.5
            print(f"{m}: {MODALITIES[m].answers[0 if first else 1]} (p = {share if first else 1 - share:.3f})")


if __name__ == "__main__":
    run_command(main, "judge.py")
