"""Procedural scenes with exact intrinsic maps: a batched ray caster, no assets, no global randomness.

A scene is a box room with a ceiling, or a walled court under the sky, holding ellipsoids and boxes; one key
light (lamp or sun) with hard shadows; hemispheric ambient light; textures of flat colours. In linear light

    irradiance = ambient(n) + key * max(0, n.l) * visible * falloff      Lambertian, no bounces, no highlights
    rgb        = tonemap(albedo * irradiance, tone) [+ sensor noise]

Conventions owned here: world y up, metres; camera x right, y up, z toward the camera; depth is planar z.
All domains come from one function and one table of ranges (scene_table.py). `synthetic` trains the predictor. `wild`
gives GRPO photos without maps, and the evaluation. `broad` is domain-randomised for the judge: its ranges contain both
others, and its scenes are drawn independently.
Every number of scene i of a domain is a hash of (domain, i, number of the draw). So a scene has the same bits in any
batch on one device. Another device rounds differently, which can move an edge or a texture by a pixel.
"""
import math

import torch

from data.scene_table import DOMAINS, OUTDOOR, TABLE
from relations import srgb_decode, srgb_encode

SPLITS = {"train": 0, "val": 1 << 40, "test": 2 << 40}
SPLIT_IDS = 1 << 40

ROUND = 4                           # slots for ellipsoids; a scene uses some of them
BOXES = 6                           # slots for boxes
SLOTS = ROUND + BOXES               # surfaces: the slots, then the room's x-, x+, floor, ceiling, z-, z+
PLAIN, CHECKER, STRIPES, BLOTCHES = range(4)
INWARD = torch.eye(3).repeat_interleave(2, 0) * torch.tensor([1., -1.] * 3)[:, None]     # normals of the room
OPEN = 1e3                          # metres, height of a court, which has no ceiling
SUN = 1e3                           # metres, distance of the sun
CHUNK = {"cpu": 1 << 14, "cuda": 1 << 21}               # pixels rendered at once: fits a cache; fills a GPU, in 3 GB


def scene_ids(split, n, start=0):
    """Ids of n scenes of a split, (n,) int64; splits never overlap. ValueError on a split not in SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"scenes.py: split got {split!r}, want one of {', '.join(SPLITS)}")
    assert 0 <= start and start + n <= SPLIT_IDS, f"{n} scenes from {start} leave the id range of {split}"
    return torch.arange(n) + (SPLITS[split] + start)


def tonemap(linear, tone):
    """Expose, white-balance, clip, bend and encode.

    linear   (B, 3, H, W)  >= 0, any scale
    tone     (B, 5)        linear gain of r, g, b; gamma; contrast, the share of a smooth step in [-1, 1]
    returns  (B, 3, H, W)  sRGB-encoded, [0, 1]
    """
    tone = tone[:, :, None, None]
    x = srgb_encode((linear * tone[:, :3]).clamp(0, 1) ** tone[:, 3:4])
    return (x + tone[:, 4:] * (x * x * (3 - 2 * x) - x)).clamp(0, 1)


def hash_int64(x):
    """Hash int64 to int64, elementwise (the splitmix64 finaliser; int64 products wrap)."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


class Dice:
    """Numbered draws of a batch of scenes: `dice(*shape)` gives (B, *shape) floats in [0, 1)."""

    def __init__(self, domain, ids):
        self.key = hash_int64(hash_int64(ids + 1) + DOMAINS.index(domain) + 1)
        self.drawn = 0

    def hashes(self, n):
        """The next n draws as (B, n) int64."""
        self.drawn += n
        return hash_int64(self.key[:, None] + torch.arange(self.drawn - n + 1, self.drawn + 1) * -0x61C8864680B583EB)

    def __call__(self, *shape):
        return ((self.hashes(math.prod(shape)) >> 40 & 0xFFFFFF).float() / (1 << 24)).view(-1, *shape)


def rotation(yaw, pitch, roll):
    """(...) angles in radians to (..., 3, 3): Ry(yaw) Rx(pitch) Rz(roll), object or camera to world."""
    (cy, cx, cz), (sy, sx, sz) = ([f(a) for a in (yaw, pitch, roll)] for f in (torch.cos, torch.sin))
    rows = (cy * cz + sy * sx * sz, sy * sx * cz - cy * sz, sy * cx,
            cx * sz, cx * cz, -sx,
            cy * sx * sz - sy * cz, sy * sz + cy * sx * cz, cy * cx)
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def row_ranks(x):
    """Rank of each entry in its row, from 0: (B, n) to (B, n) int64; of random numbers it is a random permutation."""
    return x.argsort(dim=-1, stable=True).argsort(-1)


def apply_matrix(m, v):
    """Apply (..., 3, 3) to (..., 3, P). Sums of products: the rounding of a matmul may depend on the batch size."""
    return m[..., 0:1] * v[..., 0:1, :] + m[..., 1:2] * v[..., 1:2, :] + m[..., 2:3] * v[..., 2:3, :]


def place_camera(dice, s):
    """Add the room and a camera inside it, looking at the far wall: world frame, metres, radians."""
    yaw = dice(1) * 2 * math.pi
    pitch = s["pitch"].deg2rad()
    half_view = (s["fov"].deg2rad() / 2).tan()
    half_x, half_z = (torch.where(s["outdoor"], s["court_" + a], s["room_" + a]) for a in "xz")
    x = -yaw.sin()                                                              # horizontal heading
    z = -yaw.cos()
    to_wall = torch.minimum(half_x / x.abs().clamp(min=1e-6), half_z / z.abs().clamp(min=1e-6))
    back = s["back"] * to_wall
    eye = torch.where(s["outdoor"], s["court_eye"], s["room_eye"] * s["room_top"])
    reach = to_wall + back
    skyline = pitch + ((1 - 2 * s["sky"]) * half_view).atan()
    top = torch.where(s["outdoor"], eye + reach * skyline.clamp(max=1.2).tan(), s["room_top"]).clamp(min=0)
    ceiling = torch.where(s["outdoor"], OPEN, top)
    bounds = torch.cat([-half_x, 0 * top, -half_z, half_x, ceiling, half_z], -1).view(-1, 2, 3)
    s |= {"half_view": half_view, "camera": rotation(yaw, pitch, s["roll"].deg2rad())[:, 0],
          "position": torch.cat([-x * back, eye, -z * back], -1),
          "reach": reach, "top": top, "half": torch.cat([half_x, half_z], -1), "bounds": bounds}


def place_light(dice, s):
    """Add the key light, a point or (w = 0) a direction, and the colours of the key, sky and ground light."""
    azimuth = dice(1) * 2 * math.pi
    rise = s["sun"].deg2rad()
    around = torch.cat([azimuth.cos(), azimuth.sin()], -1)
    sun = torch.cat([rise.cos() * around[:, :1], rise.sin(), rise.cos() * around[:, 1:]], -1)
    out = s["half"] * s["lamp_out"] * around
    lamp = torch.cat([out[:, :1], s["lamp_up"] * s["top"], out[:, 1:]], -1)
    warmth = torch.tensor([.5, 0., -.8])
    key, sky = ((c + s["tint"] * (dice(3) * 2 - 1)).exp() for c in (s["warm"] * warmth, -s["cool"] * warmth))
    ground = sky * (.3 + .5 * dice(1)) * (s["warm"] * warmth * dice(1)).exp()
    s |= {"light": torch.where(s["outdoor"], SUN * sun, lamp), "key": key * (1 - s["ambient"]),
          "sky_light": sky * s["ambient"], "ground_light": ground * s["ambient"]}


def place_objects(dice, s):
    """Add SLOTS objects: each is placed on a ray into the view, above the floor; it rests on the floor or floats."""
    aim = (dice(SLOTS, 2) * 1.8 - .9) * s["half_view"][..., None]
    aim = torch.cat([aim, -torch.ones_like(aim[..., :1])], -1)
    aim = apply_matrix(s["camera"], aim.mT).mT * (s["reach"] * s["obj_place"])[..., None]              # (B, N, 3)
    aim = aim * (s["position"][:, 1:2] / (-aim[..., 1]).clamp(min=1e-6)).clamp(max=1)[..., None]
    distance = aim.norm(dim=-1)
    size = (s["obj_size"] * s["half_view"]).clamp(max=.42) * distance                           # (B, N)
    shape = dice(SLOTS, 3)
    squash = s["obj_squash"][..., None]
    slab = shape * torch.tensor([.8, 1.2, .1]) + torch.tensor([.7, .7, .06])
    is_slab = (dice(SLOTS) < s["slabs"]) & (torch.arange(SLOTS) >= ROUND)
    radii = torch.where(is_slab[..., None], slab, squash + (1 - squash) * shape) * size[..., None]
    rests = dice(SLOTS) < s["rest"]
    turn = (dice(SLOTS, 2) - .5) * math.pi * (~rests & (dice(SLOTS) < s["turned"]))[..., None]
    pose = rotation(dice(SLOTS) * 2 * math.pi, turn[..., 0], turn[..., 1])
    centre = s["position"][:, None] + aim
    low = radii[..., 1]
    centre[..., 1] = torch.where(rests, low, torch.maximum(centre[..., 1], low))
    # remove the objects beyond the drawn number, and those that touch the camera or the lamp
    inverse = pose.mT / radii[..., None]                                # world to unit sphere or cube
    ends = torch.stack([s["position"], s["light"]], -1)[:, None] - centre[..., None]
    gap = ((apply_matrix(inverse, ends).abs() - 1) * radii[..., None]).amax(-2).amin(-1)              # (B, N) metres
    gone = (gap < .06 * s["reach"]) | (row_ranks(dice(SLOTS)) >= s["objects"].long())
    centre = torch.where(gone[..., None], torch.tensor([0., -OPEN, 0.]), centre)
    s |= {"pose": pose, "radii": radii, "centre": centre, "inverse": inverse, "distance": distance}


def paint(dice, s):
    """Add a row of 17 numbers per surface, objects then room: pattern, grain (m), phase, stripe axis, three colours."""
    n = SLOTS + 6
    grain = torch.cat([s["distance"], .6 * s["reach"].expand(-1, 6)], -1) * s["half_view"]
    grain = grain * torch.cat([s["obj_grain"], s["obj_grain"][:, :6]], -1)
    pattern = torch.where(dice(n) < s["textured"], 1 + (dice(n) * 3).long(), PLAIN)
    axis = torch.nn.functional.normalize(dice(n, 3) * 2 - 1, dim=-1)
    # palette: neighbours in the list differ much in lightness; hues span a share of the circle
    level = (torch.tensor([0., 3., 1., 4., 2.]) + dice(5)) / 5
    value = s["darkest"] + (s["lightest"] - s["darkest"]) * level
    hue = dice(1) + s["hues"] * (torch.arange(5) * .382 + .2 * dice(5))
    wheel = ((hue[..., None] * 6 + torch.tensor([0., 4., 2.])) % 6 - 3).abs().sub(1).clamp(0, 1)
    saturation = s["saturation"] * (.5 + .5 * dice(5))
    palette = value[..., None] * (1 - saturation[..., None] * (1 - wheel))                      # (B, 5, 3)
    # first colours by rank, so that a view uses all colours about equally often
    first = torch.cat([row_ranks(dice(SLOTS)), row_ranks(dice(6))], -1)[..., None]
    pick = (first + torch.arange(3)) % s["colours"].long()[..., None]                           # (B, S, 3)
    colours = palette[torch.arange(len(pick))[:, None, None], pick].flatten(2)
    s["surface"] = torch.cat([pattern[..., None], grain[..., None], dice(n, 3) * 20, axis, colours], -1)


def draw_scene(domain, ids):
    """Draw scenes: their Dice, and a dict of TABLE's factors, (B, 1) or (B, SLOTS), and of all that is placed."""
    dice = Dice(domain, ids)
    column = DOMAINS.index(domain)
    s = {}
    for name, row in TABLE.items():
        lo, hi = row[column]
        s[name] = lo + (hi - lo) * dice(SLOTS if name.startswith("obj_") else 1)
    s["outdoor"] = dice(1) < OUTDOOR[domain]
    for add in (place_camera, place_light, place_objects, paint):
        add(dice, s)
    return dice, s


def make_rays(half_view, H, W):
    """Rays through the pixel centres, camera frame, z = -1: the ray parameter is the depth; (B, 3, H*W)."""
    y, x = torch.meshgrid((H - 1 - 2 * torch.arange(H)) / H, (2 * torch.arange(W) + 1 - W) / H, indexing="ij")
    xy = torch.stack([x, y]).flatten(1) * half_view[..., None]
    return torch.cat([xy, -torch.ones_like(xy[:, :1])], 1)


def enter(origin, ray):
    """Where rays enter the unit spheres (first ROUND slots) and unit cubes: ray parameter, inf for a miss.

    origin, ray  (B, N, 3, P) or broadcast, each in the object's own unit frame;  returns  (B, N, P)
    """
    o = origin[:, :ROUND]
    d = ray[:, :ROUND]
    a = (d * d).sum(2)                                                  # of a t^2 + 2 b t + c = 0
    b = (o * d).sum(2)
    c = (o * o).sum(2) - 1
    gap = b * b - a * c
    ball = torch.where(gap > 0, (-b - gap.clamp(min=0).sqrt()) / a, torch.inf)
    inv = 1 / (ray[:, ROUND:] + 1e-12)                                  # finite for a ray along a face
    middle = -origin[:, ROUND:] * inv
    width = inv.abs()
    near = (middle - width).amax(2)
    far = (middle + width).amin(2)
    t = torch.cat([ball, torch.where(near < far, near, torch.inf)], 1)
    return torch.where(t > 0, t, torch.inf)


def leave(bounds, origin, ray):
    """Where rays from inside leave the room: (t (B, P), surface number 0..5 (B, P)); rays (B, 3, P)."""
    side = (ray > 0).long()
    wall = torch.where(ray > 0, bounds[:, 1, :, None], bounds[:, 0, :, None])
    # abs, not a signed quotient: a ray along a wall has a component 0, and its distance to that wall must be +inf
    t, axis = ((wall - origin).abs() / ray.abs()).min(1)
    return t, 2 * axis + side.gather(1, axis[:, None])[:, 0]


def surface_albedo(surface, q, grain_px):
    """Albedo of points: flat colours, so that points of one colour have exactly the same albedo.

    surface   (B, P, 17)  rows of paint()
    q         (B, P, 3)   position in metres, in the axes of the object
    grain_px  (B, P)      px, the grain in a view of 32 px; a pattern finer than 2 px would alias and is not drawn
    returns   (B, P, 3)   sRGB-encoded, [0, 1]
    """
    pattern = surface[..., 0]
    g = q / surface[..., 1:2] + surface[..., 2:5]
    checker = g.floor().sum(-1) % 2
    stripes = (g * surface[..., 5:8]).sum(-1).floor() % 2
    wave = (1.9 * (g + 1.3 * (1.3 * g.roll(1, -1)).sin())).sin().sum(-1)
    blotch = (wave > .2).float() + (wave < -.9).float() * 2
    which = torch.where(pattern == CHECKER, checker, torch.where(pattern == STRIPES, stripes, blotch))
    which = torch.where((pattern == PLAIN) | (grain_px < 2), 0., which)[..., None]
    return torch.where(which == 0, surface[..., 8:11],
                       torch.where(which == 1, surface[..., 11:14], surface[..., 14:17]))


def trace(s, view):
    """Follow the camera's rays, (B, 3, P) with z = -1 in the camera frame, to the nearest surface.

    returns  depth (B, P), mask (B, P), number (B, P) of the surface, and in metres and world axes
             point (B, 3, P), normal (B, 3, P), local (B, P, 3): the point in the axes of its object
    """
    ray = apply_matrix(s["camera"], view)
    position = s["position"][..., None]
    t_room, wall = leave(s["bounds"], position, ray)
    is_sky = s["outdoor"] & (position[:, 1] + t_room * ray[:, 1] > s["top"])
    t_room = torch.where(is_sky, torch.inf, t_room)
    offset = position[:, None] - s["centre"][..., None]
    t_object, slot = enter(apply_matrix(s["inverse"], offset), apply_matrix(s["inverse"], ray[:, None])).min(1)
    is_object = t_object < t_room
    depth = torch.minimum(t_object, t_room)
    mask = depth < torch.inf
    point = position + torch.where(mask, depth, 1.)[:, None] * ray
    frame = torch.cat([s["pose"].flatten(2), s["radii"], s["centre"]], -1)
    frame = frame[torch.arange(len(slot))[:, None], slot]                                       # (B, P, 15)
    pose = frame[..., :9].unflatten(-1, (3, 3))
    radii = frame[..., 9:12]
    local = (pose * (point.mT - frame[..., 12:])[..., None]).sum(-2)
    unit = local / radii
    face = torch.where(unit.abs() >= unit.abs().amax(-1, keepdim=True), unit.sign(), 0.)
    normal = torch.where((slot < ROUND)[..., None], unit / radii, face)
    normal = torch.where(is_object[..., None], (pose * normal[..., None, :]).sum(-1), INWARD.to(wall.device)[wall])
    normal = torch.nn.functional.normalize(normal, dim=-1).mT
    local = torch.where(is_object[..., None], local, point.mT)
    return depth, mask, torch.where(is_object, slot, SLOTS + wall), point, normal, local


def illuminate(s, point, normal, depth):
    """Linear irradiance (B, 3, P), not normalised, of points (B, 3, P) with normals (B, 3, P), world axes."""
    start = point + normal * (1e-3 * depth)[:, None]                    # off the surface: it must not shadow itself
    to_light = s["light"][..., None] - ~s["outdoor"][..., None] * start
    distance = to_light.norm(dim=1)
    offset = start[:, None] - s["centre"][..., None]
    is_dark = enter(apply_matrix(s["inverse"], offset), apply_matrix(s["inverse"], to_light[:, None])).amin(1) < 1
    t_wall = leave(s["bounds"], start, to_light)[0]
    is_dark |= s["outdoor"] & (start[:, 1] + t_wall * to_light[:, 1] < s["top"])
    # a lamp of finite size: inverse square far away, bounded near it
    room = (.5 * s["reach"]) ** 2
    falloff = torch.where(s["outdoor"], 1., 1.5 * room / (distance ** 2 + .5 * room))
    direct = (normal * to_light).sum(1).clamp(min=0) / distance * falloff * ~is_dark
    up = .5 + .5 * normal[:, 1:2]
    ambient = s["sky_light"][..., None] * up + s["ground_light"][..., None] * (1 - up)
    return ambient + s["key"][..., None] * direct[:, None]


def render_chunk(domain, ids, H, W, noise):
    """As `render_scenes`, of a few scenes at once."""
    dice, s = draw_scene(domain, ids)
    B = len(ids)
    half_view = s["half_view"]
    black = torch.tensor(0.)
    view = make_rays(half_view, H, W)
    depth, mask, number, point, normal, local = trace(s, view)

    surface = s["surface"][torch.arange(B)[:, None], number]            # (B, P, 17)
    near = torch.where(mask, depth, 1.)
    slant = -(normal * apply_matrix(s["camera"], view)).sum(1) / view.norm(dim=1)
    albedo = surface_albedo(surface, local, surface[..., 1] * slant.clamp(min=.3) * 16 / (near * half_view)).mT
    irradiance = illuminate(s, point, normal, near) * mask[:, None]
    irradiance = srgb_encode(irradiance / irradiance.amax((1, 2), keepdim=True).clamp(min=1e-6))
    normal = apply_matrix(s["camera"].mT, normal)
    depth, mask = (x.view(B, 1, H, W) for x in (depth, mask))
    maps = (normal, albedo, irradiance)
    normal, albedo, irradiance = (torch.where(mask, m.contiguous().view(B, 3, H, W), black) for m in maps)

    # rgb is computed from the maps that are returned; the exposure is measured on this view
    linear = srgb_decode(albedo) * srgb_decode(irradiance)
    mean = linear.sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)).clamp(min=1))
    gain = s["exposure"] / mean.clamp(min=1e-4)[:, None] * (s["balance"] * (dice(3) * 2 - 1)).exp()
    tone = torch.cat([gain, s["gamma"], s["contrast"]], -1)
    zenith = .4 + .5 * s["sky_light"] / s["sky_light"].amax(-1, keepdim=True)
    rgb = torch.where(mask, tonemap(linear, tone), zenith[..., None, None])
    if noise and domain != "synthetic":
        bits = dice.hashes(H * W).view(B, 1, H, W) >> torch.tensor([0, 16, 32]).view(3, 1, 1) & 0xFFFF
        grain = (bits.float() / 65535 - .5) * 12 ** .5                  # uniform, unit variance
        rgb = (rgb + s["noise"][..., None, None] * grain).clamp(0, 1)
    return {"rgb": rgb, "depth": depth, "normal": normal, "albedo": albedo, "irradiance": irradiance,
            "mask": mask, "tone": tone, "focal": H / 2 / half_view[:, 0]}


def render_scenes(domain, ids, size, noise=True):
    """Render scenes and their exact maps; on one device a scene is the same, bit for bit, in any batch and order.

    domain  one of DOMAINS;  ids (B,) int64;  size  int or (H, W) pixels;  noise  False: no sensor noise
    returns a dict of float32 on the device of ids, where all is computed (devices differ by rounding)
        rgb         (B, 3, H, W)  sRGB-encoded, [0, 1]
        depth       (B, 1, H, W)  planar z in metres, inf at sky
        normal      (B, 3, H, W)  unit, camera frame, 0 at sky
        albedo      (B, 3, H, W)  sRGB-encoded, [0, 1]; 0 at sky
        irradiance  (B, 3, H, W)  sRGB-encoded, [0, 1]: linear over its largest channel in the view; 0 at sky
        mask        (B, 1, H, W)  bool, True = not sky
        tone        (B, 5)        see tonemap
        focal       (B,)          focal length in pixels; the principal point is the image centre
    raises  ValueError for an unknown domain
    """
    if domain not in DOMAINS:
        raise ValueError(f"scenes.py: domain got {domain!r}, want one of {', '.join(DOMAINS)}")
    H, W = (size, size) if isinstance(size, int) else size
    # chunks of one fixed size, the last one padded, since rounding can depend on a tensor's shape
    step = max(1, CHUNK[ids.device.type] // (H * W))
    padded = torch.cat([ids, ids.new_zeros(-len(ids) % step)])
    with ids.device:
        chunks = [render_chunk(domain, part, H, W, noise) for part in padded.split(step)]
    return {k: torch.cat([c[k] for c in chunks])[:len(ids)] for k in chunks[0]}
