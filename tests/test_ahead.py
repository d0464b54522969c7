"""ahead.py: results in order, few at a time, errors in their turn."""
import threading
import time

import pytest

from runtime.ahead import work_ahead


def test_results_come_in_order_and_not_too_far_ahead():
    begun = []

    def late(i):
        begun.append(i)
        time.sleep(0.01 if i % 3 == 0 else 0)
        return i * i
    for i, result in enumerate(work_ahead(late, range(20), depth=4)):
        assert result == i * i and max(begun) <= i + 4
    assert sorted(begun) == list(range(20)) and list(work_ahead(late, (), depth=4)) == []


def test_an_error_comes_in_its_turn_and_no_thread_stays():
    def divide(i):
        return 1 // (3 - i)
    before = threading.active_count()
    results = work_ahead(divide, range(9), depth=9)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before
