"""How a vision-language network is asked: marked photos and the prompt in, what it thinks of the deciding words out.

The questions of all modalities are packed behind one image: one vision pass, one image prefix, the questions blind to
each other (position ids restart after the image). A network with recurrent layers reads one question a sequence
(Family.packed). Images are sRGB-encoded [0, 1], always one square tile, normalised and cut into patches by hand.
"""
import torch
import torch.nn as nn

from models.families import END, FAMILIES, Prompt
from relations import NAMES


class Reader(nn.Module):
    """A network of families.FAMILIES and its prompt.

    model   the network;  tokenizer  its own;  system  text of the system turn ("": none)
    text    True: as families.Prompt
    .size   px, side of the square photos
    """

    def __init__(self, model, tokenizer, system, text=False):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.family = FAMILIES[model.config.model_type]
        self.size, image_tokens = self.family.tile_shape(model.config)
        mean, std = self.family.pixels
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.prompt = Prompt(tokenizer, system, self.family, image_tokens, text)
        self.prompt.check_model(model)

    def vision(self, images, normalised=False):
        """Features of marked photos, (N, 3, S, S) sRGB in [0, 1]; normalised: by mean and std, already.

        returns  tokens (N, L_img, D), and a list of (N * L_img, D) that are added in the first layers (Family.see)
        """
        if tuple(images.shape[1:]) != (3, self.size, self.size):
            raise ValueError(f"reader.vision: got images {tuple(images.shape)}; want (N, 3, {self.size}, {self.size})")
        return self.family.see(self.model, images if normalised else self._normalise(images))

    def _normalise(self, images):
        return ((images - self.mean) / self.std).to(self.model.dtype)

    def hidden(self, images, modalities=NAMES, features=None):
        """Last hidden states at the deciding token of every question, the image seen once.

        images    (N, 3, S, S) marked sRGB [0, 1], S = self.size
        features  output of `vision` if it was already computed
        returns   (N, M, D)
        """
        features = self.vision(images) if features is None else features
        N = len(features[0])
        if len(modalities) == 1 or not self.family.packed:                      # a plain causal mask is faster
            return torch.stack([self.prefill(images, (m,) * N, features) for m in modalities], 1)
        ids, position, sees, last = self.prompt.pack(modalities, features[0].device)
        position = position[:, None].expand(-1, N, -1)
        sees = sees.expand(N, 1, -1, -1)
        return self.family.hidden_states(self.model, features, ids.expand(N, -1), position, sees)[:, last]

    def logits(self, images, modalities=NAMES, features=None):
        """Logits of the whole vocabulary at the deciding tokens, for training: as `hidden`, (N, M, vocab)."""
        return self.model.lm_head(self.hidden(images, modalities, features))

    def prefill(self, images, modalities, features=None):
        """The plain form of `hidden`: one question (of N) per image, one prefill, padded on the left -> (N, D)."""
        features = self.vision(images) if features is None else features
        ids, position, mask = self.prompt.pad([self.prompt.blocks[m] for m in modalities], features[0].device)
        mask = None if len(set(modalities)) == 1 else mask
        return self.family.hidden_states(self.model, features, ids, position, mask)[:, -1]

    def decide(self, images, modalities=NAMES, features=None):
        """Difference of the two answer logits, fp32: as `hidden`, (N, M), positive = first answer."""
        return self.prompt.compare_answers(self.model.lm_head, self.hidden(images, modalities, features), modalities)

    @torch.no_grad()
    def say(self, images, modality, tokens=40):
        """The answer as generated text, greedily: (N, 3, S, S) -> list of N strings. Slow; only to check `score`."""
        ids = torch.tensor([self.prompt.head + self.prompt.asked[modality]], device=images.device)
        ids = ids.expand(len(images), -1)
        given = self.family.generate_inputs(self.model, self._normalise(images), ids)
        end = self.tokenizer.convert_tokens_to_ids(END)
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                                  do_sample=False, use_cache=True, eos_token_id=end, pad_token_id=end, **given)
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, ids.shape[1]:]]
