"""Networks' configs and weights from anywhere: bounded, strict, found in a folder or on the hub, digested."""
import hashlib
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from runtime.files import one_line, refuse

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


def load_strict(model, state, origin, assign=False):
    """load_state_dict that names the first missing, surplus or misshapen key. raises ValueError."""
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in state.items()}
    wrong = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
    if wrong:
        k = wrong[0]
        raise ValueError(f"{len(wrong)} of {len(want)} weights in {origin} do not fit (first: {k}, "
                         f"got {got.get(k)}, want {want.get(k)}); use a checkpoint of the same architecture and size")
    model.load_state_dict(state, assign=assign)


def hub_folder(name, patterns):
    """A local folder as it is, or the files of a hub id (ORG/NAME) that match `patterns`, downloaded to HF_HOME.

    raises  FileNotFoundError when it is neither
    """
    if Path(name).is_dir():
        return Path(name)
    reason = "not of the form ORG/NAME"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        try:
            return Path(snapshot_download(str(name), allow_patterns=patterns))
        except (OSError, ValueError) as error:                                  # no network, no such model, no access
            reason = one_line(error)
    raise FileNotFoundError(f"got no folder {str(name)!r} here and no such model on the hub ({reason}); "
                            "want a folder, or a hub id and a network")


def weights_digest(name):
    """Short digest of the safetensors files under a folder or of a hub id's snapshot.

    A run may not resume on other weights than it began with.
    """
    folder = hub_folder(name, ["*.safetensors"])
    h = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if not path.name.startswith("checkpoint"):
            h.update(str(path.relative_to(folder)).encode())
            with open(path, "rb") as f:
                while block := f.read(1 << 24):
                    h.update(block)
    return h.hexdigest()[:16]
