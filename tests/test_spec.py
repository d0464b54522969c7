"""SPEC: what a name opens, in which order; classes of the user's as predictors and judges; what is refused."""
import copy
import json
import types

import pytest
import torch
from expect import enter, refused, seeded

import judge as judging
from judge import load_judge, open_judge
from models.copies import Networks
from models.wrapper import wrap
from predictor import load_predictor, plan_walk, sample_ode
from runtime.config import Config
from runtime.ranks import Draw
from runtime.weights import read_spec, weights_digest

MODULE = '''
import torch, torch.nn as nn
from relations import NAMES

class Depth(nn.Module):
    modalities = ("depth",)
    size = 16
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 1, 3, padding=1)
    def predict(self, rgb, modality):
        return self.net(rgb)

class Both(Depth):
    modalities = ("depth", "normal")
    def predict(self, rgb, modality):
        return self.net(rgb) if modality == "depth" else self.net(rgb).expand(-1, 3, -1, -1) + rgb

class Flow(nn.Module):
    modalities = ("albedo",)
    size = 16
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
    def velocity(self, x, t, cond, modality):
        return self.scale * (x - cond) / t.view(-1, 1, 1, 1)
    def decode(self, x, modality):
        return x.clamp(0, 1)

class Wrong(Depth):
    modalities = ("depht",)

class Half(nn.Module):
    modalities = ("depth",)
    size = 16
    def velocity(self, x, t, cond, modality): return x

class Grey(Depth):
    def predict(self, rgb, modality): return rgb

class Rule:
    size, grid = 16, 1
    def __init__(self): self.word = "plain"
    def digest(self): return self.word
    def ask(self, rgb, pts, names=None, modalities=None):
        return torch.full((*pts.shape[:2], len(NAMES)), 0.75)

class Kept(Rule):
    @classmethod
    def load(cls, folder):
        made = cls()
        made.word = (folder / "word.txt").read_text()
        return made

class Mute:
    size, grid = 16, 1
'''


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    enter(monkeypatch, tmp_path, mine=MODULE)


RGB = torch.rand(2, 3, 16, 16, generator=seeded(1))


# which rule a name falls under ------------------------------------------------------------------------------------

def test_the_rules_in_their_order(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").touch()
    assert read_spec("org/name").folder and not read_spec("org/name").hub       # a folder that exists comes first
    assert read_spec("org/other").hub == "org/other"                            # also where a folder `org` exists
    own = read_spec("a.b:Class")
    assert (own.module, own.name, own.folder) == ("a.b", "Class", None)
    own = read_spec("mine:Depth=org/name")
    assert (own.module, own.name) == ("mine", "Depth") and own.folder == tmp_path.__class__("org/name")
    assert own.at("out/x") == "mine:Depth=out/x" and read_spec("org/name").at("out/x") == "out/x"


@pytest.mark.parametrize("text", ["out/mimi/grpo", "./name", "../a/b", "name", "/nowhere/at/all", "a:b:c", ""])
def test_a_name_that_fits_no_rule_is_refused_with_the_rules(text):
    if text == "":
        assert read_spec(text).folder                                           # the working directory
        return
    refused(FileNotFoundError, lambda: read_spec(text), text, "ORG/NAME", "MODULE:CLASS=FOLDER")


def test_a_folder_that_is_not_there_is_no_weights_of_a_class():
    refused(FileNotFoundError, lambda: read_spec("mine:Depth=nowhere"), "nowhere", "mine:Depth")


@pytest.mark.parametrize("spec, word", [
    ("nomine:Depth", "no module 'nomine'"), ("mine:Deeth", "no class 'Deeth'"), ("mine:Half", "`decode`"),
    ("mine:Wrong", "depht"), ("mine:Rule", "torch.nn.Module")])
def test_a_class_that_is_no_predictor_is_one_line(spec, word):
    refused(ValueError, lambda: load_predictor(spec), spec, word)


def test_a_class_that_is_no_judge_is_one_line():
    refused(ValueError, lambda: load_judge("mine:Mute"), "mine:Mute", "`ask`")


def test_a_module_that_lacks_another_says_which(tmp_path):
    (tmp_path / "lacks.py").write_text("import not_there\n")
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        load_predictor("lacks:Net")


# predictors -------------------------------------------------------------------------------------------------------

def test_what_is_saved_opens_by_class_and_folder_and_by_no_file(tmp_path):
    policy = load_predictor("mine:Depth")
    with torch.no_grad():
        policy.network.net.weight += 1
    policy.save(tmp_path / "saved", base="x")
    again = load_predictor(f"mine:Depth={tmp_path / 'saved'}")
    assert torch.equal(again.network.net.weight, policy.network.net.weight)
    assert json.loads((tmp_path / "saved" / "predictor.json").read_text())["made_by"] == "mine:Depth"
    refused(ValueError, lambda: load_predictor(tmp_path / "saved"), "own", f"mine:Depth={tmp_path / 'saved'}")


def test_without_files_the_digest_is_that_of_the_weights(tmp_path):
    first = weights_digest("mine:Depth")
    assert first == weights_digest("mine:Depth") != weights_digest("mine:Flow")
    load_predictor("mine:Depth").save(tmp_path / "saved")
    assert weights_digest(f"mine:Depth={tmp_path / 'saved'}") == weights_digest(tmp_path / "saved")


def test_a_map_network_gives_its_own_map_exactly_with_any_number_of_steps():
    policy = load_predictor("mine:Both")
    noise = torch.randn(2, *policy.shape(RGB), generator=seeded(2))
    depth = policy.network.predict(RGB, "depth")
    for steps in (1, 5):
        torch.testing.assert_close(sample_ode(policy, RGB, "depth", steps, noise=noise), depth, rtol=0, atol=1e-6)
    normal = torch.nn.functional.normalize(policy.network.predict(RGB, "normal"), dim=1)
    torch.testing.assert_close(sample_ode(policy, RGB, "normal", 1, noise=noise), normal, rtol=0, atol=1e-6)


def test_exploration_is_a_share_of_the_spread_of_the_frozen_start_s_map():
    """The scale follows neither the policy nor its copies: it stays that of the start when the weights move."""
    nets = Networks(lambda: load_predictor("mine:Depth"), Config(lora=0, precision="fp32"), torch.device("cpu"))
    want = nets.policy.network.predict(RGB, "depth").flatten(1).std(1)
    with torch.no_grad():
        nets.policy.network.net.weight *= 3
    for net in (nets.policy, nets.reference, nets.average):
        torch.testing.assert_close(net.encode(RGB)[:, 3, 0, 0], want)
    plan = plan_walk(nets.policy.times(8), 7, "flow", 0.25, Draw(seeded(), 1))
    assert [(leg.A, leg.B, leg.std) for leg in plan] == [(1.0, -1.0, 0.25)]
    shared = {p.data_ptr() for p in nets.policy.start_network.parameters()}
    assert shared == {p.data_ptr() for p in nets.reference.start_network.parameters()}     # one copy in memory


def test_rows_of_several_modalities_are_given_to_a_network_one_modality_at_a_time():
    policy = load_predictor("mine:Both")
    cond = policy.encode(RGB).repeat(2, 1, 1, 1)
    x = torch.randn(4, 3, 16, 16, generator=seeded(3))
    t = torch.ones(4)
    both = policy.velocity(x, t, cond, torch.tensor([0, 0, 1, 1]))
    assert torch.equal(both[:2], policy.velocity(x[:2], t[:2], cond[:2], "depth"))
    assert torch.equal(both[2:], policy.velocity(x[2:], t[2:], cond[2:], "normal"))
    assert both.requires_grad


def test_a_flow_network_without_an_encoder_sees_the_photo():
    policy = load_predictor("mine:Flow")
    noise = torch.randn(2, 3, 16, 16, generator=seeded(4))
    torch.testing.assert_close(sample_ode(policy, RGB, "albedo", 3, noise=noise), RGB, rtol=0, atol=1e-5)
    copied = copy.deepcopy(policy)
    assert copied.network is not policy.network and copied.shape(RGB) == (3, 16, 16)


def test_a_map_of_another_shape_is_refused():
    policy = load_predictor("mine:Grey")
    refused(ValueError, lambda: sample_ode(policy, RGB, "depth", 1), "(2, 3, 16, 16)", "(2, 1, 16, 16)")


def test_recomputing_activations_wants_a_network_that_can():
    policy = load_predictor("mine:Depth")
    policy.checkpointing(False)
    refused(ValueError, lambda: policy.checkpointing(True), "mine:Depth", "checkpointing(on)")


def test_optional_members_are_taken_from_the_network():
    net = load_predictor("mine:Flow").network
    net.shape, net.times, net.multiple, net.lora_targets = lambda rgb: (5, 2, 2), lambda T: [1.0, 0.5, 0.0], 8, ("x",)
    policy = wrap(net, "mine:Flow")
    assert policy.shape(RGB) == (5, 2, 2) and policy.times(9) == [1.0, 0.5, 0.0]
    assert policy.multiple == 8 and policy.lora_targets == ("x",)


# judges -----------------------------------------------------------------------------------------------------------

def test_a_judge_of_a_class_and_of_a_folder_of_it(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "word.txt").write_text("kept")
    assert open_judge("mine:Rule").digest() == "plain"
    assert load_judge(f"mine:Kept={tmp_path / 'kept'}").digest() == "kept"
    refused(ValueError, lambda: load_judge(f"mine:Rule={tmp_path / 'kept'}"), "`load`")


def test_the_command_asks_a_judge_of_the_user_s(tmp_path, capsys, monkeypatch):
    from data.pictures import save_png
    save_png(tmp_path / "a.png", RGB[0].numpy())
    points = ["--red", "1", "2", "--green", "9", "9", "--model", "mine:Rule"]
    judging.main([str(tmp_path / "a.png"), *points, "--all"])
    out = capsys.readouterr().out
    assert out.count("p = 0.750") == 4
    with pytest.raises(SystemExit):
        judging.main([str(tmp_path / "a.png"), *points, "--text"])
    assert "generates no text" in capsys.readouterr().err


def test_the_protocols_ask_for_little():
    from judge import AnyJudge
    from predictor import MapPredictor, Predictor
    members = [{n for n in (*vars(p), *p.__annotations__) if not n.startswith("_")}
               for p in (Predictor, MapPredictor, AnyJudge)]
    assert [len(m) for m in members] == [4, 3, 4]
    assert isinstance(Predictor, type) and types.FunctionType is type(Predictor.velocity)
