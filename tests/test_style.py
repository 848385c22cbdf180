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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_commands_of_the_documents_parse(page, monkeypatch):
    """Every command in README.md and docs/ names a file that exists, and arguments that it knows."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    inline = re.findall(r"`((?:python|bash|sbatch) [^`]*)`", page.read_text())
    for line in [*blocks.splitlines(), *inline]:
        line = line.partition(" # ")[0]
        file = re.search(r"(?:^|&& |\d )(?:python|bash|sbatch [^.]*?) ?((?:\w+/)*\w+\.(?:py|sh|sbatch))", line)
        if file:
            assert (ROOT / file[1]).exists(), line
        command = re.search(r"(?:^|\s)((?:\w+/)*(\w+)\.py)(.*)$", line)
        if not command or "--help" in line or "diff" in line:
            continue
        words = shlex.split(command[3].split("&&")[0], comments=True)
        module = importlib.import_module(command[2]) if command[2] in NAMES else None
        if command[2] in ("curves", "irl_compare", "what_fits"):
            module = importlib.import_module(command[2])
        if command[2] == "irl_compare":
            words = tyro.cli(module.Args, args=words, return_unknown_args=True)[1]
            module = importlib.import_module("irl_imitation")
        if module is not None:
            tyro.cli(module.Args, args=words)


def anchors(path):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_links_of_the_documents(page):
    """Pages, figures and headings that a page links to exist; every name of a link is defined."""
    text = page.read_text()
    names = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"\]\[([^\]]+)\]", text)) <= set(names)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + list(names.values())
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {link}"


def test_every_page_is_linked():
    """From README.md one click leads to every page and every figure is shown on one."""
    readme = PAGES[0].read_text()
    everything = "".join(path.read_text() for path in PAGES)
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme
    for figure in (ROOT / "docs" / "figures").iterdir():
        assert f"figures/{figure.name})" in everything


def test_the_two_commands():
    """demo.sh and run.sh set up the same environment; README shows both, and CI runs the second."""
    demo, tests = ((ROOT / path).read_text() for path in ("tests/toy/demo.sh", "tests/run.sh"))
    setup = re.search(r"^if .*?^fi$", demo, re.DOTALL | re.MULTILINE)[0]
    assert setup in tests and "requirements-cpu.txt" in setup
    assert "\nbash tests/toy/demo.sh\n" in PAGES[0].read_text() and "\nbash tests/run.sh\n" in PAGES[0].read_text()
    assert "\nbash tests/run.sh\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("requirements", ["requirements.txt", "tests/requirements-cpu.txt"])
def test_requirements(requirements):
    """What a script imports is required by name; tqdm and huggingface_hub come with transformers."""
    listed = {re.split("[=<>]", line)[0] for line in (ROOT / requirements).read_text().splitlines()}
    imported = set()
    for path in [*SCRIPTS, *(ROOT / "benchmark").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {module.split(".")[0] for module in modules}
    imported -= {*sys.stdlib_module_names, *NAMES, "tqdm", "huggingface_hub", "vllm", "trl"}
    assert {name.replace("faiss", "faiss-cpu") for name in imported} <= listed


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
