"""Dependencies point downwards only, and importing the kernels stays light."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "acefast"

# What each part may import of the package; `base` is errors, random, files, csr, graph and kept.
ALLOWED = {
    "ops": {"ops", "_C", "base"},
    "nn": {"nn", "ops", "base"},
    "pruning": {"pruning", "nn", "ops", "base"},
    "data": {"data", "ops", "base"},
    "optim": {"ops", "base"},
    "tasks": {"tasks", "data", "nn", "ops", "base"},
    "capture": {"ops", "base"},
    "train": {"train", "capture", "tasks", "optim", "data", "pruning", "nn", "ops", "base"},
    "report": {"report", "search", "pruning", "nn", "ops", "data", "base"},
    "search": {"search", "train", "tasks", "data", "pruning", "nn", "ops", "base"},
}
BASE = {"errors", "random", "files", "csr", "graph", "kept", "memory"}


def imported_parts(path):
    """Top-level parts of acefast that a source file imports, wherever the statement stands."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] if node.module != "acefast" else [f"acefast.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "acefast" and "." in name:
                part = name.split(".")[1]
                if part in BASE or part in ("Graph", "CSR", "InputError", "__version__"):
                    part = "base"
                parts.add(part)
    return parts


def test_dependencies_point_downwards():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if top in ALLOWED:
            seen += 1
            upward = imported_parts(path) - ALLOWED[top]
            assert not upward, f"{path.relative_to(PACKAGE)} imports {sorted(upward)}"
    assert seen > 20


def test_base_modules_import_only_each_other():
    for name in BASE:
        path = PACKAGE / f"{name}.py"
        if path.exists():
            assert imported_parts(path) <= {"base"}, name


def test_importing_the_kernels_is_light():
    script = (
        "import sys, acefast; heavy = {'matplotlib', 'tyro', 'rich', 'scipy', 'torch_geometric', 'triton', 'acefast.search'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before = subprocess.run(
        [sys.executable, "-c", script.replace("import sys, acefast", "import sys, torch")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == before.stdout
