"""Command lines: a parser whose errors are one line, and the flags of train.py, made from its settings.

The comment behind a setting in the source is its help text, and the line ends with its values in the presets. `--help`
shows the first groups, `--help-all` every one.
"""
import argparse
import dataclasses
import functools
import inspect
import os
import re
import sys

from runtime import files
from runtime.config import ESTIMATORS, GROUPS, PRESETS, Config, default_preset, flag_of, problem, setting_type
from runtime.weights import add_flip

SHOWN = 3                            # groups of settings in the short help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr and exit code 2."""

    def error(self, message):
        if os.environ.get("LOCAL_RANK", "0") == "0":                            # once, not once a process
            print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)

    def limits(self):
        """Add the flags of a command that reads pictures."""
        self.add_argument("--max-pixels", type=int, default=files.PIXELS, metavar="N",
                          help=f"refuse a photo or map of more pixels before it is decoded [{files.PIXELS}]")

    def flip(self):
        """Add the flag for normals of a network of which nothing says where x points."""
        self.add_argument("--flip-x", choices=("yes", "no"), default="", metavar="yes|no",
                          help="Sapiens2 alone: whether x of its normals points left and is to be negated "
                               "(docs/models.md says how to see it)")

    def parse_args(self, *args):
        """As ArgumentParser's; the limit on pictures is set."""
        found = super().parse_args(*args)
        if (most := getattr(found, "max_pixels", None)) is not None:
            if most < 1:
                self.error(f"--max-pixels {most}: want at least 1")
            files.set_max_pixels(most)
        return found

    def at_least(self, args, least, *names):
        """Refuse a flag below a bound; one that was not given (None) passes."""
        for name in names:
            value = getattr(args, name)
            if value is not None and value < least:
                self.error(f"{flag_of(name)} {value}: want at least {least}")


class _HelpAll(argparse.Action):
    def __call__(self, parser, *_):
        _train_parser(everything=True).print_help()
        raise SystemExit(0)


def show_value(value):
    """A value as it is typed."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value) or "-"


def show_presets(field):
    """The values of a setting: in each preset, or the one that all have."""
    values = {name: show_value(PRESETS[name].get(field.name, field.default))
              for name in ("paper", "mini", "small", "tune")}
    one = len(set(values.values())) == 1
    return f"[{values['mini'] if one else ', '.join(f'{k} {v}' for k, v in values.items())}]"


def _items(read):
    """A function that reads values between commas."""
    def values(text):
        return tuple(read(part) for part in text.split(","))
    values.__name__ = f"{read.__name__} between commas"
    return values


def read_setting(text):
    """A setting written as NAME=VALUE -> (name, value). raises ValueError: no such setting, or another type."""
    name, _, value = text.partition("=")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    name = name.replace("-", "_")
    if name not in fields:
        raise ValueError(text)
    kind, choices, _ = setting_type(fields[name])
    if kind is bool:
        choices, kind = ("yes", "no"), "yes".__eq__
    if choices and value not in choices:
        raise ValueError(text)
    return name, (_items(kind) if isinstance(fields[name].default, tuple) else kind)(value)


@functools.cache
def help_texts(group):
    """The comment behind every setting of a group's class: dict name -> text."""
    return dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(group), re.M))


def _add_setting(group, field, text, is_shown):
    kind, choices, _ = setting_type(field)
    about = f"{text} {show_presets(field)}".replace("%", "%%") if is_shown else argparse.SUPPRESS
    form = dict(default=argparse.SUPPRESS, help=about)
    if kind is bool:
        return group.add_argument(flag_of(field.name), action=argparse.BooleanOptionalAction, **form)
    letter = {int: "N", float: "X", str: "TEXT"}[kind]
    read = _items(kind) if isinstance(field.default, tuple) else kind
    return group.add_argument(flag_of(field.name), type=read, choices=choices,
                              metavar="|".join(choices) if choices else letter, **form)


def _train_parser(everything=False):
    p = Parser(prog="train.py", allow_abbrev=False, usage="train.py [--preset PRESET] [--stage STAGE] [SETTINGS]",
               description="Train a base predictor, a judge, and the predictor by GRPO against the judge.",
               formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=170))
    p.add_argument("--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS,
                   help="every setting: departures, networks, memory, saving")
    p.add_argument("--preset", choices=list(PRESETS), default=None, metavar="|".join(PRESETS),
                   help="mini: 2 CPU cores; small: one GPU; paper: its numbers; tune: your network "
                        "[tune for grpo with --policy, --judge, --images, else mini]")
    p.add_argument("--estimator", choices=list(ESTIMATORS), default=None, metavar="|".join(ESTIMATORS),
                   help="how rewards become a gradient: as in the paper, or around the pairs' points [the preset's]")
    p.add_argument("--dry-run", action="store_true", help="print the settings and the batch arithmetic, then stop")
    p.flip()
    p.limits()
    for i, kind in enumerate(GROUPS):
        is_shown = everything or i < SHOWN
        text = help_texts(kind)
        group = p.add_argument_group(kind.__doc__) if is_shown else p
        for field in dataclasses.fields(kind):
            _add_setting(group, field, text[field.name], is_shown)
    return p


def parse(argv=None):
    """Build a Config: defaults < preset < estimator < flags; returns (preset, Config, dry_run).

    Exits with 2 on an error, in one line.
    """
    p = _train_parser()
    flags = vars(p.parse_args(argv))
    flags.pop("max_pixels")
    preset, dry_run, flip_x = (flags.pop(name) for name in ("preset", "dry_run", "flip_x"))
    preset = preset or default_preset(flags)
    estimator = ESTIMATORS.get(flags.pop("estimator"), {})
    cfg = dataclasses.replace(Config(), **{**PRESETS[preset], **estimator, **flags})
    cfg.out = cfg.out or f"out/{preset}"
    if flip_x and not cfg.policy:
        p.error(f"--flip-x {flip_x} is said of --policy, which is not given")
    cfg.policy = add_flip(cfg.policy, flip_x)
    wrong = problem(cfg, preset)
    if wrong:
        p.error(wrong)
    return preset, cfg, dry_run
