"""The MLLM judge: one marked photo, one question, the probability of the first answer (ReasonX sec. 3.1).

The answer is never generated as text. The prompt is extended by the words both answers share, and the logits
of the two words that can follow are compared (relations.MODALITIES):

    p = sigmoid(logit["red"] - logit["green"])        albedo: "Yes" against "No"

so no answer is unparsable and each comes with a confidence. The questions of all modalities are packed behind one
image: one vision pass, one image prefix, the questions blind to each other (position ids restart after the image).

The network is one of transformers' own (checkpoints.ADAPTERS), opened by `load_judge`; mini_judge.py builds a tiny one.
Images are sRGB-encoded [0, 1], always one square tile, normalised and cut into patches by hand: no processor.
Source: ReasonX (arXiv 2512.04222) and its released judge (questions, answers, prompt format).
"""
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from transformers.utils import logging

import checkpoints
import lora
from bank import Bank
from checkpoints import ADAPTERS, SYSTEM, convert_internvl  # noqa: F401
from config import Parser
from files import replace_files, write_json
from kernels.draw_markers import mark_photos
from photos import as_bytes, find_images, read_rgb
from pictures import save_png
from relations import MODALITIES, draw_markers
from runtime import pick_device, rank, run_command, world

logging.disable_progress_bar()       # of loading and saving weights: errors stay one line
NAMES = tuple(MODALITIES)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of the language model
TOKENS = 2**16                        # of the language model at a time in `ask`
TURN, END = "<|im_start|>", "<|im_end|>"


def add_lora(judge, r, alpha, dropout, rng, checkpointing=False):
    """Freeze a judge and give the linear layers of its language model adapters; returns their paths in it.

    checkpointing  True: recompute activations in the backward pass (while training)
    """
    judge.model.requires_grad_(False)
    judge.origin = ""                                                           # the weights are no longer the files'
    if checkpointing:
        text = judge.model.model.language_model
        getattr(text, "activation_checkpointing_enable", text.gradient_checkpointing_enable)(dict(use_reentrant=False))
    return lora.inject(judge.model.model.language_model, LORA_TARGETS, r, alpha, dropout, rng)


def prompt_ids(tokenizer, system, family, image_tokens, text=False):
    """Token ids of the prompt: head (system, image), question and shared words per modality, the two deciding words.

    returns  head list, blocks dict modality -> list, answers dict modality -> [first, second], sentences dict
             modality -> the two lists that follow a block's "assistant" turn in training
    raises   ValueError when the tokenizer has no image token, or splits a deciding word (unless text: answers {})
    """
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids      # noqa: E731
    turn = f"{TURN}system\n{system}{END}\n" if system else ""
    head = ids(f"{turn}{TURN}user\n{family.opening}{family.image * image_tokens}{family.closing}")
    if head.count(tokenizer.convert_tokens_to_ids(family.image)) != image_tokens:
        raise ValueError(f"judge: the tokenizer does not know {family.image!r} as one token; want that of a "
                         "vision-language model")
    blocks, answers, sentences = {}, {}, {}
    for name, m in MODALITIES.items():
        asked = f"{m.question}{END}\n{TURN}assistant\n"
        blocks[name] = ids(asked + m.prefix)
        full = [ids(f"{asked}{sentence}{END}") for sentence in m.answers]
        cut = len(blocks[name])
        words = [ids(asked + m.prefix + (" " if m.prefix else "") + word) for word in m.words]
        if any(word[:-1] != blocks[name] or text[:cut + 1] != word for word, text in zip(words, full, strict=True)):
            if text:
                continue
            raise ValueError(f"judge: the answers {m.words} are not one token each for {name!r}; "
                             "want a tokenizer that keeps them whole; ask that model for text (--text)")
        answers[name] = [word[-1] for word in words]
        sentences[name] = [text[len(ids(asked)):] for text in full]
    return head, blocks, answers, sentences


class Judge(nn.Module):
    """A vision-language model that compares two marked points.

    model      one of checkpoints.ADAPTERS;  tokenizer  its tokenizer;  system  text of the system turn ("": none)
    grid       px, points it was trained on are centres of grid x grid cells (1: any pixel)
    origin     folder or hub id that its weights were read from; "": they live in memory
    text       True: answers are generated and read as text, for a network whose words cannot be scored
    """

    def __init__(self, model, tokenizer, system=SYSTEM, grid=1, origin="", text=False):
        super().__init__()
        self.text = text
        self.model, self.tokenizer, self.system, self.grid, self.origin = model, tokenizer, system, grid, origin
        self.kind = model.config.model_type
        self.size, image_tokens = tile(model.config)
        mean, std = ADAPTERS[self.kind].pixels
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.head_ids, self.blocks, self.answer_ids, self.sentences = prompt_ids(
            tokenizer, system, ADAPTERS[self.kind], image_tokens, text)
        rows = model.get_input_embeddings().weight.shape[0]
        most = max(max(part) for part in (self.head_ids, *self.blocks.values(), *self.answer_ids.values()))
        if most >= rows:
            raise ValueError(f"judge: the tokenizer gives token {most} to a model that knows {rows}; want the "
                             "tokenizer of that model")

    # pixels -> features -> hidden states ------------------------------------------------------------------------

    def vision(self, images, normalised=False):
        """Features of marked photos, (N, 3, S, S) sRGB in [0, 1]; normalised: by mean and std, already.

        returns  InternVL: patch features before the projector (N, L_img, D); Qwen-VL: (tokens (N, L_img, D), list of
                 (N * L_img, D) that are added in the first layers)
        """
        if tuple(images.shape[1:]) != (3, self.size, self.size):
            raise ValueError(f"judge.vision: got images {tuple(images.shape)}; want (N, 3, {self.size}, {self.size})")
        core = self.model.model
        pixels = images if normalised else ((images - self.mean) / self.std).to(self.model.dtype)
        if self.kind != "internvl":
            patches, grid = patchify(pixels, self.model.config.vision_config)
            out = core.get_image_features(patches, image_grid_thw=grid)
            extra = [x if torch.is_tensor(x) else torch.cat(x)                  # older transformers does not split it
                     for x in getattr(out, "deepstack_features", None) or ()]
            return torch.stack(list(out.pooler_output)), extra
        tokens = core.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        n = int(tokens.shape[1] ** 0.5)
        return core.pixel_shuffle(tokens.unflatten(1, (n, n)), self.model.config.downsample_ratio).flatten(1, 2)

    def _head_positions(self, device):
        """Position ids of the head, (1, L) or for Qwen-VL (3, L) of time, row, column; and the next free position."""
        n = len(self.head_ids)
        position = torch.arange(n, device=device)[None]
        if self.kind == "internvl":
            return position, n
        is_image = torch.tensor(self.head_ids, device=device) == self.model.config.image_token_id
        start, count = int(is_image.int().argmax()), int(is_image.sum())
        side, place = math.isqrt(count), torch.arange(count, device=device)
        position = position.repeat(3, 1) - (position > start) * (count - side)   # what follows starts at start + side
        position[:, is_image] = start + torch.stack((place * 0, place // side, place % side))
        return position, n - count + side

    def _hidden(self, features, ids, position, mask):
        """Last hidden states of sequences with one image each.

        ids (N, L); position (1 or 3, N, L); mask (N, L) of real tokens, (N, 1, L, L) of who sees whom, both bool, or
        None: all are real and each sees what came before
        """
        core = self.model.model
        is_image = ids == self.model.config.image_token_id
        tokens, extra = (core.multi_modal_projector(features), []) if self.kind == "internvl" else features
        embeds = core.get_input_embeddings()(ids).to(tokens.dtype)
        embeds = embeds.masked_scatter(is_image[..., None], tokens)
        deep = dict(visual_pos_masks=is_image, deepstack_visual_embeds=extra) if extra else {}
        return core.language_model(
            inputs_embeds=embeds, position_ids=position[0] if len(position) == 1 else position, use_cache=False,
            attention_mask=mask if mask is None or mask.ndim == 4 else mask.long(), **deep).last_hidden_state

    def _packed(self, modalities, device):
        """One sequence with the image and every question: ids (L,), positions (1 or 3, L), mask (L, L), last (M,)."""
        position, start = self._head_positions(device)
        ids, positions, block, last = list(self.head_ids), [position], [-1] * len(self.head_ids), []
        for k, name in enumerate(modalities):
            ids += self.blocks[name]
            here = start + torch.arange(len(self.blocks[name]), device=device)
            positions.append(here.expand(len(position), -1))
            block += [k] * len(self.blocks[name])
            last.append(len(ids) - 1)
        block = torch.tensor(block, device=device)
        sees = (block[None] == -1) | (block[None] == block[:, None])            # image prefix and one's own question
        sees &= torch.ones(len(ids), len(ids), dtype=torch.bool, device=device).tril()
        return torch.tensor(ids, device=device), torch.cat(positions, 1), sees, torch.tensor(last, device=device)

    def _padded(self, tails, device):
        """Sequences head + tail, padded on the left: ids (N, L), positions (1 or 3, N, L), mask (N, L)."""
        head, start = self._head_positions(device)
        length = max(map(len, tails))
        ids = torch.tensor([[0] * (length - len(t)) + self.head_ids + t for t in tails], device=device)
        pad = torch.tensor([[length - len(t)] for t in tails], device=device)   # (N, 1)
        place = torch.arange(ids.shape[1], device=device) - pad
        follow = (start + torch.arange(length, device=device)).expand(len(head), -1)
        return ids, torch.cat((head, follow), 1)[:, place.clamp_min(0)], place >= 0

    # answers ----------------------------------------------------------------------------------------------------

    def logits(self, images, modalities=tuple(MODALITIES), features=None):
        """Logits of the whole vocabulary at the deciding token of every question, the image seen once.

        images    (N, 3, S, S) marked sRGB [0, 1], S = self.size
        features  output of `vision` if it was already computed
        returns   (N, M, vocab)
        """
        features = self.vision(images) if features is None else features
        tokens = features if self.kind == "internvl" else features[0]
        ids, position, sees, last = self._packed(modalities, tokens.device)
        N = len(tokens)
        if len(modalities) == 1:                                                # a plain causal mask is faster
            return self.prefill(images, modalities * N, features)[:, None]
        hidden = self._hidden(features, ids.expand(N, -1), position[:, None].expand(-1, N, -1),
                              sees.expand(N, 1, -1, -1))
        return self.model.lm_head(hidden[:, last])                              # (N, M, vocab)

    def prefill(self, images, modalities, features=None):
        """Logits at the deciding token of one question per image, padded on the left: (N, 3, S, S), N names -> (N, V).

        The plain form of `logits`: one prefill per (image, question), the head applied to the last token only.
        """
        features = self.vision(images) if features is None else features
        ids, position, mask = self._padded([self.blocks[m] for m in modalities], images.device)
        hidden = self._hidden(features, ids, position, None if len(set(modalities)) == 1 else mask)
        return self.model.lm_head(hidden[:, -1])

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
        if self.text:
            return torch.tensor([understood(x, modality) for x in self.say(images, modality)], device=images.device)
        return self.decide(self.logits(images, (modality,)), (modality,))[:, 0].sigmoid()

    def _answers(self, rgb, pts, photo):
        """Probability of the first answer to every question: pairs (N, 2, 2) of the photos numbered (N,) -> (N, M)."""
        if self.text:
            images = draw_markers(rgb[photo], pts[:, None])[:, 0]
            said = [[understood(x, m) for x in self.say(images, m)] for m in MODALITIES]
            return torch.tensor(said, device=images.device).T
        pixels = mark_photos(rgb, pts, photo, self.mean, self.std, self.model.dtype)
        return self.decide(self.logits(None, features=self.vision(pixels, normalised=True))).sigmoid()

    @torch.no_grad()
    def ask(self, rgb, pts, batch=0):
        """Ask all questions about every pair.

        rgb      (B, 3, S, S) unmarked sRGB [0, 1];  pts (B, P, 2, 2) in pixels of rgb
        batch    marked photos at a time; 0: as many as make TOKENS tokens
        returns  (B, P, M) probability of the first answer, modalities in the order of MODALITIES
        """
        B, P = pts.shape[:2]
        flat = pts.reshape(B * P, 2, 2)
        length = len(self.head_ids) + sum(map(len, self.blocks.values()))
        batch = batch or max(1, TOKENS // length)
        out = []
        for part in torch.arange(B * P, device=rgb.device).split(batch) if B * P else ():
            out.append(self._answers(rgb, flat[part], part // P).float())
        return torch.cat(out).view(B, P, -1) if out else rgb.new_zeros(B, P, len(MODALITIES))

    @torch.no_grad()
    def say(self, images, modality, tokens=40):
        """The answer as generated text, greedily: (N, 3, S, S) -> list of N strings. Slow; only to check `score`."""
        asked = f"{MODALITIES[modality].question}{END}\n{TURN}assistant\n"
        ids = torch.tensor([self.head_ids + self.tokenizer(asked, add_special_tokens=False).input_ids],
                           device=images.device).expand(len(images), -1)
        pixels = ((images - self.mean) / self.std).to(self.model.dtype)
        given = dict(pixel_values=pixels)
        if self.kind != "internvl":
            patches, grid = patchify(pixels, self.model.config.vision_config)
            given = dict(pixel_values=patches, image_grid_thw=grid,
                         mm_token_type_ids=(ids == self.model.config.image_token_id).int())
        end = self.tokenizer.convert_tokens_to_ids(END)
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                                  do_sample=False, use_cache=True, eos_token_id=end, pad_token_id=end, **given)
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, ids.shape[1]:]]

    # training ---------------------------------------------------------------------------------------------------

    def sentence_loss(self, images, modalities, first):
        """Next-token cross-entropy on the whole answer sentence and its end mark, as in the judge release.

        images (N, 3, S, S) marked; modalities N names; first N bools, True: the first answer is right
        returns  sum over answer tokens (scalar), number of answer tokens
        """
        answers = [self.sentences[m][0 if f else 1] for m, f in zip(modalities, first, strict=True)]
        tails = [[*self.blocks[m], *a[len(self.blocks[m]) - self._asked(m):]]
                 for m, a in zip(modalities, answers, strict=True)]
        ids, position, mask = self._padded(tails, images.device)
        with torch.set_grad_enabled(any(p.requires_grad for p in self._eye().parameters())):
            features = self.vision(images)
        hidden = self._hidden(features, ids, position, mask)[:, :-1]
        taught = torch.zeros_like(mask)
        for i, a in enumerate(answers):
            taught[i, -len(a):] = True
        logits = self.model.lm_head(hidden[taught[:, 1:]])                      # (answer tokens, vocab)
        return F.cross_entropy(logits.float(), ids[taught], reduction="sum"), int(taught.sum())

    def _asked(self, modality):
        """Number of tokens of a block before the answer begins."""
        asked = f"{MODALITIES[modality].question}{END}\n{TURN}assistant\n"
        return len(self.tokenizer(asked, add_special_tokens=False).input_ids)

    def _eye(self):
        return self.model.model.vision_tower if self.kind == "internvl" else self.model.model.visual

    # files ------------------------------------------------------------------------------------------------------

    def digest(self):
        """Hex digest of weights, tokenizer and prompt: what the judgement bank keys its answers by."""
        start = prompt_key(self.head_ids, self.blocks, self.answer_ids)
        if self.origin:
            return checkpoints.files_digest(self.origin, start)
        h = hashlib.sha256(start)
        for name, p in sorted(self.model.state_dict().items()):
            checkpoints.update(h, name, p)
        return h.hexdigest()

    def save(self, folder):
        """Write a native transformers folder (config.json, model.safetensors, tokenizer), judge.json last.

        raises  OSError: nothing in the folder has changed
        """
        replace_files(folder, self._write, last="judge.json")

    def _write(self, folder):
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.save_about(folder)

    def save_about(self, folder):
        """Write judge.json: what config.json does not say."""
        write_json(Path(folder, "judge.json"), dict(system=self.system, grid=self.grid, size=self.size))


def understood(text, modality):
    """What a generated sentence says: 1.0 first answer, 0.0 second, 0.5 neither. Only the official wording counts."""
    plain = lambda x: re.sub(r"\W+", " ", x).strip().lower()                    # noqa: E731
    m = MODALITIES[modality]
    for value, word in zip((1.0, 0.0), m.words, strict=True):
        if f"{plain(text)} ".startswith(plain(f"{m.prefix} {word}") + " "):
            return value
    return 0.5


def prompt_key(head, blocks, answers):
    """The prompt as bytes, for digests."""
    return json.dumps([head, blocks, answers]).encode()


def tile(config):
    """Side of the square tile (px) and number of image tokens of a network's config. raises ValueError: not square."""
    vision, family = config.vision_config, ADAPTERS[config.model_type]
    if config.model_type != "internvl":
        side = family.size // vision.patch_size // vision.spatial_merge_size
        return side * vision.patch_size * vision.spatial_merge_size, side**2
    height, width = vision.image_size
    if height != width:
        raise ValueError(f"judge.Judge: got image size {height} x {width}; want a square tile")
    return height, config.image_seq_length


def patchify(pixels, vision):
    """Normalised pixels (N, 3, S, S) -> Qwen-VL's patches (N * n^2, 3 * T * p * p), merged cells side by side, and
    grid (N, 3) of time, rows, columns."""
    p, merge, T = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    N, C, S, _ = pixels.shape
    n = S // p
    x = pixels.reshape(N, C, n // merge, merge, p, n // merge, merge, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x[..., None, :, :].expand(*x.shape[:6], T, p, p)                        # (N, gh, gw, mh, mw, C, T, p, p)
    return x.reshape(N * n * n, C * T * p * p), torch.tensor([[1, n, n]] * N, device=pixels.device)


def load_judge(folder, device="cpu", dtype=None, size=0, text=False):
    """Open a judge: mini folder, InternVL chat folder (merged or unmerged LoRA), native folder, PEFT folder, hub id.

    dtype   of the weights; None: fp32 on a CPU, as stored (bf16 for the published ones) on a GPU
    size    px of the tile, if not the checkpoint's own (InternVL only)
    raises  FileNotFoundError, ValueError: one line that names the file or key
    """
    with checkpoints.damaged(folder):
        model, tokenizer, about = checkpoints.open_network(folder, size)
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else None)
        model = model.to(device, dtype) if dtype else model.to(device)
        return Judge(model, tokenizer, **about, origin="" if size else str(folder), text=text).to(device).eval()


class Closed:
    """A judge on disk: size, grid and digest from its files; its weights are opened at the first question.

    A bank that knows every answer never opens it, so GRPO runs with no judge in memory.
    """

    def __init__(self, folder, device="cpu"):
        self.folder, self.device, self.opened = str(folder), device, None
        where, adapter = checkpoints.locate(folder)
        with checkpoints.damaged(where):
            self._read(where, adapter)

    def _read(self, where, adapter):
        config = checkpoints.read_config(where)
        kind, tokenizer = checkpoints.family_of(where, config), checkpoints.load_tokenizer(where)
        about, outline = checkpoints.describe(adapter or where, config), checkpoints.outline(where, config)
        if kind == "internvl":
            checkpoints.set_tile(outline, about.pop("size"))
        self.size, tokens = tile(outline)
        self.grid = about["grid"]
        head, blocks, answers, _ = prompt_ids(tokenizer, about["system"], ADAPTERS[kind], tokens)
        self.prompt = prompt_key(head, blocks, answers)

    def digest(self):
        """As Judge.digest of the opened judge."""
        return checkpoints.files_digest(self.folder, self.prompt)

    def ask(self, rgb, pts, batch=0):
        """As Judge.ask; opens the judge if that has not happened yet."""
        if self.opened is None:
            self.opened = load_judge(self.folder, self.device)
        return self.opened.ask(rgb, pts, batch)


def fill_bank(folder, images, judge, pairs, device):
    """Ask about every photo of a folder ahead of time; this rank's share of them. Returns a Bank with its counts.

    Resumes where it stopped; a photo that cannot be read is named and skipped, as Photos does.
    """
    bank, chunk = Bank(folder, judge), 8
    paths = find_images(images)[rank()::world()]
    bar = tqdm(range(0, len(paths), chunk), desc=f"bank, process {rank() + 1} of {world()}", unit="8 photos",
               mininterval=1.0)
    for i in bar:
        photos = []
        for path in paths[i:i + chunk]:
            try:
                photos.append(as_bytes(read_rgb(path), judge.size))
            except (ValueError, OSError) as error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        if photos:
            bank.fill(torch.stack(photos), pairs, device)
    bank.pack()
    return bank


def arguments(argv):
    """Parse and check the command line."""
    p = Parser(prog="judge.py", allow_abbrev=False, description="Ask the judge to compare two points of a photo.")
    p.add_argument("image", metavar="IMAGE", help="a photo; with --bank a folder of photos")
    p.add_argument("--red", type=int, nargs=2, metavar=("X", "Y"), help="red point, pixels from the left and the top")
    p.add_argument("--green", type=int, nargs=2, metavar=("X", "Y"), help="green point")
    p.add_argument("--modality", choices=NAMES, default="depth", help="the question to ask [depth]")
    p.add_argument("--all", action="store_true", help="ask all four questions")
    p.add_argument("--model", default="out/mini/judge",
                   help="judge: folder of ours, InternVL chat, native InternVL or Qwen-VL folder, PEFT adapter, hub id "
                        "[out/mini/judge]")
    p.add_argument("--text", action="store_true",
                   help="generate the answer as text as well: slow, to check the score, or for a model without scores")
    p.add_argument("--save", default="", help="file for the photo as the judge sees it, with its markers (.png)")
    p.add_argument("--bank", default="", help="fill this judgement bank from the photos under IMAGE instead")
    p.add_argument("--pairs", type=int, default=40, help="with --bank: pairs per photo [40]")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    p.limits()
    args = p.parse_args(argv)
    if not args.bank and not (args.red and args.green):
        p.error("want --red X Y and --green X Y, two points of the photo")
    p.at_least(args, 1, "pairs")
    if args.save and Path(args.save).suffix.lower() != ".png":
        p.error(f"--save {args.save}: want a name that ends in .png")
    return p, args


def main(argv=None):
    """Command line: one answer, or all four, for two points of a photo; or a bank for a folder of photos."""
    p, args = arguments(argv)
    device = pick_device(args.device, "judge.py")
    if args.bank:
        bank = fill_bank(args.bank, args.image, Closed(args.model, device), args.pairs, device)
        print(f"bank: {bank.asked} pairs asked, {bank.known} already known; {bank.folder}")
        return
    rgb = read_rgb(args.image)
    H, W = rgb.shape[-2:]
    for name in ("red", "green"):
        x, y = getattr(args, name)
        if not (0 <= x < W and 0 <= y < H):
            p.error(f"--{name} {x} {y} lies outside the {W} x {H} photo")
    judge = load_judge(args.model, device, text=args.text)
    small = F.interpolate(rgb[None], (judge.size, judge.size), mode="bilinear", antialias=True).clamp(0, 1).to(device)
    xy = torch.tensor([args.red, args.green])                                   # (2, 2) x, y
    pts = (xy.flip(-1) * judge.size // torch.tensor([H, W])) // judge.grid * judge.grid + judge.grid // 2
    marked = draw_markers(small, pts.to(device)[None, None])[:, 0]
    if args.save:
        save_png(args.save, marked[0].cpu().numpy())
    asked, judge.text = NAMES if args.all else (args.modality,), len(judge.answer_ids) < len(NAMES)
    prob = judge.ask(small, pts.to(device)[None, None])[0, 0].tolist()
    for m in asked:
        share = prob[NAMES.index(m)]
        first = share >= 0.5
        print(f"{m}: {MODALITIES[m].answers[0 if first else 1]} (p = {share if first else 1 - share:.3f})")
        if args.text:
            print(f"{m}, generated: {judge.say(marked, m)[0]}")


if __name__ == "__main__":
    run_command(main, "judge.py")
