"""lora.py: a fresh adapter is nothing, the product and its gradients, merging, PEFT's files both ways, refusals."""
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from expect import edit, refused, seeded
from safetensors.torch import load_file, save_file

from models import lora

TARGETS = ("to_q", "to_out.0")
ROUNDING = 1e-6                    # fp32, sums of 6 to 8 numbers near 1 in another order


class Layer(nn.Module):
    """Projections under names as the networks have them; `other_to_q` must not be taken for `to_q`."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.other_to_q = nn.Linear(8, 6, bias=False), nn.Linear(8, 6), nn.Linear(8, 6)
        self.to_out = nn.ModuleList([nn.Linear(6, 8)])
        self.conv = nn.Conv1d(8, 8, 1)                                          # not a linear layer, and not used

    def forward(self, x):                                                       # (B, L, 8)
        return self.to_out[0](torch.tanh(self.to_q(x) + self.to_k(x) * self.other_to_q(x)))


def network(seed=0):
    net = nn.ModuleDict({"blocks": nn.ModuleList([Layer(), Layer()])})
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(std=0.4, generator=seeded(100 * seed + i))
    return net.eval()


def run(net, x):
    net = getattr(net, "base_model", net)                                       # PEFT wraps twice
    net = getattr(net, "model", net)
    for block in net["blocks"]:
        x = block(x)
    return x


def adapted(r=3, alpha=6, dropout=0.0, seed=0):
    """A network whose adapters act: B is random too."""
    net = network()
    lora.inject(net, TARGETS, r, alpha, dropout, seeded(seed))
    with torch.no_grad():
        for i, layer in enumerate(lora.adapters(net).values()):
            layer.lora_B.normal_(std=0.3, generator=seeded(50 + i))
    return net.eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=seeded(9))


# the adapter ------------------------------------------------------------------------------------------------------

def test_a_fresh_adapter_changes_nothing_bit_for_bit(x):
    net = network()
    before = run(net, x)
    lora.inject(net, TARGETS, 3, 6, rng=seeded())
    assert torch.equal(run(net, x), before)


def test_an_adapter_adds_alpha_over_r_times_b_a_x(x):
    base = nn.Linear(8, 6)
    layer = lora.LoRALinear(base, 3, 12, rng=seeded())
    nn.init.normal_(layer.lora_B, generator=seeded(1))
    want = x @ base.weight.T + base.bias + 4 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), want, rtol=ROUNDING, atol=10 * ROUNDING)                # values up to 10


def test_only_the_adapters_have_gradients(x):
    net = adapted()
    run(net, x).square().sum().backward()
    assert {k for k, p in net.named_parameters() if p.grad is not None} == {
        f"{path}.{k}" for path in lora.adapters(net) for k in ("lora_A", "lora_B")}
    assert all(p.grad is None or p.grad.any() for p in net.parameters())


def test_an_adapted_layer_is_frozen_by_itself():
    assert not any(p.requires_grad for p in lora.LoRALinear(nn.Linear(8, 6), 3, 6).base.parameters())


def test_a_fresh_adapter_gets_a_gradient_in_b_and_none_in_a(x):
    net = network()
    lora.inject(net, TARGETS, 3, 6, rng=seeded())
    run(net, x).square().sum().backward()
    assert all(m.lora_B.grad.any() and not m.lora_A.grad.any() for m in lora.adapters(net).values())


def test_a_starts_uniform_within_one_over_the_root_of_the_inputs():
    start = lora.LoRALinear(nn.Linear(64, 5), 40, 40, rng=seeded()).lora_A
    assert start.abs().max() <= 1 / 8 and start.abs().max() > 0.99 / 8
    assert abs(start.mean()) < 0.005 and abs(start.std() * 8 - 3**-0.5) < 0.02       # 2560 draws: three std errors


def test_a_target_is_the_end_of_a_path_at_a_dot():
    net = network()
    assert lora.inject(net, TARGETS, 3, 6) == [f"blocks.{i}.{t}" for i in range(2) for t in TARGETS]


def test_a_whole_path_is_a_target_too():
    assert lora.inject(network(), ("blocks.1.to_k",), 3, 6) == ["blocks.1.to_k"]


def test_seeds_give_the_same_and_other_adapters():
    one, same, other = ([m.lora_A for m in lora.adapters(adapted(seed=s)).values()] for s in (0, 0, 1))
    assert all(map(torch.equal, one, same)) and not any(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[2])                                      # two layers of one shape


def test_injecting_with_a_generator_leaves_the_global_random_state_alone():
    net = network()
    before = torch.get_rng_state()
    lora.inject(net, TARGETS, 3, 6, rng=seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_acts_in_training_only(x):
    net, plain = adapted(dropout=0.5), adapted()
    assert torch.equal(run(net, x), run(plain, x))
    net.train()
    assert not torch.equal(run(net, x), run(net, x))


def test_dropout_zeroes_inputs_of_a_and_leaves_the_base_whole():
    base = nn.Linear(8, 6)
    layer = lora.LoRALinear(base, 3, 6, 0.5, seeded()).train()
    nn.init.normal_(layer.lora_B, generator=seeded(1))
    x = torch.randn(1, 8, generator=seeded(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        got = layer(x)
        torch.manual_seed(0)
        dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(got - base(x), 2 * dropped @ layer.lora_A.T @ layer.lora_B.T, rtol=1e-4, atol=1e-5)


def test_a_half_precision_base_keeps_its_dtype_and_fp32_adapters(x):
    net = network().bfloat16()
    lora.inject(net, TARGETS, 3, 6, rng=seeded())
    assert run(net, x.bfloat16()).dtype == torch.bfloat16
    assert all(m.lora_A.dtype == m.lora_B.dtype == torch.float32 for m in lora.adapters(net).values())


def test_switched_off_adapters_are_the_base_bit_for_bit(x):
    net = adapted()
    assert (run(net, x) - run(network(), x)).abs().max() > 0.01
    lora.disable(net)
    assert torch.equal(run(net, x), run(network(), x))


def test_switching_off_nothing_is_allowed(x):
    net = network()
    lora.disable(net)
    assert torch.equal(run(net, x), run(network(), x)) and lora.adapters(net) == {}


# merging ----------------------------------------------------------------------------------------------------------

def test_merging_keeps_the_output(x):
    net = adapted()
    before = run(net, x)
    lora.merge(net)
    torch.testing.assert_close(run(net, x), before, rtol=0, atol=10 * ROUNDING)
    assert not lora.adapters(net)


def test_merging_gives_back_the_names_and_leaves_other_weights_alone():
    net, base = adapted(), network().state_dict()
    lora.merge(net)
    state = net.state_dict()
    assert list(state) == list(base)
    changed = {k for k in base if not torch.equal(state[k], base[k])}
    assert changed == {f"blocks.{i}.{t}.weight" for i in range(2) for t in TARGETS}


def test_the_merged_state_is_the_state_after_merging_bit_for_bit():
    net = adapted()
    state = {k: v.clone() for k, v in lora.merged_state(net).items()}
    assert len(lora.adapters(net)) == 4                                         # merged_state leaves the network
    lora.merge(net)
    want = net.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[k], want[k]) for k in want)


def test_the_merged_state_loads_into_a_plain_network(x):
    net, plain = adapted(), network(seed=1)
    plain.load_state_dict(lora.merged_state(net))
    torch.testing.assert_close(run(plain, x), run(net, x), rtol=0, atol=10 * ROUNDING)


def test_the_merged_state_of_a_network_without_adapters_is_its_own():
    net = network()
    state = lora.merged_state(net)
    assert list(state) == list(net.state_dict()) and all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())


def test_a_half_precision_base_is_merged_in_fp32_and_keeps_its_dtype():
    layer = lora.LoRALinear(nn.Linear(8, 6).bfloat16(), 3, 6, rng=seeded())
    nn.init.normal_(layer.lora_B, generator=seeded(1))
    want = (layer.base.weight.float() + 2 * layer.lora_B @ layer.lora_A).bfloat16()
    assert layer.merged_weight().dtype == torch.bfloat16 and torch.equal(layer.merged_weight(), want)


# files ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    lora.save_adapter(adapted(), tmp_path / "adapter", base="some/base")
    return tmp_path / "adapter"


def test_a_saved_adapter_reads_back_bit_for_bit(folder, x):
    net = network()
    lora.load_adapter(net, folder)
    assert torch.equal(run(net, x), run(adapted(), x))
    assert [(m.r, m.alpha) for m in lora.adapters(net).values()] == [(3, 6)] * 4


def test_the_files_are_in_pefts_layout(folder):
    shapes = {k: tuple(v.shape) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    want = {}
    for i in range(2):
        for t, (cin, cout) in {"to_q": (8, 6), "to_out.0": (6, 8)}.items():
            want[f"base_model.model.blocks.{i}.{t}.lora_A.weight"] = (3, cin)
            want[f"base_model.model.blocks.{i}.{t}.lora_B.weight"] = (cout, 3)
    cfg = json.loads((folder / "adapter_config.json").read_text())
    assert shapes == want and (cfg["peft_type"], cfg["r"], cfg["lora_alpha"], cfg["bias"]) == ("LORA", 3, 6, "none")
    assert cfg["base_model_name_or_path"] == "some/base" and cfg["fan_in_fan_out"] is False


def test_the_dropout_of_a_saved_adapter_is_kept(tmp_path):
    lora.save_adapter(adapted(dropout=0.25), tmp_path)
    net = network()
    lora.load_adapter(net, tmp_path)
    assert {m.dropout for m in lora.adapters(net).values()} == {0.25}


def gradients(net, x):
    """Gradients of the adapters by place, whatever wraps the network."""
    run(net, x).square().sum().backward()
    clean = lambda k: k.replace("base_model.model.", "").replace(".default.weight", "")  # noqa: E731
    return {clean(k): p.grad for k, p in net.named_parameters() if p.grad is not None}


def assert_equal_gradients(a, b):
    assert a.keys() == b.keys() and len(a) == 8
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-4)                       # fp32, gradients up to 100


def test_peft_reads_what_is_written_here(folder, x):
    peft = pytest.importorskip("peft")
    theirs, ours = peft.PeftModel.from_pretrained(network(), folder, is_trainable=True).eval(), adapted()
    torch.testing.assert_close(run(theirs, x), run(ours, x), rtol=0, atol=10 * ROUNDING)
    assert_equal_gradients(gradients(theirs, x), gradients(ours, x))


def test_what_peft_writes_is_read_here(tmp_path, x):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(network(), peft.LoraConfig(r=3, lora_alpha=12, target_modules=list(TARGETS),
                                                            init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path)
    ours = network()
    lora.load_adapter(ours, tmp_path)
    torch.testing.assert_close(run(ours.eval(), x), run(theirs, x), rtol=0, atol=10 * ROUNDING)
    assert_equal_gradients(gradients(ours, x), gradients(theirs, x))


# refusals ---------------------------------------------------------------------------------------------------------

def test_a_target_that_names_no_linear_layer_is_refused():
    for target in ("to_z", "conv", "q"):
        refused(ValueError, lambda target=target: lora.inject(network(), ("to_q", target), 3, 6), repr(target))


def test_a_refused_injection_changes_nothing():
    net = network()
    with pytest.raises(ValueError, match="to_z"):
        lora.inject(net, ("to_q", "to_z"), 3, 6)
    assert not lora.adapters(net) and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused_by_name(folder, name):
    (folder / name).unlink()
    refused(FileNotFoundError, lambda: lora.load_adapter(network(), folder), name, str(folder))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_cut_short_is_refused(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    refused(ValueError, lambda: lora.load_adapter(network(), folder), str(folder / name), "fetch it again")


@pytest.mark.parametrize("option, value", [("use_dora", True), ("use_rslora", True), ("rank_pattern", {"to_q": 8}),
                                           ("alpha_pattern", {"to_q": 8}), ("modules_to_save", ["conv"])])
def test_another_kind_of_lora_is_refused_by_its_option(folder, option, value):
    edit(folder / "adapter_config.json", **{option: value})
    refused(ValueError, lambda: lora.load_adapter(network(), folder), option)


def test_another_kind_of_adapter_is_refused_by_name(folder):
    edit(folder / "adapter_config.json", peft_type="LOHA")
    refused(ValueError, lambda: lora.load_adapter(network(), folder), "'LOHA'")


def tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_a_key_that_matches_no_layer_is_refused_by_name(folder):
    def change(state):
        for k in "AB":
            state[f"base_model.model.blocks.7.to_q.lora_{k}.weight"] = torch.zeros(3, 3)
    tensors(folder, change)
    refused(ValueError, lambda: lora.load_adapter(network(), folder), "blocks.7.to_q")


def test_half_an_adapter_is_refused_by_name(folder):
    key = "base_model.model.blocks.1.to_q.lora_B.weight"
    tensors(folder, lambda state: state.pop(key))
    refused(ValueError, lambda: lora.load_adapter(network(), folder), key)


def test_a_convolutions_adapter_is_refused(folder):
    def change(state):
        for k in "AB":
            state[f"base_model.model.blocks.0.conv.lora_{k}.weight"] = torch.zeros(3, 3)
    tensors(folder, change)
    refused(ValueError, lambda: lora.load_adapter(network(), folder), "blocks.0.conv")


def test_an_adapter_of_another_width_is_refused_with_both_shapes(folder):
    key = "base_model.model.blocks.1.to_q.lora_A.weight"
    tensors(folder, lambda state: state.update({key: torch.zeros(3, 9)}))
    refused(ValueError, lambda: lora.load_adapter(network(), folder), "blocks.1.to_q.lora_A", "(3, 9)", "(3, 8)")


def test_a_rank_that_contradicts_the_config_is_refused(folder):
    edit(folder / "adapter_config.json", r=4)
    refused(ValueError, lambda: lora.load_adapter(network(), folder), "lora_A: got (3, 6), want (4, 6)")


def test_a_frozen_copy_with_adapters_off_shares_the_base_and_is_it(x):
    from models.copies import frozen_copy
    net = adapted()
    ref = frozen_copy(net)
    lora.disable(ref)
    assert torch.equal(run(ref, x), run(network(), x)) and not torch.equal(run(net, x), run(ref, x))
    for path, layer in lora.adapters(net).items():
        copied = ref.get_submodule(path)
        assert copied.base.weight is layer.base.weight and copied.lora_A is not layer.lora_A


def test_an_adapter_put_into_a_network_in_evaluation_is_in_evaluation():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    lora.inject(network, ("0",), 2, 2, dropout=0.5)
    assert not network[0].training
