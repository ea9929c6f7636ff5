"""What the wheel and the sdist contain, their metadata, and the errors where an optional library is missing."""

from __future__ import annotations

import email
import email.message
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dist_adamw
from dist_adamw.cli import main
from dist_adamw.cli.verbs import VERBS
from dist_adamw.planning import plan
from tests.conftest import ROOT
from tests.installed import check

PACKED = ("dist_adamw", "tests/installed", "docs", "configs", "examples")  # enough of the sdist; the rest takes seconds
FILES = (
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
    "mkdocs.yml",
)
BUILD = """
import sys
from setuptools import build_meta
target = sys.argv[1]  # setuptools replaces sys.argv
build_meta.build_wheel(target)
build_meta.build_sdist(target)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy, without network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in PACKED:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, source)
    subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=source, check=True, capture_output=True)
    return target


def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def metadata(built: Path) -> email.message.Message:
    return email.message_from_bytes(wheel(built).read(f"dist_adamw-{dist_adamw.__version__}.dist-info/METADATA"))


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "dist_adamw").rglob("*.py")}
    names = {name for name in wheel(built).namelist() if ".dist-info/" not in name}
    assert names == {*package, "dist_adamw/py.typed", "dist_adamw/recipes/recipe.schema.json"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel(built).namelist())


def test_the_sdist_has_what_the_tests_need(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "Makefile",
        "constraints.txt",
        "CHANGELOG.md",
        "docs/design.md",
        "docs/curves.png",
        "examples/README.md",
        "examples/torch_ddp.py",
        "mkdocs.yml",
        "tests/installed/check.py",
    }
    assert wanted <= names
    assert {f"configs/{p.relative_to(ROOT / 'configs')}" for p in (ROOT / "configs").rglob("*.yaml")} <= names
    assert not any(name.endswith(".pyc") for name in names)


def test_metadata(built: Path) -> None:
    found = metadata(built)
    assert (found["Name"], found["Version"], found["License-Expression"]) == (
        "dist_adamw",
        dist_adamw.__version__,
        "MIT",
    )
    assert found["Requires-Python"] == ">=3.10"
    required = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split("[")[0].split("<")[0].split(">")[0] for line in required} == {
        "PyYAML",
        "accelerate",
        "docstring_parser",
        "jsonargparse",
        "numpy",
        "pydantic",
        "safetensors",
        "torch",
    }
    extras = {"completion", "deepspeed", "dev", "docs", "lightning", "release", "terminal", "tracking", "transformers"}
    assert set(found.get_all("Provides-Extra", [])) == extras


def test_the_check_of_a_wheel_runs_every_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: the check itself starts the installed command for each, which takes longer."""

    def run(arguments: Sequence[str]) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    assert check.check_commands(tmp_path, run) == set(VERBS)


def test_constraints_pin_on_python_3_10_only_what_runs_there() -> None:
    """Otherwise `make setup PYTHON=python3.10` ends with pip's ResolutionImpossible."""
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pins_of_310 = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": "3.10"})]
    too_new = [str(pin) for pin in pins_of_310 if not runs_on_python_3_10(pin)]
    assert too_new == []


def runs_on_python_3_10(pin: Requirement) -> bool:
    """Whether the pinned version may be installed on Python 3.10; True for one that this environment does not have."""
    try:
        found = importlib.metadata.distribution(pin.name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return found.version not in pin.specifier or "3.10.13" in SpecifierSet(found.metadata["Requires-Python"] or "")


@pytest.mark.parametrize(
    ("library", "extra", "statement"),
    [
        ("deepspeed", "deepspeed", "dist_adamw.register_deepspeed()"),
        ("transformers", "transformers", "dist_adamw.prepare_trainer(object())"),
        ("lightning pytorch_lightning", "lightning", "dist_adamw.prepare_lightning(object())"),
        (
            "matplotlib",
            "tracking",
            "dist_adamw.load_recipe({'batch': {'size': 8}, 'scheduler': {'epoch_size': 32}}).preview().plot('x.png')",
        ),
    ],
)
def test_a_missing_library_is_one_sentence_that_names_the_extra(
    library: str, extra: str, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in library.split():
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    with pytest.raises(ImportError, match=rf"pip install 'dist_adamw\[{extra}\]'") as raised:
        exec(statement, {"dist_adamw": dist_adamw})
    assert "\n" not in str(raised.value)


def test_a_plan_for_a_hugging_face_model_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=rf"{tmp_path}.*pip install 'dist_adamw\[transformers\]'"):
        plan(str(tmp_path))


def test_prepare_trainer_refuses_what_is_no_trainer() -> None:
    with pytest.raises(ValueError, match=r"needs a transformers\.Trainer, got object"):
        dist_adamw.prepare_trainer(object())  # type: ignore[type-var]
