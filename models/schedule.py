"""The noise levels of a DDIM scheduler's file, the steps that a sampler takes through them, and DDIM's noise (eta).

abar     alpha^2 of x_vp = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1; one value per training timestep
time     t = sigma / (alpha + sigma), as in x_t = (1 - t) x0 + t eps: 0 is data, 1 is noise
Source: DDIM (Song et al. 2021) with diffusers' configuration keys; zero terminal SNR (Lin et al. 2023).
"""
import math

import numpy as np
import torch

from models.sd2 import check_config
from runtime.files import refuse
from runtime.weights import bounded_integer

MOST_TIMESTEPS = 10_000

# options of the file with the value that is implemented (None: any); other values and options are refused
SCHEDULER_CONFIG = dict(
    prediction_type="v_prediction", clip_sample=False, thresholding=False, num_train_timesteps=None, beta_start=None,
    beta_end=None, beta_schedule="scaled_linear", rescale_betas_zero_snr=None, timestep_spacing=None,
    set_alpha_to_one=None, steps_offset=None, clip_sample_range=None, dynamic_thresholding_ratio=None,
    sample_max_value=None, skip_prk_steps=None, variance_type=None)
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")      # of one kind of noise; we sample by the first
SCHEDULER_NEEDS = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing")


class Schedule:
    """Noise levels of the training timesteps and the timesteps that a sampler visits.

    config  scheduler_config.json, a dict
    forced  options that a family sets, whatever the file says: it samples by DDIM, whoever else wrote the file
    .abar   (n,) float64, decreasing;  .final  abar after the last step;  .t  (n,) float64, our times, increasing
    raises  ValueError: a scheduler or an option that is not implemented
    """

    def __init__(self, config, **forced):
        self.config = config
        config = config | forced
        check_config(config, SCHEDULER_CONFIG, "scheduler/scheduler_config.json", SCHEDULER_NEEDS)
        known = SCHEDULERS if forced else SCHEDULERS[:1]
        if config.get("_class_name", known[0]) not in known:
            raise ValueError(f"predictor: scheduler_config.json has _class_name = {config['_class_name']!r}, which is "
                             f"not implemented; want {' or '.join(map(repr, known))}")
        self.spacing = config.get("timestep_spacing", "leading")
        if self.spacing not in ("trailing", "leading"):
            raise ValueError(f"predictor: scheduler_config.json has timestep_spacing = {self.spacing!r}, which is not "
                             "implemented; want 'trailing' or 'leading'")
        where = "predictor: scheduler_config.json"
        n = bounded_integer(config.get("num_train_timesteps", 1000), 2, MOST_TIMESTEPS, "num_train_timesteps", where)
        self.offset = bounded_integer(config.get("steps_offset", 0), 0, n - 1, "steps_offset", where)
        if not 0 < config["beta_start"] <= config["beta_end"] < 1:
            refuse(where, f"beta {config['beta_start']}..{config['beta_end']}", "0 < beta_start <= beta_end < 1")
        root = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, n)
        alpha = np.sqrt(np.cumprod(1 - root**2))
        if config.get("rescale_betas_zero_snr"):                                # Lin et al. 2023, algorithm 1
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        self.abar = alpha**2
        self.final = 1.0 if config.get("set_alpha_to_one", True) else float(self.abar[0])
        level = np.sqrt(1 - self.abar)
        self._placed = {}                                                       # device: times
        self.t = torch.from_numpy(level / (alpha + level))

    def timesteps(self, T):
        """The T timesteps a sampler visits, descending. raises ValueError when there are not so many."""
        n = len(self.abar)
        offset = self.offset if self.spacing == "leading" else 0
        if not 1 <= T <= n - offset:
            raise ValueError(f"predictor: got {T} denoising steps; want 1 .. {n - offset}")
        if self.spacing == "leading":
            return [i * (n // T) + offset for i in range(T)][::-1]
        return (np.round(n - np.arange(T) * n / T).astype(int) - 1).tolist()

    def times_on(self, device):
        """The times `t` on a device, copied there once."""
        if device not in self._placed:
            self._placed[device] = self.t.to(device)
        return self._placed[device]

    def steps(self, T, quirk=False):
        """(timestep, abar there, abar after the step) of each step; the last ends at the scheduler's final abar.

        quirk  True: each step ends at timestep - n // T, as in diffusers. When T does not divide n, that is not
               the next timestep
        """
        visited = self.timesteps(T)
        n = len(self.abar)
        after = [t - n // T for t in visited] if quirk else [*visited[1:], -1]
        return [(t, float(self.abar[t]), float(self.abar[s]) if s >= 0 else self.final)
                for t, s in zip(visited, after, strict=True)]


def flow_time(abar):
    """Time t = sigma / (alpha + sigma) of a noise level abar, a float."""
    alpha = math.sqrt(abar)
    sigma = math.sqrt(1 - abar)
    return sigma / (alpha + sigma)


def uniform_times(T):
    """T + 1 times from 1 to 0, equally far apart."""
    return [1 - i / T for i in range(T)] + [0.0]


def eta_coefficients(t, s, eta):
    """A, B, std of the DDIM step with noise eta on a rectified flow (signal 1 - t, noise level t): floats.

    raises   ValueError when not 0 <= s < t <= 1
    """
    check_times("eta_coefficients", t, s)
    signal, keep, std = eta_factors(1 - t, t, 1 - s, s, eta)
    return signal + keep, keep * (1 - t) - signal * t, std                      # x0 = x - t v, noise = x + (1 - t) v


def check_times(name, t, s):
    """Refuse a step that does not go from t down to s inside [0, 1]: ValueError."""
    if not 0 <= s < t <= 1:
        raise ValueError(f"predictor.{name}: got t = {t}, s = {s}; want 0 <= s < t <= 1 "
                         "(sampling walks t from 1 to 0)")


def eta_factors(signal, level, signal_s, level_s, eta):
    """Factors of x0 and of the noise in the mean, and std, for x = signal x0 + level noise and the same at s.

    Python floats (fp64) and clamped radicands: in fp32 eta = 1 with signal = 0 would round below zero.
    """
    gap = max(0.0, level**2 - (signal / signal_s * level_s) ** 2) if signal_s > 0 else 0.0
    var = min(eta**2 * level_s**2 / level**2 * gap, level_s**2)
    return signal_s, math.sqrt(max(0.0, level_s**2 - var)), math.sqrt(var)
