"""What a step costs a GPU beside arithmetic: no more than the numbers of bench/RESULTS.md (counts.py prints them)."""
import pytest
import torch
from counts import count_step

HELD = dict(waits=2, copies=8, launches=3404, casts=788)         # of a GRPO step of preset small, kernels in torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted on the stand-in")
def test_a_grpo_step_of_preset_small_keeps_its_counts():
    found, kinds = count_step("small, GRPO")
    assert all(found[k] <= HELD[k] for k in HELD), (found, kinds)
