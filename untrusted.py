"""What comes from outside may be hostile: the limits, and the readers of JSON, weights and names that keep to them.

A reader gives a valid result or one line that names the file: a Refused (a ValueError), or FileNotFoundError. Nothing
is unpickled or executed, no size that a file announces is believed before it is compared with a limit or with the bytes
that are there, and no name inside a file leads out of its folder.
"""
import json
import struct
import tarfile
import tokenize
import warnings
import zlib
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open

PIXELS = 80_000_000                   # of a photo or map, 1.5 GB while it is read; --max-pixels
JSON_BYTES = 1 << 27                  # a tokenizer of 260,000 words has 33 MB
SIZE, LAYERS = 1 << 24, 256           # largest number in a network's config; largest number of layers
# what a file makes its reader raise: OSError (cut off), SyntaxError (PNG structure), the others (absurd fields)
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError,
          AttributeError, AssertionError, NotImplementedError, RecursionError, struct.error, zlib.error,
          tokenize.TokenError, tarfile.TarError, SafetensorError, StrictDataclassError,
          Image.DecompressionBombError)
# what tensors are made of; torch has narrower floats that it can neither copy nor convert
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
# what a config leaves to chance in transformers: code of others, kernels of others, other files
OPEN = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "experts_implementation", "_experts_implementation", "transformers_weights", "fusion_config", "kernel_config")

limit = dict(pixels=PIXELS)


class Refused(ValueError):
    """What a reader says of a file; it names it."""


def allow(max_pixels):
    """Set the largest photo or map that any reader opens (--max-pixels)."""
    limit["pixels"] = max_pixels
    Image.MAX_IMAGE_PIXELS = max(max_pixels, PIXELS)                            # Pillow's, also of what is drawn


def refuse(where, got, want, do="fetch it again"):
    """Raise the one line."""
    raise Refused(f"{where}: got {got}, want {want}; {do}")


def said(error):
    """An error's text on one line, short."""
    return " ".join(str(error).split())[:160] or type(error).__name__


class Refusing:
    """With-block around foreign readers: whatever a damaged file makes them raise becomes one Refused.

    keep   errors that say enough already.   Rust's readers raise a bare Exception, or a PanicException
    """

    def __init__(self, where, got, want, do="fetch it again", keep=(Refused, FileNotFoundError)):
        self.said, self.keep, self.quiet = (where, got, want, do), keep, warnings.catch_warnings()

    def __enter__(self):
        self.quiet.__enter__()
        warnings.simplefilter("ignore")                                         # odd metadata may stay
        return self

    def __exit__(self, kind, error, trace):
        self.quiet.__exit__(kind, error, trace)
        if kind is None or isinstance(error, self.keep):
            return
        text, full = str(error), isinstance(error, RuntimeError) and "memory" in str(error).lower()
        if not full and (isinstance(error, (*BROKEN, RuntimeError, ImportError)) or kind is Exception
                         or kind.__name__ == "PanicException"):
            where, got, want, do = self.said
            raise Refused(f"{where}: got {got} ({said(text or kind.__name__)}), want {want}; {do}") from error


def decode_json(content, where):
    """JSON bytes -> what they hold. raises Refused: no JSON, too large, nested too deeply."""
    if len(content) > JSON_BYTES:
        refuse(where, f"{len(content)} bytes of JSON", f"at most {JSON_BYTES}", "shorten it")
    with Refusing(where, "a file that is not JSON", "the official one"):
        return json.loads(content)


def read_json(path, want="one object"):
    """A JSON file that holds one object -> dict. raises FileNotFoundError; Refused as decode_json, or another value."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"got no {path.name} in {str(path.parent)!r}; want {want}; fetch it again")
    if path.stat().st_size > JSON_BYTES:
        refuse(path, f"{path.stat().st_size} bytes of JSON", f"at most {JSON_BYTES}", "shorten it")
    found = decode_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        refuse(path, f"JSON that is a {type(found).__name__}", want)
    return found


def read_tensors(path):
    """All tensors of a safetensors file: dict name -> tensor. raises FileNotFoundError, Refused."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"got no {Path(path).name} in {str(Path(path).parent)!r}; want safetensors")
    with Tensors(path) as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


class Tensors:
    """With-block that opens a safetensors file lazily: keys(), get_tensor(name). raises as read_tensors."""

    def __init__(self, path):
        self.refusing = Refusing(path, "a safetensors file that cannot be read", "a whole one")
        with self.refusing:
            self.file = safe_open(path, "pt")
            for name in self.file.keys():  # noqa: SIM118
                dtype = self.file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    refuse(path, f"{name[:80]!r} of {dtype}", "floats of 16 to 64 bits, integers or bool", "convert it")

    def __enter__(self):
        return self.file

    def __exit__(self, *error):
        self.file.__exit__(*error)
        self.refusing.__exit__(*error)


def sober(config, where):
    """A network's config without the keys that load code or other files; its numbers are bounded.

    raises   Refused: a number above SIZE, more than LAYERS layers, quantised weights
    """
    def clean(value, name):
        if isinstance(value, dict):
            if value.get("quantization_config"):
                refuse(where, "quantization_config", "plain weights", "use the checkpoint before quantisation")
            return {k: clean(v, k) for k, v in value.items() if k not in OPEN}
        if isinstance(value, list):
            return [clean(v, name) for v in value]
        most = LAYERS if any(word in name for word in ("layers", "depth")) else SIZE
        if isinstance(value, (int, float)) and not abs(value) <= most:
            refuse(where, f"{name} = {value}", f"at most {most}", "use another checkpoint")
        return value
    return clean(config, "")


def whole(value, least, most, name, where):
    """An integer of a config inside its bounds. raises Refused."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        refuse(where, f"{name} = {value!r}", f"an integer in {least}..{most}", "use another checkpoint")
    return value


def fits(model, state, where):
    """Refuse a network, made on the meta device, with more numbers than its weights: loading would invent the rest."""
    need, have = sum(p.numel() for p in model.parameters()), sum(x.numel() for x in state.values())
    if need > have:
        refuse(where, f"{have} weights for a network of {need}", "all of them", "use the config.json they belong to")


def inside(root, name, where):
    """Path of a name that a file gives, relative to its folder `root`. raises Refused: it leaves the folder."""
    if isinstance(name, str) and "\0" not in name and not Path(name).is_absolute():
        try:
            place = Path(root, name).resolve()
        except (OSError, RuntimeError):                                         # a loop of links
            place = None
        if place is not None and place.is_relative_to(Path(root).resolve()):
            return Path(root, name)
    refuse(where, f"{name!r}", f"a path inside {str(root)!r}", "edit it")
