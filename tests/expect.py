"""What many tests expect: one line that refuses, strict JSON, equal tensors; and what they begin with: seeds, edits."""
import json
import sys

import pytest
import torch


def seeded(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def refused(kind, call, *words):
    """The call raises one line that holds the words."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(w in text for w in words), text


def enter(monkeypatch, folder, **modules):
    """Make a folder the working directory, with modules of the user's in it: name=text."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def edit(path, **changes):
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def strict(text):
    """json.loads that refuses NaN and Infinity, which are not JSON."""
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")
    return json.loads(text, parse_constant=refuse)


def equal(a, b):
    """Whether two dicts of tensors agree in every name, dtype and bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
