"""The tutorials run as written and print the output that they show."""

import importlib.util
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md"))
    if page.stem != "index"
]
# Another machine rounds otherwise, and training amplifies that. An accuracy of 95 %
# may thus be 90 %; counts and shapes repeat exactly but are compared the same way.
RELATIVE = 0.05
OPTIONAL = {"equinox": "equinox", "haiku": "dm-haiku"}  # module: distribution

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def read_steps(text):
    """(line, code, expected output or None) of each python block of a page."""
    blocks = [
        (text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]
    steps = []
    for (line, language, code), following in zip(
        blocks, [*blocks[1:], (0, "", "")], strict=True
    ):
        if language == "python":
            steps.append((line, code, following[2] if following[1] == "text" else None))
    return steps


def check_output(expected, found, where):
    """The words agree exactly, the numbers within RELATIVE or their last digit."""
    assert _words(found) == _words(expected), f"{where} prints other words:\n{found}"
    pairs = zip(_NUMBER.findall(expected), _NUMBER.findall(found), strict=True)
    for shown, printed in pairs:
        decimals = len(shown.partition(".")[2])
        # A number that is shown without decimals is a count or a size.
        rounding = 10.0**-decimals if decimals else 0
        assert float(printed) == pytest.approx(
            float(shown), rel=RELATIVE, abs=rounding
        ), f"{where} prints {printed} for {shown}:\n{found}"


def _words(text):
    return _NUMBER.sub("#", text).split()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial_prints_what_it_shows(page, tmp_path, monkeypatch):
    steps = read_steps(page.read_text())
    assert sum(expected is not None for *_, expected in steps) >= 2
    monkeypatch.chdir(tmp_path)
    namespace, missing = {"__name__": page.stem}, set()
    for line, code, expected in steps:
        imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
        absent = {m for m in imported & OPTIONAL.keys() if not _is_installed(m)}
        if absent:
            missing |= absent
            continue
        where = f"{page.name}:{line}"
        printed = io.StringIO()
        with redirect_stdout(printed):
            # Blank lines in front make the line numbers of errors those of the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        if expected is not None:
            check_output(expected, printed.getvalue(), where)
    if missing:
        packages = " ".join(sorted(OPTIONAL[module] for module in missing))
        pytest.skip(
            f"{page.name}: the parts that need optional packages were left out, the "
            f"others pass. pip install {packages}"
        )


def _is_installed(module):
    return importlib.util.find_spec(module) is not None


def test_output_with_other_words_or_numbers_fails():
    check_output("loss 0.50 of 8\n", "loss 0.51 of 8\n", "here")
    for wrong in ("loss 0.60 of 8\n", "cost 0.50 of 8\n", "loss 0.50 of 9\n"):
        with pytest.raises(AssertionError):
            check_output("loss 0.50 of 8\n", wrong, "here")
