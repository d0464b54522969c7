"""Work that others do meanwhile: results computed ahead of their use, in threads."""
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor

THREADS = 2                       # each may hold a photo of 80 million pixels while it reads: 1.5 GB


def work_ahead(function, items, depth, threads=THREADS):
    """Yield function(item) of each item, in order, computed in threads while the caller uses earlier ones.

    depth   results that may be ready or under way: what bounds the memory
    raises  what the function raises, when its item's turn comes
    """
    items = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        ahead = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
