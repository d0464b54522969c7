"""The weights of a folder: which safetensors files make one complete set, and what a save must not leave beside it.

sets   STEM.safetensors; the shards of STEM.safetensors.index.json; the same two in 16 bits, STEM.fp16.safetensors and
       STEM.safetensors.index.fp16.json. The first that is complete is read: transformers looks in this order too
"""
import functools
import re
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from runtime.files import Tensors, read_json, refuse
from runtime.weights import check_weights, plain_name

VARIANTS = ("", ".fp16")


def weight_files(folder, stem):
    """Paths of the files of the first complete set, sorted; a second one beside it is said.

    raises  FileNotFoundError naming what is missing; Refusal: an index that is none
    """
    folder = Path(folder)
    missing = []
    for variant in VARIANTS:
        index = folder / f"{stem}.safetensors.index{variant}.json"
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            if index.is_file():
                say_once(f"{folder} holds {single.name} and {index.name}; the first is read, as transformers does")
            return [single]
        names = _shards(index) if index.is_file() else []
        lacking = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if names and not lacking:
            return [folder / name for name in names]
        missing += lacking
    raise FileNotFoundError(f"got no {missing[0] if missing else f'{stem}.safetensors or {stem}.fp16.safetensors'} in "
                            f"{folder}; want the weights that config.json belongs to, as safetensors (.bin files are "
                            "pickles and are not read); fetch them again")


def _shards(index):
    """Names of the files that an index names, sorted. raises Refusal."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        refuse(index, "no weight_map", "the file of each tensor")
    return sorted(set(names.values()))


def read_weights(folder, stem):
    """Tensors of a folder's first complete set: dict name -> tensor, as torch.compile and the like leave no mark.

    raises  as weight_files; Refusal for a damaged file
    """
    state = {}
    for path in weight_files(folder, stem):
        with Tensors(path) as f:
            state |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    plain = {plain_name(key): value for key, value in state.items()}
    return plain if len(plain) == len(state) else state


def build_network(kind, config, state, where, dtype, unused=None, attention=None):
    """Make a network of a class `kind` of transformers from its config and tensors. raises Refusal: they do not fit.

    unused     pattern of weights that no output depends on: where a file has none they are 0
    attention  implementation of transformers; None: its choice

    transformers gets config and tensors, not the folder: there it would also load an adapter_config.json. What it would
    report on many lines is one line here
    """
    with torch.device("meta"):
        outline = kind._from_config(config)
    for name, p in outline.named_parameters() if unused else ():
        if name not in state and re.match(unused, name):
            state = state | {name: torch.zeros(()).expand(p.shape)}
    check_weights(outline, state, where)
    loud = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        network, found = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True,
                                              dtype=dtype, attn_implementation=attention)
    finally:
        logging.set_verbosity(loud)
    wrong = [str(k) for group in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in found.get(group, ())
             if not str(k).endswith("position_ids")]                            # of older files; no weight
    if wrong:
        refuse(where, f"{len(wrong)} weights that do not fit config.json (first: {wrong[0]})",
               "a complete checkpoint of that architecture")
    return network


def set_files(folder, stem):
    """Names of all files in a folder that may belong to a set: a save replaces every one of them."""
    stem = re.escape(stem)
    file = re.compile(rf"{stem}(\.fp16)?(-\d+-of-\d+)?\.safetensors|{stem}\.safetensors\.index(\.fp16)?\.json")
    return [p.name for p in Path(folder).iterdir() if file.fullmatch(p.name)] if Path(folder).is_dir() else []


def keep_one_set(folder, stem):
    """Remove all sets but STEM.safetensors, which has just been written."""
    for name in set_files(folder, stem):
        if name != f"{stem}.safetensors":
            (folder / name).unlink(missing_ok=True)


@functools.cache
def say_once(text):
    """Print a remark on stderr, once a process."""
    print(text, file=sys.stderr, flush=True)
