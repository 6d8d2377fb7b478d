"""The repository keeps its own rules: pinned once, one way to install, limits that bite."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LIMITS = ROOT / "scripts" / "check_limits.py"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_constraints_pin_every_declared_package_exactly_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    extras = project["project"]["optional-dependencies"]
    installed = [
        *project["project"]["dependencies"],
        *extras["dev"],
        *extras["docs"],
        *extras["bench"],
        *extras["images"],
    ]
    installed += project["build-system"]["requires"]
    declared = {canonical(re.split(r"[\[<>=!~ ;]", item)[0]) for item in installed} - {"pared"}
    pinned = [canonical(line.split("==")[0]) for line in pins()]
    assert len(pinned) == len(set(pinned))
    assert declared - set(pinned) == set()


def test_constraints_pin_what_is_installed_down_to_the_last_dependency() -> None:
    pinned = {canonical(name): version for name, _, version in (line.partition("==") for line in pins())}
    loose, seen = [], set()
    waiting = [("pared", extra) for extra in ("", "dev", "docs")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name == "pared":
                pytest.skip("pared itself is not installed here")
            continue  # of an extra that this environment lacks
        # torch built for CUDA brings packages that the pinned build for CPUs does not have.
        if name != "pared" and not name.startswith(("nvidia-", "cuda-", "triton", "setuptools")):
            loose += [name] if pinned.get(name) != found.version.partition("+")[0] else []
        for item in map(Requirement, found.requires or ()):
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                waiting += [(canonical(item.name), part) for part in ("", *item.extras)]
    assert sorted(set(loose)) == []


def test_constraints_hold_plain_versions_without_build_tags() -> None:
    odd = [line for line in pins() if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)]
    assert odd == []
    assert "torch==2.13.0" in pins()


def test_installing_names_no_package_index() -> None:
    pattern = re.compile(r"(--|_)(extra[-_])?index[-_]url|--find-links|PIP_FIND_LINKS", re.IGNORECASE)
    text = [
        path for path in tracked_files() if path.suffix not in {".gz", ".xz", ".npz", ".png"} and path != Path(__file__)
    ]
    assert text
    found = [path.name for path in text if pattern.search(path.read_text(encoding="utf8", errors="ignore"))]
    assert found == []


def test_contributing_stays_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf8").splitlines()) < 60


def test_changelog_has_an_unreleased_section() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


def test_makefile_offers_every_target_that_the_guides_name() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    offered = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    guides = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for guide in guides for name in re.findall(r"`make ([a-z]+)", guide.read_text(encoding="utf8"))}
    assert {"setup", "demo", "check", "test", "contract", "bench", "docs"} <= offered
    assert named <= offered


def limits(package: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(LIMITS), str(package)], capture_output=True, text=True, check=False)


def test_check_limits_accepts_a_package_that_keeps_them(tmp_path: Path) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    # A long docstring, a function-level import back, a broad handler that raises: all allowed.
    (package / "a.py").write_text('"""' + "line\n" * 90 + '"""\nfrom house import b\n')
    (package / "b.py").write_text(
        "def f():\n    from house import a\n    try:\n        return a\n"
        "    except Exception as error:\n        raise ValueError from error\n"
    )
    done = limits(package)
    assert (done.returncode, done.stdout) == (0, "limits: all held\n")


BAD = {
    "lines, at most 400": "x = 1\n" * 401,
    "f has 62 lines": "def f():\n" + "    x = 1\n" * 61,
    "__init__ takes 11 arguments": f"class A:\n    def __init__(self, *, {', '.join('abcdefghijk')}):\n        pass\n",
    "A has 11 settings": "@settings\nclass A:\n" + "".join(f"    {name}: int\n" for name in "abcdefghijk"),
    "broad except": "try:\n    pass\nexcept (ValueError, Exception):\n    pass\n",
    "assert:": "assert True\n",
    "print in the library": "print(1)\n",
    "imports torchvision at module level": "try:\n    import torchvision\nexcept ImportError:\n    pass\n",
    "import cycle": "from . import b\n",
}


@pytest.mark.parametrize("expected", BAD)
def test_check_limits_reports_a_breach_when_a_file_breaks(expected: str, tmp_path: Path) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(BAD[expected])
    (package / "b.py").write_text("import house.a\n")
    done = limits(package)
    assert done.returncode == 1
    assert expected in done.stdout
    assert done.stdout.endswith("limits: 1 broken\n")


def test_check_limits_reports_the_second_user_of_torch_ao(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def f():\n    import torch.ao.quantization\n")
    assert "imports torch.ao, which is for" in limits(tmp_path).stdout
