"""The MLLM judge: one marked photo, one question, the probability of the first answer (ReasonX sec. 3.1).

The answer is never generated as text. The prompt is extended by the words both answers share, and the logits
of the two words that can follow are compared (relations.MODALITIES):

    p = sigmoid(logit["red"] - logit["green"])        albedo: "Yes" against "No"

so no answer is unparsable and each comes with a confidence. How the network is run: models/reader.py, where the
questions of all modalities share one image. The network is one of transformers' own (families.FAMILIES), without its
processor. Whatever offers AnyJudge is a judge, a class of yours too.
Source: ReasonX (arXiv 2512.04222) and its released judge (questions, answers, prompt format).
"""
import math
from pathlib import Path
from typing import Protocol

import torch
import torch.nn as nn
from transformers.utils import logging

from data.orders import BothOrders, fill_banks
from data.photos import read_rgb, resize, square_points
from data.pictures import save_png
from data.teacher import MapsJudge
from kernels.draw_markers import mark_photos
from models import vlm
from models.families import FAMILIES, SYSTEM, Prompt, read_answer
from models.mini_judge import mini_network, mini_tokenizer
from models.reader import Reader
from models.served import ServedJudge
from relations import MODALITIES, NAMES, check_points, draw_markers
from runtime.command import run_command
from runtime.files import replace_files, write_json
from runtime.flags import Parser
from runtime.ranks import pick_device
from runtime.weights import RULES, open_own, read_spec

logging.disable_progress_bar()       # of loading and saving weights: errors stay one line
TOKENS = dict(cuda=2**16, cpu=2**12) # of the language model at a time in `ask`; of few, a CPU's cache holds the states
SCHEMES = {  # of a SPEC SCHEME:PLACE: makes a judge of PLACE, no network, at once
    "maps": MapsJudge, "http": ServedJudge, "https": ServedJudge,
}


class AnyJudge(Protocol):
    """What every judge offers, a class of yours too (docs/extend.md)."""

    size: int                # px, side of the square photos it is asked about
    grid: int                # px, it is asked about centres of grid x grid cells; 1: any pixel

    def ask(self, rgb, pts, names=None, modalities=None):
        """Probability (B, P, M) of the first answer about each pair, M = all of MODALITIES; see Judge.ask."""

    def digest(self):
        """A text that differs when its answers may: the judgement bank keys answers by it."""


class Judge(Reader):
    """A vision-language model that compares two marked points.

    model      a network of families.FAMILIES;  tokenizer  its own;  system  text of the system turn ("": none)
    grid       px, points it was trained on are centres of grid x grid cells (1: any pixel)
    origin     folder or hub id that its weights were read from; "": they live in memory
    text       True: answers are generated and read as text, for a network whose words cannot be scored
    """

    def __init__(self, model, tokenizer, system=SYSTEM, grid=1, origin="", text=False):
        super().__init__(model, tokenizer, system, text)
        self.grid = grid
        self.origin = origin
        self.text = text

    @torch.no_grad()
    def score(self, images, modality):
        """Probability of "red" (albedo: of "yes") for marked photos: (N, 3, S, S) -> (N,) float32."""
        if modality not in MODALITIES:
            raise ValueError(f"judge.score: got modality {modality!r}; want one of {', '.join(MODALITIES)}")
        if self.text:
            return torch.tensor([read_answer(x, modality) for x in self.say(images, modality)], device=images.device)
        return self.decide(images, (modality,))[:, 0].sigmoid()

    def _answers(self, rgb, pts, photo, asked):
        """Probability of the first answer: pairs (N, 2, 2) of the photos numbered (N,) -> (N, questions asked)."""
        if self.text:
            images = draw_markers(rgb[photo], pts[:, None])[:, 0]
            said = [[read_answer(x, m) for x in self.say(images, m)] for m in asked]
            return torch.tensor(said, device=images.device).T
        features = self.vision(mark_photos(rgb, pts, photo, self.mean, self.std, self.model.dtype), normalised=True)
        return self.decide(None, asked, features).sigmoid()

    @torch.no_grad()
    def ask(self, rgb, pts, names=None, modalities=None, batch=0):
        """Ask questions about every pair.

        rgb         (B, 3, S, S) unmarked sRGB [0, 1];  pts (B, P, 2, 2) in pixels of rgb
        names       photo paths or scene ids, which this judge does not read;  modalities  those wanted, None: all
        batch       marked photos at a time at most; 0: as many as make TOKENS tokens
        returns     (B, P, M) probability of the first answer, in the order of MODALITIES; NaN where not asked or, of
                    other judges, not known
        """
        B, P = pts.shape[:2]
        check_points("judge.ask", pts, rgb.shape[-2:])
        asked = tuple(m for m in NAMES if modalities is None or m in modalities)
        prob = torch.full((B * P, len(NAMES)), torch.nan, device=rgb.device)
        index = torch.tensor([NAMES.index(m) for m in asked], device=rgb.device)
        places = torch.arange(B * P, device=rgb.device)
        most = batch or max(1, TOKENS[rgb.device.type] // len(self.prompt))
        for part in places.tensor_split(-(-B * P // most)) if B * P else ():   # equal parts: none is small
            prob[part[:, None], index] = self._answers(rgb, pts.flatten(0, 1)[part], part // P, asked).float()
        return prob.view(B, P, len(NAMES))

    def digest(self):
        """Hex digest of weights, tokenizer and prompt: what the judgement bank keys its answers by."""
        start = self.prompt.key()
        return vlm.files_digest(self.origin, start) if self.origin else vlm.network_digest(self.model, start)

    def save(self, folder):
        """Write a native transformers folder (config.json, model.safetensors, tokenizer), judge.json last.

        Weights, adapter, tokenizer that lay there are removed.  raises  OSError: nothing in the folder has changed
        """
        replace_files(folder, self._write, last="judge.json", obsolete=vlm.files_of_a_judge(folder))

    def _write(self, folder):
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.save_about(folder)

    def save_about(self, folder):
        """Write judge.json: what config.json does not say."""
        write_json(Path(folder, "judge.json"), dict(system=self.system, grid=self.grid, size=self.size))


def load_judge(spec, device="cpu", dtype=None, size=0, text=False):
    """Open a judge by its SPEC (runtime.weights.Spec).

    A folder or hub id holds a mini judge, an InternVL chat model (merged or unmerged LoRA), a native model of
    models/families.py, or a PEFT adapter of one. Of SCHEMES and of a class of yours it is AnyJudge.

    dtype   of the weights; None: fp32 on a CPU, as stored (bf16 for the published ones) on a GPU
    size    px of the tile, if not the checkpoint's own (InternVL only)
    raises  FileNotFoundError, ValueError: one line that names the file or key
    """
    found = read_spec(spec, SCHEMES)
    if found.scheme:
        return SCHEMES[found.scheme](found.place)
    if found.module:
        judge = open_own(found, ("ask", "digest", "size", "grid"))
        return judge.to(device).eval() if isinstance(judge, nn.Module) else judge
    with vlm.refuse_damage(found.text):
        model, tokenizer, about = vlm.open_network(found.text, size)
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else None)
        model = model.to(device, dtype) if dtype else model.to(device)
        return Judge(model, tokenizer, **about, origin="" if size else found.text, text=text).to(device).eval()


def open_judge(spec, device="cpu"):
    """A judge whose weights are read at the first question, or one that is no network."""
    found = read_spec(spec, SCHEMES)
    return load_judge(spec, device) if found.module or found.scheme else LazyJudge(spec, device)


def build_mini_judge(sizes, rng):
    """A randomly initialised Judge of mini_judge.MiniSizes; the same rng seed gives the same weights."""
    tokenizer = mini_tokenizer()
    return Judge(mini_network(sizes, tokenizer, rng), tokenizer, system="", grid=sizes.patch)


class LazyJudge:
    """A judge on disk: size, grid and digest from its files; its weights are opened at the first question.

    A bank that knows every answer never opens it, so GRPO runs with no judge in memory.
    """

    def __init__(self, folder, device="cpu"):
        self.folder = str(folder)
        self.device = device
        self.opened = None
        with vlm.refuse_damage(folder):
            config, tokenizer, about = vlm.read_outline(folder)
            family = FAMILIES[config.model_type]
            self.size, image_tokens = family.tile_shape(config)
            self.grid = about["grid"]
            self.prompt = Prompt(tokenizer, about["system"], family, image_tokens)

    def digest(self):
        """As Judge.digest of the opened judge."""
        return vlm.files_digest(self.folder, self.prompt.key())

    def ask(self, rgb, pts, names=None, modalities=None):
        """As Judge.ask; opens the judge if that has not happened yet."""
        if self.opened is None:
            self.opened = load_judge(self.folder, self.device)
        return self.opened.ask(rgb, pts, names, modalities)


def arguments(argv):
    """Parse and check the command line."""
    p = Parser(prog="judge.py", allow_abbrev=False, description="Ask the judge to compare two points of a photo.")
    p.add_argument("image", metavar="IMAGE", help="a photo; with --bank a folder of photos")
    p.add_argument("--red", type=int, nargs=2, metavar=("X", "Y"), help="red point, pixels from the left and the top")
    p.add_argument("--green", type=int, nargs=2, metavar=("X", "Y"), help="green point")
    p.add_argument("--modality", choices=NAMES, default="depth", help="the question to ask [depth]")
    p.add_argument("--all", action="store_true", help="ask all questions")
    p.add_argument("--model", default="out/mini/judge", metavar="SPEC",
                   help=f"judge: {RULES}; or maps:DIR, a teacher's maps; or a server, http://HOST:PORT#MODEL "
                        "[out/mini/judge]")
    p.add_argument("--both-orders", action="store_true",
                   help="ask again with the colours exchanged: the mean is the answer, the difference the colour bias")
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
    if args.save and not args.save.lower().endswith(".png"):
        p.error(f"--save {args.save}: want a name that ends in .png")
    return p, args


def see_pair(judge, rgb, xy, device="cpu"):
    """What a judge is asked about two points of a photo of any shape: its square and the points there.

    rgb      (3, H, W) in [0, 1];  xy (2, 2) integers x, y inside it, red first
    returns  (1, 3, S, S), the photo resized whole, and pts (1, 1, 2, 2), for `ask`
    raises   ValueError: the two are one point to the judge
    """
    if isinstance(judge, MapsJudge):                                            # its maps are resized as the photo is
        judge.squeeze = True
    pts = square_points(xy.flip(-1), rgb.shape[-2:], judge.size, judge.grid)
    if pts[0].equal(pts[1]):
        raise ValueError(f"red and green are one point to the judge: it sees {judge.size} x {judge.size} px, in cells "
                         f"of {judge.grid}; want two farther apart")
    return resize(rgb, judge.size, judge.size)[None].to(device), pts.to(device)[None, None]


def describe_answer(modality, prob):
    """An answer as text; prob: probabilities of the first answer, in one order of the colours or in both."""
    mean = sum(prob) / len(prob)
    if math.isnan(mean):
        return "not known to this judge"
    answer = MODALITIES[modality].answers[0 if mean >= 0.5 else 1]
    known, *each = (f"{p if mean >= 0.5 else 1 - p:.3f}" for p in (mean, *prob))
    both = f"; {' as marked, '.join(each)} with the colours exchanged, colour bias {prob[0] - prob[-1]:+.3f}"
    return f"{answer} (p = {known}{both if len(prob) > 1 else ''})"


def main(argv=None):
    """Command line: one answer, or all, for two points of a photo; or a bank for a folder of photos."""
    p, args = arguments(argv)
    device = pick_device(args.device, "judge.py")
    if args.bank:
        judge = open_judge(args.model, device)
        bank = fill_banks(args.bank, args.image, judge, args.pairs, device, args.both_orders)
        print(f"bank: {bank.describe()}; {bank.folder}")
        return
    rgb = read_rgb(args.image)
    H, W = rgb.shape[-2:]
    for name in ("red", "green"):
        x, y = getattr(args, name)
        if not (0 <= x < W and 0 <= y < H):
            p.error(f"--{name} {x} {y} lies outside the {W} x {H} photo")
    judge = load_judge(args.model, device, text=args.text)
    if args.text:
        if not isinstance(judge, Judge):
            p.error(f"--text: {args.model} generates no text; want a vision-language model")
        judge.text = len(judge.prompt.answers) < len(MODALITIES)                # only where its words cannot be scored
    try:
        small, pts = see_pair(judge, rgb, torch.tensor([args.red, args.green]), device)
    except ValueError as error:
        p.error(str(error))
    marked = draw_markers(small, pts)[:, 0]
    if args.save:
        save_png(args.save, marked[0].cpu().numpy())
    asked = NAMES if args.all else (args.modality,)
    orders = BothOrders(judge).orders if args.both_orders else (judge,)
    prob = torch.stack([one.ask(small, pts, [args.image], asked)[0, 0] for one in orders], 1)   # (M, orders)
    for m in asked:
        print(f"{m}: {describe_answer(m, prob[NAMES.index(m)].tolist())}")
        if args.text:
            print(f"{m}, generated: {judge.say(marked, m)[0]}")


if __name__ == "__main__":
    run_command(main, "judge.py")
