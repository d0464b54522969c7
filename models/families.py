"""Families of vision-language models that can be a judge, and the prompt in the chat format of each.

FAMILIES   the table: a row holds a family's chat format, pixel statistics and tile; the row's class computes what
           differs between families (tile, vision features, positions, inputs of `generate`)
Prompt     the chat format as token ids: one image, then the question of every modality; packed or padded into sequences
NO_JUDGES  known families that no row can describe, and why
To add a family, add a row here, and a class if it is neither InternVL nor Qwen-VL.
Source: chat formats and pixel statistics of OpenGVLab's InternVL2.5 and Alibaba's Qwen2.5-VL, Qwen3-VL, Qwen3.5.
"""
import json
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import send
from relations import MODALITIES

TURN = "<|im_start|>"
END = "<|im_end|>"
UNKNOWN = "<unk>"                 # a word that the tokenizer of a judge trained from scratch does not know
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SYSTEM = ("你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
          "多模态大语言模型。")
FULL = "full_attention"              # transformers' name of layers in which a token attends to all before it


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Every family has hidden_states (below). A family's class adds:

    internvl_files                     True: vlm.py renames the tensors of its files; False: transformers opens them
    tile_shape(config)                 side of the square tile in px, number of image tokens
    see(network, pixels)               features of normalised photos (N, 3, S, S): tokens (N, L_img, D), and a list of
                                       (N * L_img, D) that are added in the first layers
    project(network, tokens)           these tokens as embeddings of the language model
    positions(head, image_id, device)  position ids of the head's tokens (1 or 3, L), and the next free position
    generate_inputs(network, pixels, ids)   dict of the image as `generate` takes it
    vision_tower(network)              the module that encodes images
    """

    system: str      # text of the system turn ("": none)
    opening: str     # before the image
    image: str       # one image token, repeated
    closing: str     # between image and question
    pixels: tuple    # mean, std
    size: int = 0    # px, side of the tile where config.json does not fix it
    answer: str = ""           # what the chat format writes at the start of the assistant's turn
    packed: bool = True        # False: layers carry a state along the sequence, which holds one question then
    linears: tuple = ()        # names of linear layers of such layers, which get adapters too

    def hidden_states(self, network, features, ids, position, mask):
        """Last hidden states (N, L, D) of sequences with one image each.

        features  of `see`
        ids (N, L); position (1 or 3, N, L)
        mask      bool: (N, L), True for a token that is no padding; or (N, 1, L, L), True where a token attends to
                  another; None: no padding, and each token attends to those before it
        """
        core = network.model
        is_image = ids == network.config.image_token_id
        tokens, extra = features
        tokens = self.project(network, tokens)
        embeds = core.get_input_embeddings()(ids).to(tokens.dtype)
        tokens = tokens.reshape(len(ids), -1, tokens.shape[-1])                 # (N, L_img, D), side by side in ids
        column = is_image.int().argmax(1, keepdim=True) + torch.arange(tokens.shape[1], device=ids.device)
        embeds = embeds.index_put((torch.arange(len(ids), device=ids.device)[:, None], column), tokens)
        deep = dict(visual_pos_masks=is_image, deepstack_visual_embeds=extra) if extra else {}
        kinds = getattr(core.language_model.config, "layer_types", None) or ()
        if mask is None and set(kinds) == {FULL}:
            mask = {FULL: None}                                                 # else positions are read on the host
        elif mask is not None and mask.ndim == 2:
            mask = mask.long()
        return core.language_model(
            inputs_embeds=embeds, position_ids=position[0] if len(position) == 1 else position, use_cache=False,
            attention_mask=mask, **deep).last_hidden_state


class InternVL(Family):
    """InternVL: a tile fixed by the position table, features before the projector, one position per token."""

    internvl_files = True

    def tile_shape(self, config):
        """See Family. raises ValueError: not square."""
        height, width = config.vision_config.image_size
        if height != width:
            raise ValueError(f"judge.Judge: got image size {height} x {width}; want a square tile")
        return height, config.image_seq_length

    def see(self, network, pixels):
        """See Family; no features for the first layers."""
        core = network.model
        tokens = core.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        n = int(tokens.shape[1] ** 0.5)
        return core.pixel_shuffle(tokens.unflatten(1, (n, n)), network.config.downsample_ratio).flatten(1, 2), []

    def project(self, network, tokens):
        """See Family."""
        return network.model.multi_modal_projector(tokens)

    def positions(self, head, image_id, device):
        """See Family: (1, L)."""
        return torch.arange(len(head), device=device)[None], len(head)

    def generate_inputs(self, network, pixels, ids):
        """See Family."""
        return dict(pixel_values=pixels)

    def vision_tower(self, network):
        """See Family."""
        return network.model.vision_tower


class QwenVL(Family):
    """Qwen2.5-VL, Qwen3-VL and Qwen3.5: any tile, pixels in patches, positions of time, row and column."""

    internvl_files = False

    def tile_shape(self, config):
        """See Family: the largest multiple of a merged patch within the row's size."""
        vision = config.vision_config
        side = self.size // vision.patch_size // vision.spatial_merge_size
        return side * vision.patch_size * vision.spatial_merge_size, side**2

    def see(self, network, pixels):
        """See Family."""
        patches, grid = patchify(pixels, network.config.vision_config)
        out = network.model.get_image_features(patches, image_grid_thw=grid)
        extra = [x if torch.is_tensor(x) else torch.cat(x)                      # older transformers does not split it
                 for x in getattr(out, "deepstack_features", None) or ()]
        return torch.stack(list(out.pooler_output)), extra

    def project(self, network, tokens):
        """See Family: nothing, since `see` has projected them."""
        return tokens

    def positions(self, head, image_id, device):
        """See Family: (3, L) of time, row, column. After the image they continue at its first position + its side."""
        n = len(head)
        is_image = torch.tensor(head, device=device) == image_id
        start = int(is_image.int().argmax())
        count = int(is_image.sum())
        side = math.isqrt(count)
        place = torch.arange(count, device=device)
        position = torch.arange(n, device=device)[None]
        position = position.repeat(3, 1) - (position > start) * (count - side)
        position[:, is_image] = start + torch.stack((place * 0, place // side, place % side))
        return position, n - count + side

    def generate_inputs(self, network, pixels, ids):
        """See Family."""
        patches, grid = patchify(pixels, network.config.vision_config)
        return dict(pixel_values=patches, image_grid_thw=grid,
                    mm_token_type_ids=(ids == network.config.image_token_id).int())

    def vision_tower(self, network):
        """See Family."""
        return network.model.visual


HALF = ((0.5,) * 3, (0.5,) * 3)
DELTA_NET = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
FAMILIES = {  # model_type: row. The judge compares the answer words of relations.MODALITIES in every family
    "internvl": InternVL(SYSTEM, "<img>", "<IMG_CONTEXT>", "</img>\n", IMAGENET),
    "qwen2_5_vl": QwenVL("You are a helpful assistant.", *QWEN, CLIP, 504),
    "qwen3_vl": QwenVL("", *QWEN, HALF, 512),
    "qwen3_5": QwenVL("", *QWEN, HALF, 512, "<think>\n\n</think>\n\n", packed=False, linears=DELTA_NET),
}
NO_JUDGES = {  # model_type: why no row describes it
    "gemma4": "its layers differ in whether the tokens of an image see each other, and its patches come with positions",
    "molmo2": "its photos are cut in overlapping tiles whose features are added to the text, by a processor that needs "
              "torchvision",
}


def patchify(pixels, vision):
    """Normalised pixels (N, 3, S, S) -> Qwen-VL's patches (N * n^2, 3 * T * p * p), merged cells side by side, and
    grid (N, 3) of time, rows, columns."""
    p = vision.patch_size
    merge = vision.spatial_merge_size
    T = vision.temporal_patch_size
    N, C, S, _ = pixels.shape
    n = S // p
    x = pixels.reshape(N, C, n // merge, merge, p, n // merge, merge, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x[..., None, :, :].expand(*x.shape[:6], T, p, p)                        # (N, gh, gw, mh, mw, C, T, p, p)
    return x.reshape(N * n * n, C * T * p * p), torch.tensor([[1, n, n]] * N, device=pixels.device)


class Prompt:
    """The prompt as token ids, and the sequences made of it.

    head       list: system turn, user turn, image
    asked      dict modality -> list: its question and the opening of the assistant's turn (Family.answer included)
    blocks     dict modality -> list: `asked` and the words that both answers share
    answers    dict modality -> [first, second]: the tokens of the two deciding words
    sentences  dict modality -> the two lists that follow `asked` in training: a whole answer and its end mark

    text       True: a tokenizer may split a deciding word into tokens; that modality is then missing in `answers` and
               `sentences`, and the judge must be asked for text
    raises     ValueError when the tokenizer splits a mark of the chat format, the image token or a deciding word, or
               does not know a question
    """

    def __init__(self, tokenizer, system, family, image_tokens, text=False):
        def encode(words):
            return tokenizer(words, add_special_tokens=False).input_ids

        self.family = family
        self.image_id = tokenizer.convert_tokens_to_ids(family.image)
        marks = (family.image, family.opening, family.closing.rstrip("\n"), TURN, END, *family.answer.split())
        for mark in marks:
            number = tokenizer.convert_tokens_to_ids(mark)
            if encode(mark) != [number] or number == getattr(tokenizer, "unk_token_id", None):
                raise ValueError(f"judge: the tokenizer does not know {mark!r} as one token; want that of a "
                                 "vision-language model, with tokenizer_config.json")
        turn = f"{TURN}system\n{system}{END}\n" if system else ""
        self.head = encode(f"{turn}{TURN}user\n{family.opening}{family.image * image_tokens}{family.closing}")
        self.asked = {}
        self.blocks = {}
        self.answers = {}
        self.sentences = {}
        for name, m in MODALITIES.items():
            question = f"{m.question}{END}\n{TURN}assistant\n{family.answer}"
            self.asked[name] = encode(question)
            if tokenizer.convert_tokens_to_ids(UNKNOWN) in self.asked[name]:
                raise ValueError(f"judge: the tokenizer does not know all words of {m.question!r}; want a judge that "
                                 f"was trained on {name!r}")
            self.blocks[name] = block = encode(question + m.prefix)
            full = [encode(f"{question}{sentence}{END}") for sentence in m.answers]
            words = [encode(question + m.prefix + (" " if m.prefix else "") + word) for word in m.words]
            if any(word[:-1] != block or whole[:len(block) + 1] != word
                   for word, whole in zip(words, full, strict=True)):
                if text:
                    continue
                raise ValueError(f"judge: the answers {m.words} are not one token each for {name!r}; "
                                 "want a tokenizer that keeps them whole; ask that model for text (--text)")
            self.answers[name] = [word[-1] for word in words]
            self.sentences[name] = [whole[len(self.asked[name]):] for whole in full]

    def key(self):
        """The prompt as bytes, for digests."""
        return json.dumps([self.head, self.blocks, self.answers]).encode()

    def check_model(self, network):
        """Compare the tokens with those that a network knows. raises ValueError: it is not their network."""
        rows = network.get_input_embeddings().weight.shape[0]
        if network.config.image_token_id != self.image_id:
            raise ValueError(f"judge: the tokenizer gives {self.family.image!r} the number {self.image_id}, "
                             f"config.json {network.config.image_token_id}; want the tokenizer of that model")
        largest = max(max(part) for part in (self.head, *self.blocks.values(), *self.answers.values()))
        if largest >= rows:
            raise ValueError(f"judge: the tokenizer gives token {largest} to a model that knows {rows}; "
                             "want the tokenizer of that model")

    def words(self, modalities, device):
        """The tokens of the deciding words: (M, 2), first answer first."""
        return send(torch.tensor([self.answers[m] for m in modalities]), device)

    def answer_values(self, values, modalities):
        """What stands at the deciding words: (N, M, vocab) -> (N, M, 2) fp32, first answer first."""
        return values.float().gather(-1, self.words(modalities, values.device).expand(len(values), -1, -1))

    def compare_answers(self, head, hidden, modalities):
        """Difference of the two answer logits, positive = first answer: hidden (N, M, D) -> (N, M).

        head    nn.Linear to the whole vocabulary. Only the rows of the words are multiplied, in fp32 whatever its
                precision: 16-bit logits of size 20 lie 0.125 apart
        """
        words = self.words(modalities, hidden.device).flatten()                 # (2M,)
        bias = None if head.bias is None else head.bias[words].float()
        with torch.autocast(hidden.device.type, enabled=False):
            values = F.linear(hidden.float(), head.weight[words].float(), bias)             # (N, M, 2M)
        first, second = values.unflatten(-1, (-1, 2)).diagonal(dim1=1, dim2=2).unbind(1)    # each (N, M)
        return first - second

    def __len__(self):
        """Number of tokens of the head and all questions."""
        return len(self.head) + sum(map(len, self.blocks.values()))

    def pack(self, modalities, device):
        """One sequence with the image and every question: ids (L,), positions (1 or 3, L), mask (L, L), last (M,).

        A question attends to the head and to itself. Its positions continue from the head, as if it came first.
        """
        position, start = self.family.positions(self.head, self.image_id, device)
        ids = list(self.head)
        positions = [position]
        block = [-1] * len(self.head)
        last = []
        for k, name in enumerate(modalities):
            ids += self.blocks[name]
            here = start + torch.arange(len(self.blocks[name]), device=device)
            positions.append(here.expand(len(position), -1))
            block += [k] * len(self.blocks[name])
            last.append(len(ids) - 1)
        block = send(torch.tensor(block), device)
        sees = (block[None] == -1) | (block[None] == block[:, None])            # the head and the token's own question
        sees &= torch.ones(len(ids), len(ids), dtype=torch.bool, device=device).tril()
        return send(torch.tensor(ids), device), torch.cat(positions, 1), sees, send(torch.tensor(last), device)

    def pad(self, tails, device):
        """Sequences head + tail, padded on the left: ids (N, L), positions (1 or 3, N, L), mask (N, L)."""
        head, start = self.family.positions(self.head, self.image_id, device)
        length = max(map(len, tails))
        ids = send(torch.tensor([[0] * (length - len(t)) + self.head + t for t in tails]), device)
        pad = send(torch.tensor([[length - len(t)] for t in tails]), device)    # (N, 1)
        place = torch.arange(ids.shape[1], device=device) - pad
        follow = (start + torch.arange(length, device=device)).expand(len(head), -1)
        return ids, torch.cat((head, follow), 1)[:, place.clamp_min(0)], place >= 0


def read_answer(text, modality):
    """The answer in a generated sentence: 1.0 the first, 0.0 the second, 0.5 neither. Only official wording counts."""
    m = MODALITIES[modality]
    for value, word in zip((1.0, 0.0), m.words, strict=True):
        if f"{_plain(text)} ".startswith(_plain(f"{m.prefix} {word}") + " "):
            return value
    return 0.5


def _plain(text):
    return re.sub(r"\W+", " ", text).strip().lower()
