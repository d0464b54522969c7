"""The benchmark: its loop answers as `relation` does, it runs without a GPU, docs/gpu.md holds its table."""
import json
import re
from pathlib import Path

import pytest
import torch

from bench import kernels as bench


def test_the_loop_and_the_vectorised_relation_agree(monkeypatch):
    monkeypatch.setattr(bench, "LOOP_PAIRS", 500)
    rows = bench.relation_rows(n=1000, side=64)                                  # raises when an answer differs
    assert [r["case"].split(",")[0] for r in rows] == list(bench.MODALITIES) and all(r["speedup"] > 0 for r in rows)


def test_a_wrong_answer_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(bench, "LOOP_PAIRS", 500)
    monkeypatch.setattr(bench, "relation", lambda values, pts, m: torch.full((len(pts),), 2))
    with pytest.raises(ValueError, match="depth: 500 of 500 relations differ from the loop's"):
        bench.relation_rows(n=1000, side=64)


def test_a_kernel_that_differs_from_its_reference_stops_the_benchmark():
    want = torch.ones(1000)
    bench.assert_equal("op", [want + 5e-5], [want])
    with pytest.raises(ValueError, match="op: 1.00e-03 of the elements differ"):
        bench.assert_equal("op", [want + (torch.arange(1000) == 7)], [want])
    with pytest.raises(ValueError, match="differ"):
        bench.assert_equal("op", [want * torch.nan], [want])


def test_small_cases_bind_forward_and_backward_and_agree(capsys):
    bench.main(["--check"])
    assert "29 cases agree with their definitions" in capsys.readouterr().out
    for op in bench.OPS:
        for case in bench.OPS[op](torch.device("cpu"), 64):
            out = bench.bind(case, case.kernel)()
            assert op == "check_points" or out
            assert case.into < 0 or out[-1].shape == case.args[case.into].shape


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the kernels where there is a GPU")
def test_without_a_gpu_it_says_that_the_kernels_were_not_run(capsys, tmp_path):
    bench.main(["--op", "pair_reward", "--json", str(tmp_path / "b.json")])
    assert "pair_reward: not run (no GPU)" in capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    for row in found["kernels"]:
        assert row["op"] == "pair_reward" and row["eager"] == row["compile"] == row["triton"] == "not run"
        assert 0 < row["predicted"]["triton"] < row["predicted"]["eager"]        # ms, by bytes and launches


def test_a_rival_is_compiled_without_a_graph_break():
    """Both sides are on equal terms: neither checks points, which would wait."""
    for op in set(bench.OPS) - {"check_points"}:
        case = next(iter(bench.OPS[op](torch.device("cpu"), 64)))
        torch._dynamo.reset()
        found = torch._dynamo.explain(case.ref)(*case.args)
        assert (found.graph_break_count, found.graph_count) == (0, 1), op


def test_the_page_has_a_row_for_every_kernel():
    text = (Path(bench.__file__).parents[1] / "docs" / "gpu.md").read_text()
    assert all(re.search(rf"^\| `{op}` ", text, re.M) for op in bench.OPS)
