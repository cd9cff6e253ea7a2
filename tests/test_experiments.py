"""python -m experiments: the list of the commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import __main__ as experiments

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem for path in (ROOT / "experiments" / "configs").glob("[!_]*.py")}


def test_every_command_has_one_line(capsys):
    assert experiments.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    listed = dict(line.split(maxsplit=1) for line in lines)
    assert CONFIGS <= listed.keys()
    for name, summary in listed.items():
        source = (ROOT / "experiments" / f"{name}.py").read_text()
        assert source.startswith(f'"""{summary}')
        assert 'if __name__ == "__main__":' in source


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train_vti", "no command is called 'train_vti'; the commands are benchmark, "),
        ("train_vit", "run it as python -m experiments.train_vit"),
    ],
)
def test_words_are_refused_with_one_line(word, message, capsys):
    assert experiments.main([word]) == 2
    out, error = capsys.readouterr()
    assert not out and message in error and len(error.splitlines()) == 1


def test_list_is_read_without_jax():
    script = """
import sys
from experiments.__main__ import main
assert main([]) == 0
assert "jax" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert ended.returncode == 0
