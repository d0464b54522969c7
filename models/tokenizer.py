"""The tokenizer of a folder, from its files alone: no remote code, and AutoTokenizer, which would ask on stdin, unused.

A token's number is looked up in tokenizer.json; what stands in tokenizer_config.json or added_tokens.json alone is
added under the number that is given there.
"""
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from runtime.files import find_files, read_json, refuse

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
                   "vocab.json", "merges.txt")
MOST_ADDED = 1 << 16                  # tokens of a file that tokenizer.json lacks


def load_tokenizer(folder):
    """tokenizer.json with what it lacks, or vocab.json and merges.txt. raises FileNotFoundError, Refusal."""
    folder = Path(folder)
    for path in (*find_files(folder, "*token*.json"), *find_files(folder, "vocab.json")):
        read_json(path)                                                         # before transformers reads hostile JSON
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        _add_tokens(tokenizer, folder)
        return tokenizer
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"vlm.py: got neither tokenizer.json nor {name} in {folder}; "
                                    "want the tokenizer's files; fetch them again")
    return Qwen2Tokenizer.from_pretrained(folder)


def _add_tokens(tokenizer, folder):
    """Add the tokens that stand beside tokenizer.json alone. raises Refusal: their numbers do not follow its own."""
    known = tokenizer.get_vocab()
    for number, (name, where) in sorted(_named_tokens(folder).items()):
        if name not in known:
            tokenizer.add_tokens(AddedToken(name, special=True, normalized=False), special_tokens=True)
            if tokenizer.convert_tokens_to_ids(name) != number:
                refuse(where, f"token {name[:80]!r} with number {number}",
                       f"{tokenizer.convert_tokens_to_ids(name)}, the next after those of tokenizer.json",
                       "fetch both files again")


def _named_tokens(folder):
    """Tokens that the files beside tokenizer.json number: dict number -> (text, path of the file)."""
    found = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        path = folder / name
        content = read_json(path) if path.is_file() else {}
        if name == "tokenizer_config.json":
            listed = content.get("added_tokens_decoder") or {}
            good = isinstance(listed, dict) and all(isinstance(v, dict) for v in listed.values())
            pairs = [(k, v.get("content")) for k, v in listed.items()] if good else [("", None)]
        else:
            pairs = [(str(v), k) for k, v in content.items()]
        if len(pairs) > MOST_ADDED or not all(isinstance(text, str) and text and number.isdecimal()
                                              for number, text in pairs):
            refuse(path, "no numbered tokens", "the number and the text of each")
        found |= {int(number): (text, path) for number, text in pairs}
    return found
