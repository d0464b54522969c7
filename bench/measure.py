"""How a figure is measured: the sizes, a row for each measurement, the clock, the rates that set the limits.

On a CPU every row runs once at the tiny size, untimed; a figure without a measurement is None.
"""
import contextlib
import gc
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

import kernels
from bench.arithmetic import JUDGE, SD2, count_flops
from runtime.config import UserError
from runtime.files import read_json

NOT_RUN = "not run"
# what one row may raise: memory, a wrong result, a compiler (Triton calls gcc and passes on its CalledProcessError)
FAILURES = (RuntimeError, ValueError, OSError, subprocess.SubprocessError, kernels.TritonError)
MINUTES = 8.5                     # of a run: rows that are not begun by then read "not run"
TINY_SD2 = SD2 | dict(
    unet=SD2["unet"] | dict(
        layers_per_block=1, block_out_channels=[32, 64], attention_head_dim=[2, 4], norm_num_groups=8,
        cross_attention_dim=24, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"]),
    vae=SD2["vae"] | dict(layers_per_block=1, block_out_channels=[16, 32, 32, 32], norm_num_groups=8))
TINY_JUDGE = JUDGE | dict(
    force_image_size=56,
    vision_config=JUDGE["vision_config"] | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                num_attention_heads=2),
    llm_config=JUDGE["llm_config"] | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                          num_attention_heads=2, vocab_size=512))
PROMPT = 440                      # tokens of image, system text and one question with the published tokenizer


@dataclass(frozen=True)
class Sizes:
    """What is measured on a GPU; or, at a tiny size, only run."""

    sd2: dict                 # configs of U-Net, VAE, scheduler
    judge: dict               # config.json of the judge
    prompt: int               # tokens of one question with its image
    sides: tuple              # px of the photos of the policy
    group: int                # G
    steps: int                # T; the tiny one divides 1000, where diffusers' steps end as ours do
    pairs: int                # P, point pairs of a photo
    batches: tuple            # marked images that the judge sees at once
    matrix: int               # side of the matrices whose product gives the rate
    cut: int                  # the kernels' sizes are divided by it
    runs: int                 # timed calls


GPU = Sizes(SD2, JUDGE, PROMPT, (512, 768), 8, 15, 40, (8, 32, 128), 8192, 1, 5)
TINY = Sizes(TINY_SD2, TINY_JUDGE, 60, (32, 48), 2, 5, 4, (1, 2, 3), 64, 64, 1)    # its rows bear the names of GPU's


@dataclass
class Row:
    """One measurement. Times in ms of a call (median, least, greatest); None: not run."""

    part: str
    what: str
    unit: str = ""                # what one call makes, "8 answers"
    ms: float = None
    low: float = None
    high: float = None
    tflop: float = None           # of a call, at full size
    of_limit: float = None        # limit / time
    instead: str = ""             # what one would do otherwise
    instead_ms: float = None
    least: float = None           # goal for of_limit
    least_times: float = None     # goal for instead_ms / ms
    note: str = ""

    @property
    def times(self):
        """How many times faster than `instead`."""
        return self.instead_ms / self.ms if self.ms and self.instead_ms else None

    def goal(self):
        """The goals and whether they are reached, in words."""
        words = []
        for least, got, form in ((self.least, self.of_limit, "{:.0%} of the limit"),
                                 (self.least_times, self.times, "{:g} times")):
            if least:
                words.append(f"{form.format(least)}: {NOT_RUN if got is None else 'yes' if got >= least else 'missed'}")
        return ", ".join(words) or "-"


class Bench:
    """The rows of one run, its rates and its deadline. dry: on a CPU, where functions run once and nothing is timed."""

    def __init__(self, device, minutes=MINUTES):
        self.device = device
        self.dry = device.type == "cpu"
        self.sizes = TINY if self.dry else GPU
        self.rows = []                                                          # Row
        self.memory = []                                                        # rows of the memory table
        self.kernels = {}                                                       # figures of bench.kernels
        self.failed = []                                                        # names of rows and parts
        self.judge = None                                                       # of judge_part, for later parts
        self.peer_ms = {}                                                       # px -> ms of the loop with diffusers
        self.tflops = None                                                      # rate of a bf16 product, TFLOP/s
        self.copy = None                                                        # rate of a copy, GB/s
        self.deadline = time.monotonic() + 60 * minutes

    def clock(self, call, runs=None):
        """Median, least and greatest ms, after a call that is not timed; on a CPU one call and (None, None, None)."""
        call()
        if self.dry:
            return None, None, None
        times = []
        for _ in range(runs or self.sizes.runs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times), min(times), max(times)

    def attempt(self, what, call=None, make=None, runs=None):
        """Times of a call and "", or (None, None, None) and why there are none. A failure costs no other row.

        what  name for the terminal;  call  function of no arguments;  make  () -> call, where building it may fail
        """
        if time.monotonic() > self.deadline:
            return (None, None, None), "no time was left"
        print(what, file=sys.stderr, flush=True)
        try:
            return self.clock(make() if make else call, runs), ""
        except FAILURES as error:
            if self.dry:
                raise
            self.failed.append(what)
            return (None, None, None), " ".join(f"failed: {type(error).__name__}: {error}".split())[:200]
        finally:
            self.clear()

    def add(self, row, call=None, make=None, runs=None):
        """Measure as `attempt`, write the times into the row, keep it and return it."""
        (row.ms, row.low, row.high), why = self.attempt(f"{row.part}: {row.what}", call, make, runs)
        row.note = why or row.note
        if row.ms and row.tflop:
            row.of_limit = row.tflop / self.tflops * 1e3 / row.ms
        self.rows.append(row)
        return row

    def clear(self):
        """Give memory back that no row needs any more."""
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def new_tensors(device, dtype=torch.float32):
    """Context in which new tensors lie on a device and have a dtype."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def count_tflop(call):
    """Floating-point operations of a call, in TFLOP."""
    return count_flops(call) / 1e12


def measure_rates(bench):
    """Measure the two rates that the limits are made of: a bf16 matrix product and a copy."""
    n = bench.sizes.matrix
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    target = torch.empty_like(a)
    product_ms = bench.clock(lambda: a @ b, 20)[0]
    copy_ms = bench.clock(lambda: target.copy_(a), 20)[0]
    if product_ms:
        bench.tflops = 2 * n**3 / product_ms / 1e9
        bench.copy = 2 * a.nbytes / copy_ms / 1e6


def markdown_table(columns, lines):
    """A markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (columns, ["---"] * len(columns), *lines))


def kept_figures(path, key):
    """Figures of an earlier run, from their JSON file. raises UserError: they are of another `key`, of settings."""
    figures = read_json(path)
    if figures["key"] != key:
        raise UserError(f"{path} holds figures of other settings; use another --out, or delete {path.parent}")
    return figures
