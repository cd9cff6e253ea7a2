"""The installed project is complete and has one version."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORES = ("functa", "vit", "lbi", "landscape")
PACKAGES = (*CORES, "experiments")

# Imports every module that is installed below the folder given, and says where from.
IMPORT_ALL = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
    package = importlib.import_module(name)
    assert pathlib.Path(package.__file__).parents[1] == root, package.__file__
    print(name, getattr(package, "__version__", "-"))
for path in sorted(root.glob("experiments/*/*.py")):
    importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
"""


def test_one_version():
    versions = {importlib.import_module(name).__version__ for name in CORES}
    citation = (ROOT / "CITATION.cff").read_text()
    assert versions == set(re.findall(r"^version: (.+)$", citation, re.M))


def test_citations_are_those_of_the_citation_file():
    citation = (ROOT / "CITATION.cff").read_text()
    papers = set(re.findall(r'"arXiv:([\d.]+)"', citation))
    entries = (ROOT / "docs" / "citing.md").read_text()
    assert papers == set(re.findall(r"eprint\s*= \{([\d.]+)\}", entries)) and papers
    for title in re.findall(r'^ +title: "?(.+?)"?$', citation, re.M):
        assert f"{{{title}}}" in entries
    [version] = re.findall(r"^version: (.+)$", citation, re.M)
    assert f"version = {{{version}}}" in entries


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip has installed a copy of the source, without a network."""
    source = tmp_path_factory.mktemp("source")
    target = tmp_path_factory.mktemp("site-packages")
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", target]
    run(*command, "--no-deps", "--no-build-isolation", source, cwd=source)
    return target


def run(*command, cwd, target=None):
    env = os.environ | ({"PYTHONPATH": str(target)} if target else {})
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_installed_copy_holds_every_module_and_marker(installed):
    def list_files(root):
        return {
            str(path.relative_to(root))
            for name in PACKAGES
            for path in (root / name).rglob("*")
            if path.suffix == ".py" or path.name == "py.typed"
        }

    files = list_files(installed)
    assert files == list_files(ROOT)
    assert {f"{name}/py.typed" for name in PACKAGES} <= files


@pytest.mark.slow
def test_installed_copy_is_imported_from_another_folder(installed, tmp_path):
    command = [sys.executable, "-c", IMPORT_ALL, str(installed), *PACKAGES]
    lines = run(*command, cwd=tmp_path, target=installed).splitlines()
    versions = dict(line.split() for line in lines)
    assert versions.pop("experiments") == "-"
    assert set(versions) == set(CORES)
    [info] = installed.glob("functa_jax-*.dist-info")
    assert set(versions.values()) == {info.name.split("-")[1].removesuffix(".dist")}


@pytest.mark.slow
def test_installed_command_finds_its_config(installed, tmp_path):
    command = [sys.executable, "-m", "experiments"]
    assert "train_vit" in run(*command, cwd=tmp_path, target=installed)
    # Without --config the command takes the file that is installed with it.
    command[-1] += ".meta_learn"
    command += ["--config.num_steps=-1", f"--workdir={tmp_path / 'run'}"]
    env = os.environ | {"PYTHONPATH": str(installed)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "num_steps must be at least 0" in ended.stderr
