"""Relations, pair sampling and markers against loops written from the paper's table, not from the code."""
import math

import pytest
import torch

import relations
from kernels.pair_reward import soften
from relations import MODALITIES, draw_markers, margin, relation, sample_pairs

NAMES = tuple(MODALITIES)
SIZE = 512
DOUBLE = torch.float64                       # oracle comparisons run in fp64, so only a 1e-16 tie could differ

every_modality = pytest.mark.parametrize("modality", NAMES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_maps(modality, *lead, size=(9, 11), seed=0):
    """Maps whose pairs fall on both sides of every threshold; normals of unit length."""
    channels = 1 if modality == "depth" else 3
    noise = torch.rand(*lead, channels, *size, generator=generator(seed), dtype=DOUBLE)
    if modality == "depth":
        return 1 + 0.2 * noise ** 3                                             # crowded near the camera
    if modality == "normal":
        tilt = 1.2 * (noise - 0.5) + torch.tensor([0.0, 0.0, 1.0], dtype=DOUBLE)[:, None, None]
        return tilt / torch.linalg.vector_norm(tilt, dim=-3, keepdim=True)
    return 0.5 + 0.2 * (noise - 0.5)


def draw_points(*lead, n=40, size=(9, 11), seed=1):
    """Uniform points, the four corners among them; the two of a pair may coincide."""
    row, col = (torch.randint(k, (*lead, n, 2), generator=generator(seed + i)) for i, k in enumerate(size))
    pts = torch.stack((row, col), -1)
    h, w = size
    pts[..., 0, :, :] = torch.tensor([[0, 0], [h - 1, w - 1]])
    pts[..., 1, :, :] = torch.tensor([[h - 1, 0], [0, w - 1]])
    return pts


def oracle(maps, pts, modality, window):
    """The table of the paper, one pair and one pixel at a time, in Python floats. maps (C, H, W), pts (P, 2, 2)."""
    maps, pts = maps.tolist(), pts.tolist()
    H, W = len(maps[0]), len(maps[0][0])

    def read(point):
        rows = range(max(0, point[0] - window), min(H, point[0] + window + 1))
        cols = range(max(0, point[1] - window), min(W, point[1] + window + 1))
        cells = [(i, j) for i in rows for j in cols]
        return [sum(plane[i][j] for i, j in cells) / len(cells) for plane in maps]

    answers = []
    for red_at, green_at in pts:
        red, green = read(red_at), read(green_at)
        if not all(map(math.isfinite, red + green)):
            answers.append(0)
        elif modality == "albedo":
            distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(red, green, strict=True)))
            answers.append(1 if distance < 0.05 else -1)
        else:
            if modality == "depth":
                finite = [z for line in maps[0] for z in line if math.isfinite(z)]
                difference, dead = green[0] - red[0], 0.02 * (max(finite) - min(finite))
            elif modality == "normal":
                difference, dead = red[2] - green[2], 0.04
            else:
                luma = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (red, green)]
                difference, dead = luma[0] - luma[1], 0.02
            answers.append(0 if abs(difference) < dead or difference == 0 else 1 if difference > 0 else -1)
    return answers


def two_pixels(modality, red, green, others=()):
    """A one-row map whose first two pixels are red's and green's values, and the one pair on them."""
    values = [torch.as_tensor(v, dtype=torch.float32).reshape(-1, 1) for v in (red, green, *others)]
    return torch.cat(values, 1)[:, None], torch.tensor([[[0, 0], [0, 1]]])


# The relation ---------------------------------------------------------------------------------------------------

@every_modality
@pytest.mark.parametrize("window", [0, 1])
def test_relation_equals_the_double_loop(modality, window):
    maps, pts = draw_maps(modality), draw_points(n=200)
    want = oracle(maps, pts, modality, window)
    assert set(want) == ({1, -1} if modality == "albedo" else {1, 0, -1})       # every answer is exercised
    assert relation(maps, pts, modality, window).tolist() == want


@pytest.mark.parametrize("window", [0, 1])
def test_relation_equals_the_double_loop_where_depth_has_holes(window):
    maps, pts = draw_maps("depth"), draw_points(n=200)
    maps[0, 2, 3], maps[0, 5, 5], maps[0, 7, 9] = math.inf, -math.inf, math.nan
    want = oracle(maps, pts, "depth", window)
    assert set(want) == {1, 0, -1}
    assert relation(maps, pts, "depth", window).tolist() == want


def test_relation_is_int8_of_one_value_per_pair():
    rel = relation(draw_maps("normal", 2), draw_points(2, n=5), "normal")
    assert (rel.dtype, rel.shape) == (torch.int8, (2, 5))


@pytest.mark.parametrize("red, green, want", [
    (0.5, 0.7, 1), (0.7, 0.5, -1), (0.5, 0.515, 0), (0.515, 0.5, 0), (0.5, 0.525, 1), (0.525, 0.5, -1), (0.5, 0.5, 0)])
def test_smaller_depth_is_closer_outside_two_percent_of_the_range(red, green, want):
    maps, pts = two_pixels("depth", red, green, others=(0.0, 1.0))
    assert relation(maps, pts, "depth").item() == want


@pytest.mark.parametrize("modality, red, green, want", [
    ("depth", 0.0, 0.02, 1), ("depth", 0.02, 0.0, -1),
    ("normal", (1, 0, 0.04), (1, 0, 0), 1), ("normal", (1, 0, 0), (1, 0, 0.04), -1),
    ("albedo", (0.05, 0, 0), (0, 0, 0), -1)])
def test_exactly_on_the_border_a_pair_is_asked_and_a_colour_is_different(modality, red, green, want):
    """The table says "< 0.02 is dead" and "< 0.05 is same"; these differences are the fp32 thresholds themselves."""
    maps, pts = two_pixels(modality, red, green, others=(1.0,) if modality == "depth" else ())
    assert relation(maps, pts, modality).item() == want


@pytest.mark.parametrize("modality, zero, border", [
    ("depth", 0.0, 0.02), ("normal", (0.0, 0.0, 0.0), (0.0, 0.0, 0.04)),
    ("irradiance", (0.5, 0.5, 0.5), (0.52, 0.52, 0.52)), ("albedo", (0.5, 0.5, 0.5), (0.53, 0.54, 0.5))])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_relation_changes_within_a_ten_thousandth_of_the_border(modality, zero, border, side):
    """A step of 1e-4 of the threshold is 2e-6, well above one fp32 ulp of 0.5 (6e-8)."""
    zero, border = torch.tensor(zero), torch.tensor(border)
    value = zero + (border - zero) * (1 + side * 1e-4)
    maps, pts = two_pixels(modality, value, zero, others=(1.0,) if modality == "depth" else ())
    inside = 1 if modality == "albedo" else 0
    outside = -1 if modality in ("albedo", "depth") else 1                      # red is farther: green is closer
    assert relation(maps, pts, modality).item() == (outside if side > 0 else inside)


def test_irradiance_is_weighed_with_rec_601_luma():
    weights = {"r": 0.299, "g": 0.587, "b": 0.114}
    for channel, weight in enumerate(weights.values()):
        for factor, want in ((0.99, 0), (1.01, 1)):
            red = [0.0, 0.0, 0.0]
            red[channel] = factor * 0.02 / weight
            maps, pts = two_pixels("irradiance", red, (0.0, 0.0, 0.0))
            assert relation(maps, pts, "irradiance").item() == want


@pytest.mark.parametrize("hole", [math.inf, -math.inf, math.nan])
def test_a_non_finite_depth_pixel_does_not_change_the_dead_zone(hole):
    """0.025 of the range is asked; had the hole doubled the range, it would be dead."""
    clean, pts = two_pixels("depth", 0.5, 0.525, others=(0.0, 1.0, 0.3))
    holed, _ = two_pixels("depth", 0.5, 0.525, others=(0.0, 1.0, hole))
    assert relation(clean, pts, "depth").item() == relation(holed, pts, "depth").item() == 1


@every_modality
@pytest.mark.parametrize("hole", [math.inf, -math.inf, math.nan])
def test_a_pair_on_a_masked_pixel_is_never_asked(modality, hole):
    maps, pts = draw_maps(modality), draw_points(n=100)
    maps[:, 4, 4] = hole
    pts[:, 0] = 4
    assert (relation(maps, pts, modality) == 0).all()
    assert (relation(maps, pts.flip(-2), modality) == 0).all()


def test_a_depth_map_without_a_finite_pixel_asks_nothing():
    assert (relation(torch.full((1, 9, 11), math.inf), draw_points(), "depth") == 0).all()


def test_a_constant_depth_map_asks_nothing():
    assert (relation(torch.full((1, 9, 11), 3.0), draw_points(), "depth") == 0).all()


@pytest.mark.parametrize("modality, sign", [("depth", -1), ("normal", -1), ("irradiance", -1), ("albedo", 1)])
@pytest.mark.parametrize("window", [0, 1])
def test_swapping_the_two_points_flips_the_relation_and_keeps_albedo(modality, sign, window):
    maps, pts = draw_maps(modality), draw_points(n=100)
    before = relation(maps, pts, modality, window)
    assert before.any()
    assert torch.equal(relation(maps, pts.flip(-2), modality, window), sign * before)


@pytest.mark.parametrize("scale, shift", [(3.7, 0.0), (1.0, -5.0), (0.01, 80.0)])
@pytest.mark.parametrize("window", [0, 1])
def test_scaling_and_shifting_depth_keeps_every_relation(scale, shift, window):
    maps, pts = draw_maps("depth"), draw_points(n=200)
    assert torch.equal(relation(scale * maps + shift, pts, "depth", window), relation(maps, pts, "depth", window))


@every_modality
@pytest.mark.parametrize("window", [0, 1])
def test_points_of_an_image_broadcast_over_its_group(modality, window):
    B, G, P = 2, 3, 12
    maps, pts = draw_maps(modality, B, G), draw_points(B, 1, n=P)
    got = relation(maps, pts, modality, window)
    assert got.shape == (B, G, P)
    for b in range(B):
        for g in range(G):
            assert torch.equal(got[b, g], relation(maps[b, g], pts[b, 0], modality, window))


@pytest.mark.parametrize("point", [(-1, 0), (0, -1), (9, 0), (0, 11)])
def test_a_point_outside_the_map_is_refused(point):
    pts = draw_points(n=3)
    pts[1, 1] = torch.tensor(point)
    with pytest.raises(ValueError, match=r"relations\.margin: got points from .*, want 0 <= row < 9, 0 <= col < 11"):
        relation(draw_maps("depth"), pts, "depth")


@pytest.mark.parametrize("modality, channels, want", [
    ("depth", 3, 1), ("normal", 1, 3), ("albedo", 4, 3), ("irradiance", 1, 3)])
def test_the_wrong_number_of_channels_is_refused(modality, channels, want):
    with pytest.raises(ValueError, match=f"got {channels} channels for '{modality}'; want {want}"):
        relation(torch.zeros(channels, 9, 11), draw_points(), modality)


def test_an_unknown_modality_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="got modality 'shading'; want one of depth, normal, albedo, irradiance"):
        relation(torch.zeros(3, 9, 11), draw_points(), "shading")


@every_modality
@pytest.mark.parametrize("window", [0, 1])
def test_the_sign_of_the_soft_relation_is_the_relation(modality, window):
    maps, pts = draw_maps(modality), draw_points(n=200)
    hard = relation(maps, pts, modality, window)
    soft = soften(margin(maps, pts, modality, window), 0.1)
    asked = hard != 0
    assert asked.any() and torch.equal(soft[asked].sign(), hard[asked].to(DOUBLE))


@every_modality
def test_the_soft_relation_of_a_masked_pixel_is_zero(modality):
    maps, pts = draw_maps(modality), draw_points(n=3)
    maps[:, 4, 4] = math.nan
    pts[:, 0] = 4
    assert (soften(margin(maps, pts, modality), 0.1) == 0).all()


@every_modality
def test_the_soft_relation_has_the_gradient_of_its_finite_difference(modality):
    """Pairs of distinct points only: albedo's distance has a kink at zero."""
    maps = draw_maps(modality, size=(3, 4)).requires_grad_()
    pts = torch.tensor([[[0, 0], [2, 3]], [[1, 2], [0, 1]], [[2, 0], [1, 1]]])
    assert torch.autograd.gradcheck(lambda z: soften(margin(z, pts, modality), 0.1), (maps,))


# Pair sampling --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def many():
    """4 x 10000 pairs at 512 px, and their distances."""
    pts = sample_pairs(4, (SIZE, SIZE), 10000, generator(3))
    return pts, (pts[..., 0, :] - pts[..., 1, :]).double().norm(dim=-1)


def test_sampled_pairs_are_integer_pixels_of_the_stated_shape(many):
    pts, _ = many
    assert (pts.shape, pts.dtype) == ((4, 10000, 2, 2), torch.int64)


def test_sampled_points_keep_thirty_pixels_from_the_border_at_512(many):
    """The few pairs that met no band in all tries (under 1 in 1000) may be anywhere in the image."""
    pts, _ = many
    assert pts.min() >= 0 and pts.max() < SIZE
    near = ((pts < 30) | (pts > SIZE - 1 - 30)).flatten(2).any(-1)
    assert near.double().mean() < 1e-3


def test_sampled_distances_lie_in_the_official_range_at_512(many):
    """20 to 350 px, plus sqrt(2) for rounding both ends to pixels."""
    _, distance = many
    inside = (distance >= 20 - math.sqrt(2)) & (distance <= 350 + math.sqrt(2))
    assert inside.double().mean() > 0.999


def test_the_five_distance_bands_are_equally_likely(many):
    """Bands overlap, so the distribution function of their even mixture is compared, by a numeric integral.

    Four standard errors of a share of 40000 draws are at most 0.010; rounding to pixels moves up to 0.0025 more.
    """
    _, distance = many
    bands = ((20, 20, 40), (30, 50, 80), (60, 100, 150), (120, 200, 280), (220, 300, 350))
    steps = 1000
    for edge in (30, 40, 50, 60, 80, 90, 100, 120, 150, 200, 250, 280, 300, 320):
        want = 0.0
        for a, b, c in bands:
            for i in range(steps):
                low = a + (b - a) * (i + 0.5) / steps
                want += min(1, max(0, (edge - low) / (c - low))) / (5 * steps)
        got = (distance < edge).double().mean().item()
        assert abs(got - want) < 0.0125, (edge, got, want)


def test_distances_scale_with_the_shorter_side():
    pts = sample_pairs(2, (256, 700), 2000, generator())
    distance = (pts[..., 0, :] - pts[..., 1, :]).double().norm(dim=-1)
    assert ((distance >= 10 - math.sqrt(2)) & (distance <= 175 + math.sqrt(2))).double().mean() > 0.999


@pytest.mark.parametrize("size", [(512, 300), (48, 200), (32, 32), (7, 5)])
def test_points_stay_inside_images_of_any_shape(size):
    pts = sample_pairs(3, size, 300, generator())
    assert (pts >= 0).all() and (pts < torch.tensor(size)).all()


def test_points_reach_all_of_a_wide_image():
    pts = sample_pairs(1, (64, 640), 2000, generator())
    assert pts[..., 1].min() < 20 and pts[..., 1].max() > 619


@pytest.mark.parametrize("size", [(512, 512), (32, 32), (6, 6), (1, 2)])
def test_the_two_points_of_a_pair_always_differ(size):
    pts = sample_pairs(2, size, 400, generator())
    assert (pts[..., 0, :] != pts[..., 1, :]).any(-1).all()


@pytest.mark.parametrize("kind", ["half", "stripe", "speckle"])
def test_only_valid_pixels_of_the_mask_are_drawn(kind):
    mask = torch.zeros(2, 1, 64, 80, dtype=torch.bool)
    if kind == "half":
        mask[0, :, :, :40], mask[1, :, 32:] = True, True
    elif kind == "stripe":
        mask[..., 31] = True
    else:
        mask = torch.rand(mask.shape, generator=generator(5)) < 0.02
    pts = sample_pairs(2, (64, 80), 200, generator(), mask=mask)
    for b in range(2):
        assert mask[b, 0, pts[b, ..., 0], pts[b, ..., 1]].all()


def test_a_mask_of_two_pixels_gives_those_two():
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[0, 0, 3, 60], mask[0, 0, 50, 2] = True, True
    pts = sample_pairs(1, (64, 64), 20, generator(), mask=mask)[0].tolist()
    assert all(sorted(pair) == [[3, 60], [50, 2]] for pair in pts)


@pytest.mark.parametrize("grid, size", [(8, (64, 64)), (8, (61, 90)), (4, (33, 47)), (14, (512, 512))])
def test_points_snap_to_cell_centres(grid, size):
    pts = sample_pairs(2, size, 200, generator(), grid=grid)
    assert (pts % grid == grid // 2).all() and (pts < torch.tensor(size)).all()


def test_snapping_keeps_the_distances_up_to_one_cell():
    pts = sample_pairs(2, (SIZE, SIZE), 2000, generator(), grid=8)
    distance = (pts[..., 0, :] - pts[..., 1, :]).double().norm(dim=-1)
    assert ((distance >= 20 - 8 * math.sqrt(2)) & (distance <= 350 + 8 * math.sqrt(2))).double().mean() > 0.998


def test_snapped_points_of_a_pair_differ():
    pts = sample_pairs(2, (32, 32), 300, generator(), grid=8)
    assert (pts[..., 0, :] != pts[..., 1, :]).any(-1).all()


def test_the_same_seed_draws_the_same_pairs():
    first, second, other = (sample_pairs(2, (48, 64), 50, generator(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_sampling_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    sample_pairs(2, (8, 8), 50, generator())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("size, grid", [((1, 1), 1), ((8, 8), 8)])
def test_an_image_with_room_for_one_point_is_refused(size, grid):
    with pytest.raises(ValueError, match=f"image of {size[0]} x {size[1]} px with fewer than two valid points"):
        sample_pairs(1, size, 4, generator(), grid=grid)


@pytest.mark.parametrize("valid", [0, 1])
def test_a_mask_with_fewer_than_two_pixels_is_refused_even_in_one_image_of_the_batch(valid):
    mask = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    mask[1] = False
    mask[1, 0, 0, :valid] = True
    with pytest.raises(ValueError, match="fewer than two valid points"):
        sample_pairs(3, (16, 16), 4, generator(), mask=mask)


# Markers --------------------------------------------------------------------------------------------------------

def drawn(image, colour):
    """Set of (row, col) that have exactly that colour."""
    same = (image == torch.tensor(colour).view(3, 1, 1)).all(0)
    return {tuple(p) for p in same.nonzero().tolist()}


def disc_and_ring(centre, size, scale=1.0):
    H, W = size
    pixels = set()
    for row in range(H):
        for col in range(W):
            dist = math.hypot(row - centre[0], col - centre[1])
            if abs(dist - 5 * scale) <= 1 * scale or dist <= 1 * scale:
                pixels.add((row, col))
    return pixels


def test_markers_at_512_are_the_official_pixels_red_first_green_second():
    pts = torch.tensor([[[[100, 200], [2, 509]]]])                              # green is cut by the corner
    marked = draw_markers(torch.full((1, 3, SIZE, SIZE), 0.5), pts)[0, 0]
    assert drawn(marked, (1, 0, 0)) == disc_and_ring((100, 200), (SIZE, SIZE))
    assert drawn(marked, (0, 1, 0)) == disc_and_ring((2, 509), (SIZE, SIZE))


@pytest.mark.parametrize("size, scale", [((256, 256), 0.5), ((1024, 1100), 2.0)])
def test_markers_scale_with_the_shorter_side(size, scale):
    marked = draw_markers(torch.zeros(1, 3, *size), torch.tensor([[[[100, 90], [60, 200]]]]))[0, 0]
    assert drawn(marked, (1, 0, 0)) == disc_and_ring((100, 90), size, scale)


def test_everything_outside_the_markers_is_the_photo():
    rgb = 0.1 + 0.8 * torch.rand(1, 3, 64, 64, generator=generator())
    marked = draw_markers(rgb, torch.tensor([[[[20, 20], [40, 50]]]]))[0, 0]
    touched = (marked != rgb[0]).any(0)
    assert {tuple(p) for p in touched.nonzero().tolist()} == drawn(marked, (1, 0, 0)) | drawn(marked, (0, 1, 0))


def test_every_pair_gets_its_own_copy_of_its_own_photo():
    rgb = torch.stack((torch.full((3, 48, 64), 0.2), torch.full((3, 48, 64), 0.6)))
    pts = sample_pairs(2, (48, 64), 5, generator())
    marked = draw_markers(rgb, pts)
    assert marked.shape == (2, 5, 3, 48, 64)
    for b in range(2):
        for p in range(5):
            assert torch.equal(marked[b, p], draw_markers(rgb[b:b + 1], pts[b:b + 1, p:p + 1])[0, 0])


def test_the_photo_is_not_written():
    rgb = torch.rand(1, 3, 48, 48, generator=generator())
    before = rgb.clone()
    draw_markers(rgb, torch.tensor([[[[10, 10], [30, 30]]]]))
    assert torch.equal(rgb, before)


@pytest.mark.parametrize("offset", [(0, 1), (0, 2), (1, 1), (2, 2), (0, 4), (9, 9)])
def test_both_markers_are_visible_at_32_pixels_even_where_they_overlap(offset):
    """A marker there is a ring of 12 pixels and a centre; under the overlap red keeps at least five of its 13."""
    green = [12 + offset[0], 12 + offset[1]]
    marked = draw_markers(torch.full((1, 3, 32, 32), 0.5), torch.tensor([[[[12, 12], green]]]))[0, 0]
    assert len(drawn(marked, (1, 0, 0))) >= 5 and len(drawn(marked, (0, 1, 0))) >= 12


# Words ----------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "depth": "Looking at this image, which colored point appears to be closer to the camera - red or green?",
    "normal": "Which point has a surface more facing towards the camera, red or green?",
    "irradiance": "Which point is more illuminated?",
    "albedo": "Do the red and green points have the same base color?",
}
ANSWERS = {
    "depth": ("Based on visual depth cues in the image, the red point appears closer to the camera.",
              "Based on visual depth cues in the image, the green point appears closer to the camera."),
    "normal": ("The red point has a surface more facing towards the camera.",
               "The green point has a surface more facing towards the camera."),
    "irradiance": ("The red point is more illuminated.", "The green point is more illuminated."),
    "albedo": ("Yes, the red and green points have similar base colors.",
               "No, the red and green points have different base colors."),
}
PREFIXES = {"depth": "Based on visual depth cues in the image, the", "normal": "The", "irradiance": "The", "albedo": ""}
WORDS = {"depth": ("red", "green"), "normal": ("red", "green"), "irradiance": ("red", "green"), "albedo": ("Yes", "No")}


def test_the_four_modalities_of_the_paper_are_known():
    assert set(MODALITIES) == set(QUESTIONS)


@pytest.mark.parametrize("field, official", [
    ("question", QUESTIONS), ("answers", ANSWERS), ("prefix", PREFIXES), ("words", WORDS)])
@every_modality
def test_the_words_are_the_official_ones(modality, field, official):
    assert getattr(MODALITIES[modality], field) == official[modality]


@every_modality
def test_an_answer_is_its_prefix_then_its_word(modality):
    row = MODALITIES[modality]
    for answer, word in zip(row.answers, row.words, strict=True):
        assert answer.startswith(f"{row.prefix} {word}".lstrip())


def test_red_is_pure_red_and_green_is_pure_green():
    assert (relations.RED, relations.GREEN) == ((1, 0, 0), (0, 1, 0))
