"""scenes: exact maps of one geometry, stateless randomness, and layouts that do not give the answers away."""

import pytest
import torch

import relations
from data import scenes

N, SIZE = 32, 32
# float32 round trip through the sRGB curve, a power and a gain
TOL = 1e-5


@pytest.fixture(scope="module", params=scenes.DOMAINS)
def domain(request):
    return request.param


@pytest.fixture(scope="module")
def out(domain):
    return scenes.render_scenes(domain, scenes.scene_ids("train", N), SIZE, noise=False)


def pinhole_rays(focal, H, W):
    """Oracle, from the focal length in pixels: (B, 3, H, W) camera-frame rays with z = -1, x right, y up."""
    y, x = torch.meshgrid(H / 2 - .5 - torch.arange(H), torch.arange(W) - W / 2 + .5, indexing="ij")
    xy = torch.stack([x, y]) / focal.view(-1, 1, 1, 1)
    return torch.cat([xy, -torch.ones_like(xy[:, :1])], 1)


def test_rgb_is_the_tonemapped_product_of_albedo_and_irradiance(out):
    linear = relations.srgb_decode(out["albedo"]) * relations.srgb_decode(out["irradiance"])
    error = (scenes.tonemap(linear, out["tone"]) - out["rgb"]).abs() * out["mask"]
    assert error.max() < TOL


def test_srgb_curves_are_inverse_and_hit_the_published_values():
    x = torch.linspace(0, 1, 1001)
    assert (relations.srgb_decode(relations.srgb_encode(x)) - x).abs().max() < TOL
    assert torch.allclose(relations.srgb_encode(torch.tensor([0., .0031308, .5, 1.])),
                          torch.tensor([0., .04044994, .7353569, 1.]), atol=1e-6)


def test_tonemap_keeps_the_order_of_values():
    ramp = torch.linspace(0, 2, 200).view(1, 1, 1, 200).expand(1, 3, 1, 200)
    for contrast in (-.4, .8):
        rgb = scenes.tonemap(ramp, torch.tensor([[1., .8, 1.2, 1.3, contrast]]))
        assert rgb.min() >= 0 and rgb.max() <= 1 and (rgb.diff(dim=-1) >= -1e-6).all()


def test_normals_agree_with_finite_differences_of_depth(domain):
    # small steps on curved surfaces: 96 px
    o = scenes.render_scenes(domain, scenes.scene_ids("train", 8), 96, noise=False)
    point = pinhole_rays(o["focal"], 96, 96) * torch.where(o["mask"], o["depth"], 0.)
    right = point[..., 1:-1, 2:] - point[..., 1:-1, :-2]
    up = point[..., :-2, 1:-1] - point[..., 2:, 1:-1]
    measured = torch.nn.functional.normalize(torch.linalg.cross(right, up, dim=1), dim=1)
    # away from edges: the normals of the four neighbours are alike
    n = o["normal"]
    centre = n[..., 1:-1, 1:-1]
    around = (n[..., 1:-1, 2:], n[..., 1:-1, :-2], n[..., :-2, 1:-1], n[..., 2:, 1:-1])
    flat = torch.stack([(centre * a).sum(1) > .98 for a in around]).all(0)
    cosine = (measured * centre).sum(1)[flat]
    assert flat.float().mean() > .5
    # one normal on both sides of a depth step, as on two parallel walls, is rare
    assert (cosine > .99).float().mean() > .97


def test_normals_are_unit_and_face_the_camera(out):
    valid = out["mask"][:, 0]
    towards = -(out["normal"] * pinhole_rays(out["focal"], SIZE, SIZE)).sum(1)
    assert (out["normal"].norm(dim=1)[valid] - 1).abs().max() < TOL
    assert towards[valid].min() > -TOL


def test_floor_seen_by_a_level_camera_points_up():
    o = scenes.render_scenes("synthetic", scenes.scene_ids("train", N), SIZE)
    lowest, highest = o["normal"][:, 1, -1].flatten(), o["normal"][:, 1, 0].flatten()
    assert lowest.max() > .98 and highest.min() < -.98
    assert lowest.mean() > .3 > -.3 > highest.mean()


def test_depth_is_planar_and_a_wall_does_not_depend_on_the_size_of_the_view(domain):
    ids = scenes.scene_ids("val", 8)
    small, large = (scenes.render_scenes(domain, ids, n, noise=False) for n in (21, 63))
    # 63 px is 21 px with nine pixels for one: the middle ones share their ray
    middle = large["depth"][..., 1::3, 1::3]
    same = torch.isclose(middle, small["depth"], rtol=1e-4)
    assert same.float().mean() > .995
    assert torch.allclose(small["focal"] * 3, large["focal"])


def test_a_view_may_be_wider_than_high(domain):
    ids = scenes.scene_ids("val", 3)
    wide, square = scenes.render_scenes(domain, ids, (16, 32)), scenes.render_scenes(domain, ids, 16)
    assert wide["rgb"].shape == (3, 3, 16, 32)
    assert torch.isclose(wide["depth"][..., 8:24], square["depth"], rtol=1e-4).float().mean() > .995


def test_sky_is_masked_and_nothing_else(out):
    is_sky = ~out["mask"]
    assert torch.equal(is_sky, out["depth"].isinf())
    for name in ("normal", "albedo", "irradiance"):
        assert (out[name] * is_sky == 0).all()


def test_maps_are_finite_and_in_range(out, domain):
    for name in ("rgb", "albedo", "irradiance"):
        assert out[name].isfinite().all() and out[name].min() >= 0 and out[name].max() <= 1, name
    depth = out["depth"][out["mask"]]
    assert depth.min() > .1 and depth.max() < 80
    assert out["mask"].dtype == torch.bool and out["rgb"].dtype == torch.float32
    if domain == "synthetic":
        assert out["mask"].all() and depth.max() < 9


def test_irradiance_reaches_one_and_is_never_black(out):
    assert torch.allclose(out["irradiance"].amax((1, 2, 3)), torch.ones(N), atol=TOL)
    assert out["irradiance"].amax(1, keepdim=True)[out["mask"]].min() > .02


def test_objects_cast_shadows_and_never_add_light(domain):
    _, scene = scenes.draw_scene(domain, scenes.scene_ids("train", N))
    depth, mask, _, point, normal, _ = scenes.trace(scene, scenes.make_rays(scene["half_view"], SIZE, SIZE))
    depth = torch.where(mask, depth, 1.)
    with_objects = scenes.illuminate(scene, point, normal, depth)
    scene["centre"] = torch.tensor([0., -scenes.OPEN, 0.]).expand_as(scene["centre"])
    without = scenes.illuminate(scene, point, normal, depth)
    assert (with_objects <= without + TOL).all()
    assert .02 < (with_objects < without - .01).any(1)[mask].float().mean() < .5


def test_rays_along_an_axis_are_exact():
    bounds = torch.tensor([[[-1., 0., -1.], [1., 2., 1.]]])
    origin, ray = torch.full((1, 3, 1), .5), torch.eye(3)
    for axis, sign, t, wall in ((0, 1, .5, 1), (1, -1, .5, 2), (2, -1, 1.5, 4)):
        way, number = scenes.leave(bounds, origin, sign * ray[None, :, axis:axis + 1])
        assert (way.item(), number.item()) == (t, wall)
    origin = torch.tensor([-3., .5, 0.]).view(1, 1, 3, 1).expand(1, scenes.SLOTS, 3, 1)
    t = scenes.enter(origin, ray[:, :1].expand(1, scenes.SLOTS, 3, 1))
    assert torch.allclose(t[:, scenes.ROUND:], torch.tensor(2.))


def test_rays_enter_from_outside_and_miss_what_lies_behind():
    origin, ray = torch.zeros(1, scenes.SLOTS, 3, 2), torch.full((1, scenes.SLOTS, 3, 2), 1e-4)
    origin[:, :, 0], ray[:, :, 0] = torch.tensor([-5., 5.]), 1.
    t = scenes.enter(origin, ray)
    assert torch.allclose(t[..., 0], torch.tensor(4.), atol=1e-3) and t[..., 1].isinf().all()


def test_most_pixels_are_valid(domain):
    share = scenes.render_scenes(domain, scenes.scene_ids("train", 128), 16)["mask"].float().mean((1, 2, 3))
    assert (share >= .6).float().mean() > .97 and share.mean() > .9


def test_albedo_is_made_of_few_flat_colours(out):
    for albedo, mask in zip(out["albedo"], out["mask"], strict=True):
        assert len(albedo[:, mask[0]].unique(dim=1).T) <= 5


def test_a_scene_is_the_same_in_any_batch_and_order(domain):
    ids = scenes.scene_ids("test", 20)
    together = scenes.render_scenes(domain, ids, SIZE)
    order = torch.tensor([7, 19, 0, 3])
    shuffled, alone = scenes.render_scenes(domain, ids[order], SIZE), scenes.render_scenes(domain, ids[7:8], SIZE)
    for name in together:
        assert torch.equal(together[name][order], shuffled[name]), name
        assert torch.equal(together[name][7:8], alone[name]), name


def test_rendering_leaves_the_global_generator_alone(domain):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    scenes.render_scenes(domain, scenes.scene_ids("train", 2), 8)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_touches_rgb_only_and_not_in_synthetic(domain, out):
    noisy = scenes.render_scenes(domain, scenes.scene_ids("train", N), SIZE)
    assert all(torch.equal(noisy[k], out[k]) for k in out if k != "rgb")
    change = (noisy["rgb"] - out["rgb"]).abs()
    assert change.max() < .06 and (change.max() == 0) == (domain == "synthetic")


def test_splits_and_domains_hold_different_scenes():
    ids = {split: scenes.scene_ids(split, 50) for split in scenes.SPLITS}
    assert len(torch.cat(list(ids.values())).unique()) == 150
    views = torch.cat([scenes.render_scenes("broad", ids[split], 8)["depth"].flatten(1) for split in ids])
    assert len(views.unique(dim=0)) == 150
    assert not torch.equal(views[:50], scenes.render_scenes("wild", ids["train"], 8)["depth"].flatten(1))


def test_draws_are_uniform_and_uncorrelated():
    u = scenes.Dice("wild", scenes.scene_ids("val", 2000))(16)
    assert u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - .5).abs().max() < .03 and (u.std(0) - 12 ** -.5).abs().max() < .02
    # 240 correlations of 2000 draws: five standard errors
    assert (torch.corrcoef(u.T) - torch.eye(16)).abs().max() < 5 / 2000 ** .5


def test_broad_contains_both_other_domains_in_every_row():
    for name, (synthetic, broad, wild) in scenes.TABLE.items():
        for lo, hi in (synthetic, wild):
            assert broad[0] <= lo <= hi <= broad[1], name


@pytest.mark.parametrize("position, value", [("low", .75), ("up", .75)])
def test_height_in_the_image_does_not_answer_depth_or_normals(position, value):
    o = scenes.render_scenes("wild", scenes.scene_ids("train", 256), 32)
    quantity, mask = (-o["depth"] if position == "low" else -o["normal"][:, 2:])[:, 0], o["mask"][:, 0]
    right = n = 0
    for step in (2, 5, 10, 16):
        change = quantity[:, step:] - quantity[:, :-step]
        valid = mask[:, step:] & mask[:, :-step] & (change.abs() > .04)
        right, n = right + (change > 0)[valid].sum().item(), n + valid.sum().item()
    assert right / n < value


def test_unknown_names_are_one_line_errors_with_the_choices():
    with pytest.raises(ValueError, match="^scenes.*domain got 'moon', want one of synthetic, broad, wild$"):
        scenes.render_scenes("moon", torch.tensor([0]), 8)
    with pytest.raises(ValueError, match=r"^scenes.py: split got 'dev', want one of train, val, test$"):
        scenes.scene_ids("dev", 2)
