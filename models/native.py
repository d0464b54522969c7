"""Opens networks that transformers knows from a folder of config.json and safetensors: no code, no pickle."""
import re
from pathlib import Path

import torch

from runtime.files import Refusal, Tensors, read_json, refuse
from runtime.weights import check_weights


def weight_files(folder):
    """Safetensors files that hold a folder's weights, in order. raises FileNotFoundError naming what is missing."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        refuse(index, "no weight_map", "the file of each tensor")
    names = sorted(set(names.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"got no {name} in {folder}; want the weights that config.json belongs to, as "
                                    "safetensors (.bin files are pickles and are not read); fetch them again")
    return [folder / name for name in names]


def stored_weights(folder):
    """All weights of a folder: dict name on disk -> tensor. raises FileNotFoundError; Refusal for a damaged file."""
    state = {}
    for path in weight_files(folder):
        with Tensors(path) as f:
            state.update({key: f.get_tensor(key) for key in f.keys()})  # noqa: SIM118
    return state


def load_native(kind, config, state, folder, dtype="auto", unused=None, attention=None):
    """A network of transformers with its weights; names on disk are renamed to those in memory.

    transformers gets the config and the tensors, not the folder: there it would also load an adapter_config.json

    kind    its class;  config  its configuration object;  state  dict name on disk -> tensor
    dtype   of the weights ("auto": as stored)
    unused  pattern of weights that no output depends on: where a file has none they are 0
    attention  "sdpa", "eager"; None: the class's own
    raises  Refusal: weights that do not fit the config
    """
    with torch.device("meta"):
        outline = kind._from_config(config)
    for name, p in outline.named_parameters() if unused else ():
        if name not in state and re.match(unused, name):
            state = state | {name: torch.zeros(()).expand(p.shape)}
    check_weights(outline, state, folder)
    model, found = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, dtype=dtype,
                                        attn_implementation=attention)
    wrong = [str(k) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in found.get(name, ())]
    if wrong:
        raise Refusal(f"{len(wrong)} weights in {folder} do not fit config.json (first: {wrong[0]}); "
                      "want a complete checkpoint of that architecture")
    return model
