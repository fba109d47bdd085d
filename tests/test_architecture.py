"""Imports go one way, and `import pyface` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Each room may import from rooms below it (and from itself); rooms on one line do not see each other's insides freely,
# but may use each other.
LEVELS = [
    {"cli"},
    {"methods"},
    {"nn", "optim", "backbones", "data", "metrics", "engine", "vault"},
    {"ops"},
    {"kernels"},
    {"errors"},
]
LEVEL = {room: height for height, rooms in enumerate(LEVELS) for room in rooms}


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; name the module in full"
            if node.module == "pyface":  # `from pyface import x`
                yield from (f"pyface.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_arrows_go_one_way():
    wrong = []
    for folder, base in ((ROOT / "pyface", []), (ROOT / "kernels", ["kernels"])):
        for file in folder.rglob("*.py"):
            parts = [*base, *file.relative_to(folder).with_suffix("").parts]
            if len(parts) == 1 or parts[0] == "__init__":
                continue  # pyface/__init__.py and __main__.py only name homes, lazily
            for name in imports(file):
                words = name.split(".")
                if words[0] != "pyface" or len(words) < 2 or words[1] not in LEVEL:
                    continue
                if LEVEL[words[1]] < LEVEL[parts[0]]:
                    wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_known():
    rooms = {path.name for path in (ROOT / "pyface").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(LEVEL)


def test_importing_pyface_is_light(tmp_path):
    code = "import sys, pyface; print([m for m in ('torch', 'numpy', 'skimage', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve():
    import pyface

    for name in pyface.__all__:
        assert getattr(pyface, name) is not None
