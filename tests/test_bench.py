"""The memory table: what is counted is what autograd keeps."""
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import marigold

TINY = dict(bench.SD2["unet"], block_out_channels=[32, 64], attention_head_dim=[2, 4], norm_num_groups=8,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])


def counted(px):
    with FakeTensorMode():
        return bench.activations(marigold.UNet(TINY), px)


def test_tensors_without_data_are_counted_like_real_ones():
    assert counted(64) == bench.activations(marigold.UNet(TINY), 64)


def test_counting_restores_what_it_replaced():
    before = marigold.UNet._layer, torch.nn.functional.group_norm, torch.nn.functional.layer_norm
    counted(64)
    assert (marigold.UNet._layer, torch.nn.functional.group_norm, torch.nn.functional.layer_norm) == before


def test_activations_grow_with_the_pixels_and_shrink_by_checkpointing():
    small, large = counted(64), counted(128)
    assert small[1] < 0.5 * small[0] and large[1] < 0.5 * large[0]
    assert large[0] > 1.5 * small[0]                                            # weights in bf16 are kept once


def test_each_state_adds_the_same_bytes_to_the_bf16_copies_of_the_weights():
    unet = marigold.UNet(TINY)
    one, two, three = (bench.activations(unet, 64, batch=b)[0] for b in (1, 2, 3))
    copies = 2 * sum(p.numel() for p in unet.parameters() if p.ndim > 1)        # matrices and convolutions
    assert two - one == three - two > 0
    assert 0.5 * copies < one - (two - one) < copies                            # those of the text and time inputs go


def test_the_documentation_holds_the_computed_table():
    text = (Path(bench.__file__).parent / "docs" / "marigold.md").read_text()
    for r in bench.memory():
        assert (f"| {r['px']} | {r['training']} | {'yes' if r['checkpointing'] else 'no'} | {r['state_gb']:.1f} | "
                f"{r['activations_gb']:.1f} | {r['total_gb']:.1f} | {r['card_gb']} | {r['with_judge_gb']:.1f} | "
                f"{r['with_judge_card_gb']} |") in text

