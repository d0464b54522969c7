"""Networks from anywhere: how a command names one (SPEC), a bounded config, strict loading, a digest of weights."""
import hashlib
import importlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from runtime.files import checksum, is_twin, one_line, read_tensors, refuse

OWN = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)(?:=(.+))?")
FLIP = re.compile(r"(.+),flip-x=(yes|no)")
HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^?#]*).*")
NO_MODEL = ("datasets", "spaces", "collections", "papers", "docs", "blog")     # first part of the hub's other pages
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
OWN_WEIGHTS = "predictor.safetensors"
RULES = ("a folder that exists; a hub id ORG/NAME; MODULE:CLASS, a class of yours; "
         "or MODULE:CLASS=FOLDER, weights that were saved from it")
SIZE = 1 << 24                        # largest number in a network's config
LAYERS = 256                          # largest number of layers
# keys of a config with which transformers would load code, kernels or other files
LOADING = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
           "experts_implementation", "_experts_implementation", "transformers_weights", "fusion_config",
           "kernel_config")


def plain_config(config, where):
    """A network's config without the keys that load code or other files; its numbers are bounded.

    raises   Refusal: a number above SIZE, more than LAYERS layers, quantised weights
    """
    def clean(value, name):
        if isinstance(value, dict):
            if value.get("quantization_config"):
                refuse(where, "quantization_config", "plain weights", "use the checkpoint before quantisation")
            return {k: clean(v, k) for k, v in value.items() if k not in LOADING}
        if isinstance(value, list):
            return [clean(v, name) for v in value]
        most = LAYERS if any(word in name for word in ("layers", "depth")) else SIZE
        if isinstance(value, (int, float)) and not abs(value) <= most:
            refuse(where, f"{name} = {value}", f"at most {most}", "use another checkpoint")
        return value
    return clean(config, "")


def bounded_integer(value, least, most, name, where):
    """An integer of a config inside its bounds. raises Refusal."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        refuse(where, f"{name} = {value!r}", f"an integer in {least}..{most}", "use another checkpoint")
    return value


def check_weights(model, state, where):
    """Refuse a network, made on the meta device, with more parameters than its file has: loading would invent the rest.

    model  nn.Module;  state  dict of tensors;  raises  Refusal
    """
    need = sum(p.numel() for p in model.parameters())
    have = sum(x.numel() for x in state.values())
    if need > have:
        refuse(where, f"{have} weights for a network of {need}", "all of them", "use the config.json they belong to")


def plain_name(key):
    """A tensor's name without the parts that torch.compile, DataParallel and the like put around a network."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def strip_wrappers(state, want):
    """A state_dict under plain_name, if that is the whole difference to the names in `want`; else as it is."""
    plain = {plain_name(k): v for k, v in state.items()}
    return plain if state.keys() != set(want) == plain.keys() and len(plain) == len(state) else state


def load_strict(model, state, origin, assign=False):
    """load_state_dict that names the first missing, surplus or misshapen key; see strip_wrappers. raises ValueError."""
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    state = strip_wrappers(state, want)
    got = {k: tuple(v.shape) for k, v in state.items()}
    wrong = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
    if wrong:
        k = wrong[0]
        raise ValueError(f"{len(wrong)} of {len(want)} weights in {origin} do not fit (first: {k}, "
                         f"got {got.get(k)}, want {want.get(k)}); use a checkpoint of the same architecture and size")
    model.load_state_dict(state, assign=assign)


@dataclass(frozen=True)
class Spec:
    """How a command names a predictor or a judge: --policy, --checkpoint, --compare, --judge, --model.

    A name that is a folder is that folder. Else MODULE:CLASS and MODULE:CLASS=FOLDER are a class of the user's, which
    is imported from the working directory or the Python path. Else ORG/NAME, or the address of its page, is a hub id,
    also where an empty folder has that name, as a failed download leaves it. No file can name a module.
    Behind any of them `,flip-x=yes` or `,flip-x=no` may stand (`add_flip`).
    """

    text: str
    folder: Path | None = None       # that exists
    module: str = ""
    name: str = ""                   # of the class
    hub: str = ""
    flip_x: str = ""                 # yes: x of its normals is to be negated; no; "": not said
    scheme: str = ""                 # of SCHEME:PLACE, where the command knows such ones

    @property
    def place(self):
        """What stands behind SCHEME: , or a whole address SCHEME://HOST."""
        return self.text if "://" in self.text else self.text.partition(":")[2]

    def at(self, folder):
        """SPEC of what was trained from this one and saved in a folder."""
        return f"{self.module}:{self.name}={folder}" if self.module else str(folder)


def read_spec(text, schemes=()):
    """Read a SPEC by the rules of `Spec`. raises FileNotFoundError: it fits none; the line holds the rules.

    schemes  words that may stand before a colon, as in SCHEME:PLACE; no module of one of these names is looked for
    """
    text = str(text)
    said = FLIP.fullmatch(text)
    if said and not Path(text).is_dir():
        return replace(read_spec(said[1]), flip_x=said[2])
    hub = _hub_id(text)
    if text.partition(":")[0] in schemes and not hub and not Path(text).is_dir():
        return Spec(text, scheme=text.partition(":")[0])
    if Path(text).is_dir() and not (hub and _is_empty(text)):
        return Spec(text, folder=Path(text))
    own = OWN.fullmatch(text)
    if own:
        module, name, folder = own.groups()
        if folder and not Path(folder).is_dir():
            raise FileNotFoundError(f"got no folder {folder!r} for {module}:{name}; want one that was saved from it")
        return Spec(text, Path(folder) if folder else None, module, name)
    if hub:
        return Spec(hub, hub=hub)
    raise FileNotFoundError(f"got {text!r}; want {'; '.join((RULES, *(f'or {s}:PLACE' for s in schemes)))}")


def add_flip(text, flip_x):
    """SPEC with what --flip-x says ("": nothing) of the normals of a network that does not say where x points."""
    return f"{text},flip-x={flip_x}" if flip_x else text


def remove_flip(text):
    """SPEC without it."""
    said = FLIP.fullmatch(str(text))
    return said[1] if said else text


def refuse_flip(spec):
    """Refuse --flip-x of a network whose normals are known, or that has none. raises Refusal."""
    if spec.flip_x:
        refuse(spec.text, f"--flip-x {spec.flip_x}", "it where nothing says which way x of a network's normals points",
               f"leave it out; SPEC,flip-x={spec.flip_x} names one of two")


def _hub_id(text):
    """ORG/NAME of a hub id or of the address of its page; "" for another text.

    raises  FileNotFoundError: the address of another page
    """
    page = PAGE.fullmatch(text)
    name = (page[1] if page else text).rstrip("/").removesuffix("/tree/main" if page else "")
    if HUB.fullmatch(name) and name.partition("/")[0] not in NO_MODEL and not name.startswith((".", "~")):
        return name
    if page:
        raise FileNotFoundError(f"got {text!r}, which is no model's page of the hub; want a hub id ORG/NAME; for a "
                                "revision other than main, download it and name the folder")
    return ""


def _is_empty(folder):
    """Whether nothing but hidden files lies in a folder."""
    return all(path.name.startswith(".") for path in Path(folder).iterdir())


def own_class(spec):
    """The class that a SPEC names. raises ValueError: no such module, no such class in it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{spec.module}.".startswith(f"{error.name}."):
            raise                                                               # the module is there and lacks another
        raise ValueError(f"{spec.text}: got no module {spec.module!r} in {os.getcwd()!r} or on the Python path; "
                         f"want one that has a class {spec.name}") from None
    if not isinstance(getattr(module, spec.name, None), type):
        raise ValueError(f"{spec.text}: got no class {spec.name!r} in {module.__file__}; want one")
    return getattr(module, spec.name)


def open_own(spec, members=()):
    """Make an object of the user's class: CLASS(); of a FOLDER: CLASS.load(FOLDER), or CLASS() with its OWN_WEIGHTS.

    members  names that it must have
    raises   ValueError: no such class, a member that it lacks, weights that do not fit; FileNotFoundError
    """
    refuse_flip(spec)
    made = _make_own(spec)
    for name in members:
        if not hasattr(made, name):
            raise ValueError(f"{spec.text} has no `{name}`; want {', '.join(members)} (docs/extend.md)")
    return made


def _make_own(spec):
    kind = own_class(spec)
    if spec.folder is None:
        return kind()
    if hasattr(kind, "load"):
        return kind.load(spec.folder)
    made = kind()
    if not isinstance(made, torch.nn.Module):
        raise ValueError(f"{spec.text}: {spec.name} has no `load`; want one, or no folder")
    load_strict(made, read_tensors(spec.folder / OWN_WEIGHTS), spec.folder)
    return made


def hub_folder(name, patterns):
    """A local folder as it is, or the files of a hub id (ORG/NAME) that match `patterns`, downloaded to HF_HOME.

    Without a connection it is the folder of what was downloaded before, be it all or not: its reader names what lacks.
    raises  FileNotFoundError when it is neither
    """
    spec = read_spec(name)
    if spec.folder:
        return spec.folder
    if not spec.hub:
        raise FileNotFoundError(f"got {spec.text!r}; want a folder or a hub id here")
    try:
        return Path(_download(spec.hub, patterns))
    except (OSError, ValueError) as error:                                      # no network, no such model, no access
        raise FileNotFoundError(f"got no folder {spec.text!r} with files here and no such model on the hub "
                                f"({one_line(error)}); want {RULES}") from None


def _download(hub, patterns):
    try:
        return snapshot_download(hub, allow_patterns=patterns)
    except LocalEntryNotFoundError as error:                                    # offline, and not all of it is here
        try:
            return snapshot_download(hub, allow_patterns=[], local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None


def weights_digest(name):
    """Short digest of what a SPEC opens: of the safetensors files of its folder or hub id, else of weights in memory.

    A run may not resume on other weights than it began with.
    """
    spec = read_spec(name)
    folder = spec.folder if spec.module else hub_folder(name, ["*.safetensors"])
    paths = sorted(p for p in folder.rglob("*.safetensors") if not is_twin(p)) if folder else ()
    if spec.module and not paths:
        state = open_own(spec).state_dict()
        return checksum({k: v.detach().cpu().contiguous() for k, v in state.items()}, {})[:16]
    h = hashlib.sha256()
    for path in paths:
        if not path.name.startswith("checkpoint"):
            h.update(str(path.relative_to(folder)).encode())
            with open(path, "rb") as f:
                while block := f.read(1 << 24):
                    h.update(block)
    return h.hexdigest()[:16]
