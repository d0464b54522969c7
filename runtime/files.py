"""Files: written whole or not at all, and read as if a stranger had made them.

writing   a kill, a full disk or a power cut leaves the old file or the new one, never a part
reading   a reader returns a valid result or raises one line that names the file: a Refusal (a ValueError) or
          FileNotFoundError. Nothing is unpickled or executed; a size that a file announces is compared with a limit
          or with the bytes that are there before it is used; no name inside a file leads out of its folder
"""
import errno
import hashlib
import json
import math
import os
import re
import shutil
import struct
import tarfile
import tokenize
import uuid
import warnings
import zlib
from pathlib import Path, PurePath

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)
PIXELS = 80_000_000                   # of a photo or map, 1.5 GB while it is read; --max-pixels
JSON_BYTES = 1 << 27                  # a tokenizer of 260,000 words has 33 MB
# what readers raise on a damaged file: OSError (cut off), SyntaxError (PNG structure), the others (absurd fields)
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError,
          AssertionError, NotImplementedError, RecursionError, struct.error, zlib.error, tokenize.TokenError,
          tarfile.TarError, SafetensorError, StrictDataclassError, Image.DecompressionBombError)
# what tensors are made of; torch has narrower floats that it can neither copy nor convert
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}

limit = dict(pixels=PIXELS)


def finite_json(value):
    """A value as JSON can hold it: NaN and infinities, which JSON does not know, become null."""
    if isinstance(value, dict):
        return {k: finite_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write a JSON file atomically and durably; see finite_json."""
    write_text(path, json.dumps(finite_json(value), indent=1, allow_nan=False))


def write_text(path, text):
    """Write a text file, UTF-8, atomically and durably."""
    write_bytes(path, text.encode())


def write_rows(path, rows):
    """Write a .jsonl file, a row a line, atomically and durably."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_bytes(path, content):
    """Write a file atomically and durably. raises OSError naming it."""
    replace_file(path, lambda part: part.write_bytes(content))


def replace_file(path, write):
    """Call write(path of a temporary file), wait until it is on the disk, then rename it to `path`.

    raises  OSError naming `path`, which has not changed then
    """
    path = Path(path)
    part = path.with_name(f"{uuid.uuid4().hex}.part")                           # the name of `path` may fill 255 bytes
    with _Writing(path):
        try:
            write(part)
            sync(part)
            os.replace(part, path)
            sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


def replace_files(folder, write, last, part="unfinished", obsolete=()):
    """Call write(a temporary folder), wait until all of it is on the disk, then move its files into `folder`.

    last    name of the file that is moved last: where it is, all others are
    obsolete  names in `folder` that must not stay beside what is written
    part    name of the temporary folder, in `folder`; what a killed writer left under this name is removed
    raises  OSError naming the folder; nothing in it has changed then, unless the moving itself failed
    """
    folder = Path(folder)
    part = folder / part
    with _Writing(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            write(part)
            names = sorted((p.name for p in part.iterdir()), key=lambda name: name == last)
            for name in names:
                sync(part / name)
            for name in (last, *obsolete):
                (folder / name).unlink(missing_ok=True)
            for name in names:
                if name == last:
                    sync(folder)
                os.replace(part / name, folder / name)
            sync(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


class _Writing:
    """With-block of a write: an error of the system becomes an OSError that names `path`, whichever library raises it.

    The Rust libraries (safetensors, tokenizers) raise exceptions of their own, tokenizers a bare Exception.
    """

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        cause = system_error(error)
        if cause:
            raise OSError(cause.errno, cause.strerror or str(cause), str(self.path)) from None


def system_error(error):
    """The OSError that an error is, or that a Rust library reports as "(os error N)"; None for other errors."""
    code = re.search(r"\(os error (\d+)\)", str(error)) if type(error) in (SafetensorError, Exception) else None
    if code:
        return OSError(int(code[1]), os.strerror(int(code[1])))
    return error if isinstance(error, OSError) else None


def sync(path):
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path, tensors, **header):
    """Write a safetensors file atomically, with text entries and a checksum of everything in its header.

    tensors  dict of CPU tensors.  raises  OSError
    """
    tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
    header = dict(header, sha256=checksum(tensors, header))
    replace_file(path, lambda part: save_file(tensors, part, metadata=header))


def write_weights(path, tensors):
    """Write a safetensors file as diffusers and PEFT do, atomically; its folder is made. raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    replace_file(path, lambda part: save_file(tensors, part, metadata={"format": "pt"}))


def checksum(tensors, header):
    """Hex digest of CPU tensors by name, and of a header."""
    h = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        h.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        h.update(x.reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


class Refusal(ValueError):
    """What a reader says of a file that it does not accept, in one line that names it."""


def set_max_pixels(n):
    """Set the largest photo or map that any reader opens (--max-pixels)."""
    limit["pixels"] = n
    Image.MAX_IMAGE_PIXELS = max(n, PIXELS)                                     # Pillow's own; it also bounds drawing


def refuse(where, got, want, do="fetch it again"):
    """Raise a Refusal: where, what was found, what is wanted, what to do."""
    raise Refusal(f"{where}: got {got}, want {want}; {do}")


def one_line(error):
    """An error's text on one line, at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


class DamageGuard:
    """With-block around the readers of other libraries: whatever a damaged file makes them raise becomes a Refusal.

    keep   errors that pass as they are. Rust libraries raise a bare Exception, or a PanicException
    """

    def __init__(self, where, got, want, do="fetch it again", keep=(Refusal, FileNotFoundError)):
        self.words = (where, got, want, do)
        self.keep = keep
        self.quiet = warnings.catch_warnings()

    def __enter__(self):
        self.quiet.__enter__()
        warnings.simplefilter("ignore")                                         # odd metadata may stay
        return self

    def __exit__(self, kind, error, trace):
        self.quiet.__exit__(kind, error, trace)
        if kind is None or isinstance(error, self.keep):
            return
        no_memory = isinstance(error, RuntimeError) and "memory" in str(error).lower()
        from_rust = kind is Exception or kind.__name__ == "PanicException"
        if not no_memory and (from_rust or isinstance(error, (*BROKEN, RuntimeError, ImportError))):
            where, got, want, do = self.words
            raise Refusal(f"{where}: got {got} ({one_line(error)}), want {want}; {do}") from error


def decode_json(content, where, words=("a file that is not JSON", "the official one", "fetch it again")):
    """JSON bytes -> the value they hold. raises Refusal (in these words): not JSON, too large, nested too deeply."""
    if len(content) > JSON_BYTES:
        refuse(where, f"{len(content)} bytes of JSON", f"at most {JSON_BYTES}", "shorten it")
    with DamageGuard(where, *words):
        return json.loads(content)


def read_json(path, want="one object"):
    """A JSON file that holds one object -> dict.

    raises  FileNotFoundError; Refusal: as decode_json, or another value than an object
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"got no {path.name} in {str(path.parent)!r}; want {want}; fetch it again")
    if path.stat().st_size > JSON_BYTES:
        refuse(path, f"{path.stat().st_size} bytes of JSON", f"at most {JSON_BYTES}", "shorten it")
    found = decode_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        refuse(path, f"JSON that is a {type(found).__name__}", want)
    return found


def read_log(path):
    """Rows of a .jsonl file up to the first that is incomplete (a kill, a full disk); [] where there is no file."""
    rows = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return rows


class Tensors:
    """With-block that opens a safetensors file without reading it: keys(), get_tensor(name), metadata().

    keep    errors that pass as they are
    raises  Refusal for a damaged file, or for tensors of other types than DTYPES
    """

    def __init__(self, path, keep=(Refusal, FileNotFoundError)):
        self.guard = DamageGuard(path, "a safetensors file that cannot be read", "a whole one", keep=keep)
        with self.guard:
            self.file = safe_open(path, "pt")
            for name in self.file.keys():  # noqa: SIM118
                dtype = self.file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    refuse(path, f"{name[:80]!r} of {dtype}", "floats of 16 to 64 bits, integers or bool", "convert it")

    def __enter__(self):
        return self.file

    def __exit__(self, *error):
        self.file.__exit__(*error)
        self.guard.__exit__(*error)


def read_tensors(path):
    """All tensors of a safetensors file from anywhere: dict name -> tensor. raises FileNotFoundError, Refusal."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"got no {Path(path).name} in {str(Path(path).parent)!r}; want safetensors")
    with Tensors(path) as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def read_checked(path):
    """Tensors and header (dict of texts) of a file of `write_tensors`.

    Another process may replace or remove the file at any time: it is read again, or it is a FileNotFoundError.
    raises  OSError; ValueError for a file that is cut short or of which any bit has changed
    """
    while True:
        seen = os.stat(path)
        try:
            with Tensors(path, keep=(Refusal, OSError)) as f:
                header = dict(f.metadata() or {})
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            if header.pop("sha256", None) == checksum(tensors, header):
                return tensors, header
            wrong = "its checksum does not match"
        except Refusal as error:
            wrong = one_line(error.__cause__ or error)
        now = os.stat(path)                                                     # safetensors opens it by name, twice
        if (now.st_ino, now.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns):
            raise ValueError(f"{path} is damaged: {wrong}")


def is_twin(name):
    """Whether a relative name is one of macOS's `._NAME` beside NAME: notes about it, which exist for no reader."""
    return any(part.startswith("._") for part in PurePath(name).parts)


def find_files(folder, pattern):
    """Sorted paths of files under a folder that match a pattern of Path.glob; a twin (`is_twin`) is none of them."""
    return sorted(p for p in Path(folder).glob(pattern) if p.is_file() and not is_twin(p.relative_to(folder)))


def path_inside(root, name, where):
    """Path of a file that another file names, relative to the folder `root`. raises Refusal: it leaves the folder."""
    if isinstance(name, str) and "\0" not in name and not Path(name).is_absolute():
        try:
            place = Path(root, name).resolve()
        except (OSError, RuntimeError):                                         # a loop of links
            place = None
        if place is not None and place.is_relative_to(Path(root).resolve()):
            return Path(root, name)
    refuse(where, f"{name!r}", f"a path inside {str(root)!r}", "edit it")
