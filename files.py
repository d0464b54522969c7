"""Files are whole or absent: atomic, durable writes, checksums, JSON that is JSON; weights from a folder or the hub.

A kill, a full disk or a power cut leaves the old file or the new one. No pickle anywhere.
"""
import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)


def strict(value):
    """The value with non-finite floats as null, which JSON has and NaN it has not."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write strict JSON atomically."""
    write_text(path, json.dumps(strict(value), indent=1, allow_nan=False))


def write_text(path, text):
    """Write a text file, UTF-8, atomically and durably."""
    write_bytes(path, text.encode())


def write_bytes(path, content):
    """Write a file atomically and durably. raises OSError naming it."""
    replace_file(path, lambda part: part.write_bytes(content))


def replace_file(path, write):
    """write(another name), to the disk, rename: a kill, a full disk or a power cut leaves the old file or the new one.

    raises  OSError naming the file
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


def replace_files(folder, write, last, part="unfinished"):
    """write(another folder), all of it to the disk, then each file into `folder`: `last` is there when all others are.

    part    name of that other folder, which lies in `folder`; what a killed writer left under the same name is removed
    raises  OSError naming the folder; nothing in it has changed then, unless renaming itself failed
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
            (folder / last).unlink(missing_ok=True)
            for name in names:
                if name == last:
                    sync(folder)
                os.replace(part / name, folder / name)
            sync(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


class _Writing:
    """With-block of a write: what the system refuses becomes an OSError that names `path`, whichever library says it.

    Rust's (safetensors, tokenizers) have exceptions of their own, the last a bare Exception.
    """

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        cause = refused(error)
        if cause:
            raise OSError(cause.errno, cause.strerror or str(cause), str(self.path)) from None


def refused(error):
    """The OSError that an error is, or tells of in Rust's words "(os error N)"; None for others."""
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
    header = dict(header, sha256=_checksum(tensors, header))
    replace_file(path, lambda part: save_file(tensors, part, metadata=header))


def read_tensors(path):
    """Tensors and header of a file of `write_tensors`.

    raises  FileNotFoundError; ValueError for a file that is cut short or of which any bit has changed
    """
    try:
        with safe_open(path, "pt") as f:
            header, tensors = dict(f.metadata() or {}), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if header.pop("sha256", None) != _checksum(tensors, header):
        raise ValueError(f"{path} is damaged: its checksum is another")
    return tensors, header


def _checksum(tensors, header):
    h = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        h.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        h.update(x.reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def read_log(path):
    """Rows of a metrics.jsonl up to the first that is not whole (a kill, a full disk); none where there is no file."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


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
            reason = " ".join(str(error).split())[:200]
    raise FileNotFoundError(f"got no folder {str(name)!r} here and no such model on the hub ({reason}); "
                            "want a folder, or a hub id and a network")


def weights_digest(name):
    """Short digest of the safetensors files under a folder or of a hub id's snapshot.

    A run may not resume on other weights than it began with.
    """
    folder, h = hub_folder(name, ["*.safetensors"]), hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if not path.name.startswith("checkpoint"):
            h.update(str(path.relative_to(folder)).encode())
            with open(path, "rb") as f:
                while block := f.read(1 << 24):
                    h.update(block)
    return h.hexdigest()[:16]
