"""Single-file rules: no drift between copies, no script imports another, light imports, documented arguments."""

import ast
import importlib
import io
import re
import shlex
import subprocess
import sys
import tokenize

import pytest
import tyro
from conftest import ROOT

SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]
README = (ROOT / "README.md").read_text()


def definitions(path):
    """{name: text} of top-level functions and classes, decorators and comments included, Args left out."""
    text = path.read_text()
    lines = text.splitlines()
    return {
        node.name: "\n".join(lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args"
    }


def methods(text):
    """{name: text} of a class's methods."""
    lines = text.splitlines()
    body = ast.parse(text).body[0].body
    return {node.name: lines[node.lineno - 1 : node.end_lineno] for node in body if isinstance(node, ast.FunctionDef)}


def test_same_name_same_text():
    """Top-level functions and classes; and the methods that Policy shares with its relatives of other names."""
    seen = {}
    for path in SCRIPTS:
        for name, text in definitions(path).items():
            first, expected = seen.setdefault(name, (path.name, text))
            assert text == expected, f"{name} in {path.name} differs from {name} in {first}: change both, or rename"
    assert len(seen) > 80
    for relative in ("TreePolicy", "ValuePolicy"):
        ours, theirs = methods(seen["Policy"][1]), methods(seen[relative][1])
        shared = ["__init__", "shard", "base", "merged_weights"]
        assert [ours[name] for name in shared] == [theirs[name] for name in shared], relative


def test_ruff():
    """ruff format and ruff check decide the layout."""
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.split(".")[0] not in set(NAMES) - {"eval_gsm8k"}, f"{path.name} imports {module}"


@pytest.mark.parametrize("name", NAMES)
def test_import_is_light(name):
    heavy = ("vllm", "wandb", "faiss", "peft", "transformers", "datasets")
    code = f"import sys, {name}; print([module for module in {heavy} if module in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_every_argument_is_explained(path):
    """A comment beside every field of Args: tyro prints it with --help."""
    args = next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "Args")
    lines = path.read_text().splitlines()
    for field in args.body:
        comment = lines[field.lineno - 1].rpartition("  # ")[2]  # tyro reads that of the first line
        assert comment != lines[field.lineno - 1] and len(comment) > 8, f"{path.name}: {field.target.id}"


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_help(path):
    result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and ("--model-name" in result.stdout or path.stem == "arithmetic_misl")


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_public_functions_have_docstrings(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_readme_commands_parse():
    """Every `python <script>.py ...` in the README's code blocks has arguments that the script knows."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", README, re.DOTALL)
    commands = re.findall(r"^(?:.*&& )?python (\w+)\.py(.*)$", "\n".join(blocks).replace("\\\n", " "), re.MULTILINE)
    assert len(commands) >= 4
    for name, arguments in commands:
        if name in NAMES and "--help" not in arguments:
            tyro.cli(importlib.import_module(name).Args, args=shlex.split(arguments.split("&&")[0], comments=True))


def test_nothing_of_a_model_is_evaluated():
    """No eval, exec or pickle anywhere near what a model or a dataset says."""
    for path in SCRIPTS:
        names = [
            t.string
            for t in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
            if t.type == tokenize.NAME
        ]
        assert not {"exec", "pickle", "__import__"} & set(names)
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert "eval" not in calls
        assert path.read_text().count("torch.load(") == path.read_text().count("weights_only=True")
