"""Point-pair relations: the language in which a judge and a predictor can disagree (ReasonX sec. 3).

A pair is two pixels of one photo, red and green. The judge answers a question about the pair from the photo;
`relation` answers the same question from a predicted map. Its sign decides labels for the judge, accuracies and the
hard rewards. The soft rewards (kernels/pair_reward.py) use the margin itself.

    margin  m(p) > 0: red wins / same; m(p) < 0: green wins / different
    nearer    (z_green - z_red) / range of the map          depth
    facing    (n_z,red - n_z,green) / 2                     normal
    brighter  luma_red - luma_green (sRGB-encoded)          irradiance
    same      0.05 - |rgb_red - rgb_green|_2 (encoded)      albedo: a yes/no question, which has no dead zone
    more      red - green of a map with one channel

Conventions owned here: pts (..., P, 2, 2) integer pixels, [..., 0, :] red, [..., 1, :] green, last axis (row, col).
Camera frame: x right, y up, z toward the camera. Depth is planar z, smaller is closer, up to scale and shift.
Colour: sRGB-encoded in [0, 1] wherever a docstring does not say linear; `srgb_encode` and `srgb_decode` convert.
Source: ReasonX (arXiv 2512.04222); questions, answers, marker and distance bands as in its released judge.
"""
import math
import re
from dataclasses import dataclass
from os.path import commonprefix

import torch
import torch.nn.functional as F

LUMA = (0.299, 0.587, 0.114)      # Rec. 601 weights, on encoded values as in the judge's training data
SAME_ALBEDO = 0.05                # RGB distance (sRGB-encoded) under which two points share a base colour
REFERENCE = 512                   # px: markers and distances below are stated at this image size
MARGIN = 30                       # px at 512: points keep this distance from the border
BANDS = ((20, 20, 40), (30, 50, 80), (60, 100, 150), (120, 200, 280), (220, 300, 350))  # px: lower in [a, b], upper c
RADIUS, LINE, DOT = 5.0, 1.0, 1.0  # px at 512: marker ring radius, half line width, centre radius
SMALLEST_MARKER = 0.4             # the marker stops shrinking here (a 2 px ring), or it would be invisible
RED, GREEN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Modality:
    """One row of the modality table: all that is special about a modality (docs/extend.md)."""

    kind: str            # of map: distance (up to scale and shift), vector (unit), colour (sRGB-encoded), scalar [0, 1]
    rule: str            # how two points are compared, one of RULES
    dead: float          # |margin| below this is no answer (relation 0)
    tau: float           # softness: tanh(margin / tau) of the truth fits a judge's 2p - 1 on `broad` validation scenes
    encoding: str        # unit, colour space, axes
    question: str
    answers: tuple       # full sentences of the judge's training data; the first means relation +1, the second -1
    white: bool = False  # exploration noise is white: it asks about fine differences, which coarse noise drowns
    seen_on: str = ""    # colour map without which it cannot be seen: scenes ask nothing where that is black

    @property
    def channels(self):
        """Channels of the map."""
        return 1 if self.kind in ("distance", "scalar") else 3

    @property
    def yes_no(self):
        """Its question is yes/no: swapping the colours keeps the answer, and every pair has one."""
        return self.rule == "same"

    @property
    def prefix(self):
        """Words that both answers begin with; "" where the first word decides."""
        return commonprefix(self.answers).rstrip()

    @property
    def words(self):
        """The two words that decide, in the order (+1, -1)."""
        return tuple(re.match(r"\w+", a[len(self.prefix):].lstrip()).group() for a in self.answers)


def _red_green(sentence):
    return sentence.format("red"), sentence.format("green")


MODALITIES = {
    "depth": Modality(
        "distance", "nearer", 0.02, 0.4, "planar z up to scale and shift, 0 near, 1 far",
        "Looking at this image, which colored point appears to be closer to the camera - red or green?",
        _red_green("Based on visual depth cues in the image, the {} point appears closer to the camera.")),
    "normal": Modality(
        "vector", "facing", 0.02, 0.5, "unit vectors in [-1, 1]: x right, y up, z toward the camera",
        "Which point has a surface more facing towards the camera, red or green?",
        _red_green("The {} point has a surface more facing towards the camera.")),
    "albedo": Modality(
        "colour", "same", 0.0, 0.05, "sRGB-encoded, [0, 1]",
        "Do the red and green points have the same base color?",
        ("Yes, the red and green points have similar base colors.",
         "No, the red and green points have different base colors."), white=True),
    "irradiance": Modality(
        "colour", "brighter", 0.02, 0.25, "sRGB-encoded, [0, 1], divided by the brightest value of the image",
        "Which point is more illuminated?",
        _red_green("The {} point is more illuminated."), seen_on="albedo"),
}
NAMES = tuple(MODALITIES)         # in the order of a judge's probabilities


def check_points(name, pts, size):
    """Refuse points (..., 2) outside an (H, W) image: ValueError. On a GPU this waits for it, once."""
    if pts.numel():
        low, high = torch.stack(pts.reshape(-1, 2).aminmax(dim=0)).tolist()
        if min(low) < 0 or high[0] >= size[0] or high[1] >= size[1]:
            raise ValueError(f"{name}: got points from {low} to {high}, want 0 <= row < {size[0]}, "
                             f"0 <= col < {size[1]}")


def srgb_encode(x):
    """Linear light to sRGB-encoded, both [0, 1] (IEC 61966-2-1, piecewise); any shape."""
    return torch.where(x <= .0031308, 12.92 * x, 1.055 * x.clamp(min=.0031308) ** (1 / 2.4) - .055)


def srgb_decode(x):
    """sRGB-encoded to linear, both [0, 1]; inverse of srgb_encode."""
    return torch.where(x <= .04045, x / 12.92, ((x.clamp(min=.04045) + .055) / 1.055) ** 2.4)


def _channels(maps, pts, window):
    """Values at points of each channel of maps (..., C, H, W): a list of C tensors (..., P, 2)."""
    C, H, W = maps.shape[-3:]
    index = torch.add(pts[..., 1], pts[..., 0], alpha=W)                        # (..., P, 2) in a plane
    if window:
        pooled = F.avg_pool2d(maps.reshape(-1, C, H, W), 2 * window + 1, 1, window, count_include_pad=False)
        maps = pooled.view(maps.shape)
    if maps.ndim > 3:                                                           # and in which map
        index = index + torch.arange(0, maps.numel(), C * H * W, device=maps.device).view(*maps.shape[:-3], 1, 1)
    return [maps.flatten()[c * H * W:].index_select(0, index.flatten()).view(index.shape) for c in range(C)]


def at_points(maps, pts, window=0):
    """Read map values at points: one pixel (paper), or the mean of a (2*window+1)^2 window cut at the border.

    maps     (..., C, H, W)   leading axes broadcast against those of pts
    pts      (..., P, 2, 2)   integer (row, col) inside the map (check_points)
    returns  (..., P, 2, C)   non-finite pixels make a non-finite value
    """
    return torch.stack(_channels(maps, pts, window), -1)


def finite_range(maps):
    """Largest minus smallest finite value of each map: (..., C, H, W) -> (...,); 0 where nothing is finite."""
    flat = maps.flatten(-3)
    ok = flat.isfinite()
    high = flat.masked_fill(~ok, -torch.inf).amax(-1)
    low = flat.masked_fill(~ok, torch.inf).amin(-1)
    return torch.where(ok.any(-1), high - low, 0.0)


def _gaps(maps, pts, window):
    return [value[..., 0] - value[..., 1] for value in _channels(maps, pts, window)]       # C tensors (..., P)


def _more(maps, pts, window):
    return _gaps(maps, pts, window)[0]


def _nearer(maps, pts, window):
    gap = -_more(maps, pts, window)
    ok = gap.isfinite()                                                         # keeps NaN out of the others' gradient
    return torch.where(ok, torch.where(ok, gap, 0.0) / finite_range(maps)[..., None].clamp_min(1e-12), torch.nan)


def _facing(maps, pts, window):
    return _more(maps[..., 2:, :, :], pts, window) / 2                          # n_z, toward the camera


def _brighter(maps, pts, window):
    gap = torch.stack(_gaps(maps, pts, window), -2).mT                          # (..., P, C)
    return gap @ torch.stack([gap.new_full((), w) for w in LUMA])              # made there: a GPU is not waited for


def _same(maps, pts, window):
    return SAME_ALBEDO - torch.linalg.vector_norm(torch.stack(_gaps(maps, pts, window), -2).mT.contiguous(), dim=-1)


RULES = dict(nearer=_nearer, facing=_facing, brighter=_brighter, same=_same, more=_more)


def margin(maps, pts, modality, window=0):
    """Signed, differentiable margin by which red wins (formulas in the module docstring).

    maps     (..., C, H, W)  in the modality's encoding;  pts (..., P, 2, 2)
    returns  (..., P)        NaN where a point is not finite
    raises   ValueError      wrong number of channels, unknown modality, points outside the map
    """
    if modality not in MODALITIES:
        raise ValueError(f"relations.margin: got modality {modality!r}; want one of {', '.join(MODALITIES)}")
    row = MODALITIES[modality]
    if maps.shape[-3] != row.channels:
        raise ValueError(f"relations.margin: got {maps.shape[-3]} channels for {modality!r}; want {row.channels}")
    check_points("relations.margin", pts, maps.shape[-2:])
    return RULES[row.rule](maps, pts, window)


def relation(maps, pts, modality, window=0):
    """Answer the modality's question from a map (g_m of ReasonX).

    maps     (..., C, H, W)  in the modality's encoding: depth planar z, vectors as given, colours sRGB-encoded [0, 1]
    pts      (..., P, 2, 2)  integer (row, col), red first
    window   radius in px of the mean that is read at a point (paper: 0, one pixel)
    returns  int8 (..., P)   +1 red wins / same, -1 green wins / different, 0 dead zone or not finite
    """
    return harden(margin(maps, pts, modality, window), MODALITIES[modality])


def harden(m, row):
    """Relation that a margin means in a row of the table: int8 of its shape."""
    wins = (m >= row.dead) & (m < torch.inf)
    loses = (m <= -row.dead) & (m > -torch.inf)
    if row.yes_no:
        wins &= m > 0                                                           # distance 0.05 is "different"
    return wins.to(torch.int8) - loses.to(torch.int8)


def _round_points(pts, grid):
    """Round (..., 2) float points to integer pixels, or to the centres of grid x grid cells."""
    if grid == 1:
        return pts.round().long()
    return pts.div(grid).floor().long() * grid + grid // 2


def sample_pairs(batch, size, n, generator, mask=None, grid=1, tries=24):
    """Draw point pairs at the released judge's five distance bands (each equally likely).

    size       (H, W) px; distances and the border margin scale with min(H, W) / 512
    generator  decides the device: all is drawn and returned there
    mask       (B, 1, H, W) bool, True = may be drawn; grid > 1 snaps points to the centres of grid x grid cells
    returns    pts (B, n, 2, 2) int64, the two points of a pair always differ
    raises     ValueError when an image has fewer than two pixels to choose from
    A pair that meets no band after `tries` draws (tiny images, thin masks) is drawn from all allowed pixels.
    """
    with generator.device:
        return _sample_pairs(batch, size, n, generator, mask, grid, tries)


def _sample_pairs(batch, size, n, generator, mask, grid, tries):
    H, W = size
    scale = min(H, W) / REFERENCE
    border = min(MARGIN * scale, (min(H, W) - 1) / 4)
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask.to(generator.device)
    allowed = allowed.expand(batch, 1, H, W)
    cell = torch.zeros(H, W, dtype=torch.bool)
    cell[grid // 2::grid, grid // 2::grid] = True
    allowed = (allowed[:, 0] & cell).flatten(1)                                 # (B, H*W)
    cells = len(range(grid // 2, H, grid)) * len(range(grid // 2, W, grid))
    if batch and (cells if mask is None else allowed.sum(1).min()) < 2:
        raise ValueError(f"relations.sample_pairs: got an image of {H} x {W} px with fewer than two valid points; "
                         "want at least two; use a larger image or another mask")
    bands = torch.tensor(BANDS, dtype=torch.float32) * scale
    a, b, c = bands[torch.randint(len(BANDS), (batch, n), generator=generator)].unbind(-1)
    u = torch.rand(2, batch, n, generator=generator)
    low = a + (b - a) * u[0]
    distance = (low + (c - low) * u[1])[..., None, None]                        # (B, n, 1, 1)
    extent = torch.tensor([H, W], dtype=torch.float32)
    red = border + (extent - 1 - 2 * border) * torch.rand(batch, n, tries, 2, generator=generator)
    angle = 2 * torch.pi * torch.rand(batch, n, tries, generator=generator)
    green = red + distance * torch.stack((angle.sin(), angle.cos()), -1)
    inside = ((green >= border) & (green <= extent - 1 - border)).all(-1)
    last = extent.long() - 1
    red, green = (torch.minimum(_round_points(p, grid).clamp_min(0), last) for p in (red, green))
    index = (torch.stack((red, green), -2) * torch.tensor([W, 1])).sum(-1)      # (B, n, tries, 2)
    valid = allowed.gather(1, index.flatten(1)).view(index.shape).all(-1) & inside & (index[..., 0] != index[..., 1])
    first = valid.to(torch.int8).argmax(-1)                                     # (B, n)
    index = index.gather(2, first[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    inner = torch.zeros(H, W, dtype=torch.bool)
    inner[math.ceil(border):H - math.ceil(border), math.ceil(border):W - math.ceil(border)] = True
    for image, pair in (~valid.any(-1)).nonzero().tolist():
        choice = allowed[image] & inner.flatten()
        index[image, pair] = torch.multinomial((choice if choice.sum() > 1 else allowed[image]).float(), 2,
                                               generator=generator)
    return torch.stack((index // W, index % W), -1)                             # (B, n, 2, 2)


def marker_size(size):
    """Ring radius, half line width and centre radius (px) of the marker in an image of size (H, W)."""
    scale = max(min(size) / REFERENCE, SMALLEST_MARKER)
    return RADIUS * scale, LINE * scale, DOT * scale


def marker_masks(size, pts):
    """Pixels of the two markers: bool (B, P, 2, H, W), a hollow ring and a filled centre each."""
    H, W = size
    radius, line, dot = marker_size(size)
    row = torch.arange(H, device=pts.device)[:, None] - pts[..., 0, None, None]  # (B, P, 2, H, 1)
    col = torch.arange(W, device=pts.device) - pts[..., 1, None, None]           # (B, P, 2, 1, W)
    dist = (row.square() + col.square()).float().sqrt()
    return ((dist - radius).abs() <= line) | (dist <= dot)


def draw_markers(rgb, pts):
    """Draw a red and a green marker for every pair on its own copy of the photo.

    rgb      (B, 3, H, W)     sRGB-encoded [0, 1]
    pts      (B, P, 2, 2)     integer (row, col); where the two markers overlap, green is on top
    returns  (B, P, 3, H, W)
    """
    masks = marker_masks(rgb.shape[-2:], pts)                                   # (B, P, 2, H, W)
    marked = rgb[:, None].expand(-1, pts.shape[1], -1, -1, -1)
    for i, colour in enumerate((RED, GREEN)):
        marked = torch.where(masks[:, :, i, None], torch.stack([rgb.new_full((1, 1), c) for c in colour]), marked)
    return marked
