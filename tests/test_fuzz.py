"""At least 2,000 mutated files: each is valid or one line, in time, within memory; and the harness bites."""
import time

import fuzz
import numpy as np
import pytest

INPUTS = 2000


def test_no_mutated_file_is_anything_but_valid_or_refused(capsys):
    lines = []
    found = fuzz.run(INPUTS, report=lambda line, **_: lines.append(line))
    assert not found, "\n".join(f"{reader} input {i} ({path}): {what}" for reader, i, path, what in found[:3])
    assert len(lines) == len(fuzz.READERS)
    assert sum(int(line.split()[1]) for line in lines) >= INPUTS
    assert all("'refused'" in line for line in lines if not line.startswith("bank")), lines    # mutations reach it


@pytest.mark.parametrize("call, word", [
    (lambda: [][1], "IndexError"), (lambda: np.ones(3 << 30, np.uint8).sum(), "MemoryError"),
    (lambda: exec("while True: pass"), "more than"), (lambda: time.sleep(5), "more than"),
    (lambda: (_ for _ in ()).throw(ValueError("")), "no message")])
def test_the_harness_sees_what_it_looks_for(monkeypatch, call, word):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    with fuzz.bounded():
        assert word in fuzz.outcome(call)


def test_memory_that_a_reader_hides_in_its_refusal_is_seen():
    def hidden():
        try:
            np.ones(3 << 30, np.uint8)
        except MemoryError:
            raise ValueError("a damaged file") from None
    with fuzz.bounded():
        assert fuzz.outcome(hidden).startswith("memory")
