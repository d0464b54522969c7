"""The layout is the method: import layers, forbidden names and calls, docstrings, files, the README's commands."""
import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")])
NAMES = {p.stem for p in ROOT.glob("*.py")} | {"kernels"}
LAYERS = {  # module: project modules it may import; a module that is not listed fails
    "untrusted": set(), "relations": set(), "scenes": set(), "files": set(), "runtime": {"files"},
    "config": {"untrusted"}, "lora": {"files", "runtime", "untrusted"}, "sd2": set(), "kernels": {"relations"},
    "formats": {"untrusted"},
    "data": {"scenes", "relations", "formats", "untrusted"},
    "colour": set(), "metrics": {"colour"}, "intervals": {"metrics"}, "surface": {"metrics", "relations"},
    "benchmark_table": set(),
    "benchmarks": {"benchmark_table", "data", "formats", "metrics", "scenes", "surface"},
    "protocols": {"benchmarks", "colour", "data", "metrics", "relations", "scenes", "surface"},
    "grpo": {"kernels", "relations"},
    "rewards": {"grpo", "kernels", "relations", "runtime", "scenes"},
    "bank": {"relations", "data", "files", "runtime", "untrusted"},
    "positions": set(), "families": {"relations"}, "finetune": {"lora"},
    "vlm": {"families", "lora", "files", "runtime", "untrusted"},
    "prepare": {"config", "data", "formats", "questions", "relations", "runtime", "scenes", "untrusted"},
    "questions": {"data", "relations", "files", "runtime", "untrusted"},
    "reliability": {"questions", "relations"},
    "judge": {"relations", "scenes", "metrics", "config", "files", "runtime", "data", "lora", "kernels", "families",
              "vlm", "mini_judge", "questions", "bank"},
    "mini_judge": {"families", "positions", "questions", "relations", "runtime"},
    "predictor": {"relations", "scenes", "metrics", "config", "files", "runtime", "data", "lora", "kernels", "marigold",
                  "positions", "untrusted"},
    "marigold": {"relations", "scenes", "metrics", "config", "files", "runtime", "data", "lora", "kernels", "sd2",
                 "untrusted"},
    "predictions": {"benchmark_table", "benchmarks", "data", "files", "formats", "protocols", "predictor", "relations",
                    "runtime", "scenes"},
    "scores": {"metrics", "predictor", "questions", "relations", "runtime", "scenes", "surface"},
    "watch": {"data", "metrics", "scores"},
    "report": {"data", "files", "intervals", "judge", "predictor", "questions", "reliability", "rewards", "runtime",
               "scores"},
    "benchmark_report": {"benchmark_table", "benchmarks", "data", "intervals", "predictions", "protocols", "report"},
    "grpo_step": {"grpo", "predictor", "rewards", "runtime"},
    "baselines": {"predictor", "rewards"},
    "eval": {"benchmark_report", "benchmark_table", "config", "data", "files", "judge", "predictor", "report",
             "runtime", "scores"},
    "train": NAMES, "ablate": NAMES, "plots": set(),
    "arithmetic": {"lora", "marigold", "runtime"}, "peer": {"marigold"},
}
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


@functools.cache
def tree(path):
    return ast.parse(path.read_text(), str(path))


def module(path):
    return "kernels" if path.parent.name == "kernels" else path.stem


@functools.cache
def imports(path):
    """Names of project modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & NAMES - {module(path)}


@functools.cache
def calls(path):
    """(dotted name, call) of every call of a file."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


@every_source
def test_a_module_imports_only_layers_below_it(path):
    if path.name == "bench.py":
        pytest.skip("a benchmark may import everything")
    assert module(path) in LAYERS, f"{path.name} is in no layer"
    assert imports(path) <= LAYERS[module(path)]


def test_only_the_ablation_imports_train_and_nothing_imports_eval():
    sources = [p for p in SOURCES if p.name != "bench.py"]                       # a benchmark may import everything
    importers = {name: {module(p) for p in sources if name in imports(p)} for name in ("train", "eval")}
    assert importers == dict(train={"ablate"}, eval=set())


@every_source
def test_no_error_is_swallowed_wholesale(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            assert node.type is not None and not re.search(r"\b(Base)?Exception\b", caught), f"line {node.lineno}"


@every_source
def test_no_pickle_and_no_remote_code(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "dill", "joblib", "cloudpickle", "shelve"}, f"line {node.lineno}"
    for name, call in calls(path):
        flags = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name != "torch.load" or flags.get("weights_only") == "True", f"line {call.lineno}"
        assert flags.get("allow_pickle", "False") == "False", f"line {call.lineno}"
        assert flags.get("trust_remote_code", "False") == "False", f"line {call.lineno}"
        assert name not in ("eval", "exec", "torch.nan_to_num", "os.system"), f"line {call.lineno}"
        assert name.split(".")[-1] not in UNSAFE and name not in ("np.load", "numpy.load"), f"line {call.lineno}"


UNSAFE = {"extract", "extractall", "unpack_archive", "import_module", "__import__", "fromstring", "memmap", "ZipFile"}
PLACES = {  # call: the modules that may make it, since they check what they read or wrote it themselves
    "json.loads": {"files", "runtime", "predictions"}, "json.load": set(), "load_file": set(),
    "safe_open": {"files"}, "Image.open": {"formats"}, "tarfile.open": {"formats"},
    "h5py.File": {"prepare"}, "torch.load": set(), "snapshot_download": {"files"}}


@every_source
def test_files_from_outside_have_one_reader_each(path):
    for name, call in calls(path):
        assert module(path) in PLACES.get(name, {module(path)}), f"line {call.lineno}: {name}"
        if name == "Image.open":
            assert "formats" in {k.arg for k in call.keywords}, f"line {call.lineno}: any of Pillow's readers"
        if name.endswith("from_pretrained"):                                    # a network gets no folder
            assert "Tokenizer" in name or ast.unparse(call.args[0]) == "None", f"line {call.lineno}"
        assert not re.match(r"Auto[A-Z]", name), f"line {call.lineno}: {name} follows auto_map"


@every_source
def test_one_file_talks_to_other_processes(path):
    uses = "torch.distributed" in path.read_text().replace("torch.distributed.run", "")
    assert not uses or path.name == "runtime.py"


@every_source
def test_nobody_sets_the_global_seed_outside_a_fork(path):
    parsed = tree(path)
    inside = {id(inner) for node in ast.walk(parsed) if isinstance(node, ast.With)
              and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items) for inner in ast.walk(node)}
    for node in ast.walk(parsed):
        if (isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("torch.manual_seed", "np.random.seed", "random.seed")):
            assert id(node) in inside, f"line {node.lineno}"


def test_no_drawer_for_odds_and_ends():
    bad = {"utils", "util", "common", "misc", "helpers", "helper", "tools", "base", "core", "registry", "trainer"}
    assert not {p.stem for p in SOURCES} & bad
    assert not [p for p in SOURCES if p.stem.startswith("base_")]
    assert {p.name for p in ROOT.iterdir() if p.is_dir()} & {"configs", "src", "utils", "reasonx"} == set()


@every_source
def test_every_module_function_and_class_says_what_it_is(path):
    parsed = tree(path)
    assert ast.get_docstring(parsed)
    silent = [node.name for node in parsed.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert silent == []


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "requirements.txt", ".ci/run"])
def test_the_repository_has(name):
    assert (ROOT / name).is_file() and (ROOT / name).stat().st_size > 0


def test_every_imported_package_is_required():
    from sys import stdlib_module_names
    listed = set(re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.M))
    needs = {"PIL": "pillow"}
    found = set()
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                found |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    brought = {"tqdm", "tokenizers", "huggingface_hub"}               # dependencies of transformers
    optional = {"h5py", "diffusers"}    # prepare.py hypersim, which says how to get it; what bench.py compares with
    missing = {needs.get(n, n) for n in found - NAMES - set(stdlib_module_names)} - listed - brought - optional
    assert missing == set()


def readme_commands():
    """Every command line of the fenced bash blocks of README and docs, continuation lines joined, comments dropped."""
    text = "\n".join(page.read_text() for page in PAGES)
    lines = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                lines.append(words)
    return lines


def script_of(words):
    """(module with a main(argv), its arguments) of `python X.py`, `python -m X` or `torchrun ... X.py`; else None."""
    for i, word in enumerate(words):
        if word.endswith(".py") and (ROOT / word).is_file():
            return word[:-3], words[i + 1:]
        if word == "-m" and i + 1 < len(words) and words[i + 1].split(".")[0] in NAMES:
            return words[i + 1], words[i + 2:]
    return None


def test_the_readme_shows_how_to_train_evaluate_and_predict():
    shown = {found[0] for found in map(script_of, readme_commands()) if found}
    assert {"train", "eval", "predictor", "judge"} <= shown


def test_every_file_a_readme_command_runs_exists():
    named = [word for words in readme_commands() for word in words[:4] if word.endswith(".py")]
    assert named and all((ROOT / name).is_file() for name in named)


def test_every_local_link_of_the_readme_leads_somewhere():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
        assert [x for x in links if "://" not in x and not (page.parent / x).exists()] == []


def test_every_flag_of_the_readme_is_in_the_help(capsys):
    helps, unknown, seen = {}, [], 0
    for name, args in filter(None, map(script_of, readme_commands())):
        if name not in helps:
            with pytest.raises(SystemExit) as stop:
                importlib.import_module(name).main(["--help"])
            assert stop.value.code == 0
            helps[name] = set(re.findall(r"(--[a-z][\w-]*)", capsys.readouterr().out))
        seen += 1
        unknown += [(name, a) for a in args if a.startswith("--") and a.split("=")[0] not in helps[name]]
    assert seen and unknown == []


def test_every_training_command_of_the_readme_is_accepted():
    from config import parse
    commands = [args for name, args in filter(None, map(script_of, readme_commands())) if name == "train"]
    assert commands
    for args in commands:
        parse(args)                                                             # exits 2 on anything it would refuse
