from __future__ import annotations

import subprocess
import sys

import spanwise


def run(code: str) -> str:
    """What fresh Python prints, with torch forbidden."""
    guard = "import sys\nsys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", guard + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_neither_torch_nor_its_own_parts() -> None:
    code = """
import spanwise
found = sorted(m for m in sys.modules if m.startswith("spanwise."))
assert not found, found
assert not {"numpy", "pydantic", "rich"} & set(sys.modules)
print(*spanwise.__all__)
"""
    assert run(code).split() == spanwise.__all__


def test_names_load_when_first_used() -> None:
    run("""
import spanwise
for name in ("Cluster", "Device", "Job", "Link", "ModelGraph", "Plan", "Profile", "Timeline"):
    assert getattr(spanwise, name).__name__ == name
assert spanwise.default_cluster().devices
""")


def test_every_public_name_exists() -> None:
    assert all(getattr(spanwise, name) is not None for name in spanwise.__all__)
    assert dir(spanwise) == sorted(spanwise.__all__)
    assert not hasattr(spanwise, "no_such_name")


def test_one_plans_simulates_and_reports_without_torch() -> None:
    count = run("""
import importlib, pkgutil
names = []
for top in ("core", "schedules", "lowering", "cost", "simulator", "planner", "reporting"):
    module = importlib.import_module(f"spanwise.{top}")
    names.append(module.__name__)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(found.name)
        names.append(found.name)
print(len(names))
""")
    assert int(count) > 40
