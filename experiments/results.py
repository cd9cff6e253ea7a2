"""Fills in every measured number of README.md, docs/ and the model cards.

    python -m experiments.results            # rewrites the values of the markers
    python -m experiments.results --check    # exit status 1 if anything would change

docs/report.md is written as a whole, from the table of experiments/common/report.py.
In the other documents a number is a marker, `<!--= FOLDER KEY FORMAT -->value<!--/-->`:

* FOLDER is a folder of results/. `NAME*` stands for NAME and all NAME_seedN. They must
  agree in all settings but the seed; the value is then `mean ± deviation` (ddof 1).
  A folder COMMAND_VARIANT that does not exist gives "not run yet". The numbers that the
  student report states are in results/published.
* KEY is a dotted path into summary.json, with indices into lists. `A:B` is the ratio of
  two keys and `A-B` their difference. Where the run itself went over several seeds,
  KEY_std is its deviation. `seconds_until(METRIC,LEVEL)` is the time at which a metric
  of metrics.jsonl first reaches a level. `A+B` is a sum, and a term `OTHER/KEY` is read
  from another folder.
* FORMAT is `d`, `.Nf` or `.Ng`, with a prefix for the unit: `%` times 100, `min`
  seconds to minutes, `M` millions.

How a number was made is a marker `<!--= FOLDER @COLUMN -->value<!--/-->`. COLUMN is
`run`, `command`, `seeds`, `time`, `machine`, `commit` or `evidence`. The marker
`<!--= section @runs -->` holds a table of them, with a row for each folder that the
markers of the section, or those since the last such table, name.
"""

import argparse
import sys
from pathlib import Path

from experiments.common import evidence, files, report


def outdated(root: Path = evidence.ROOT) -> dict[Path, str]:
    """The documents that are not up to date, with the text they should hold."""
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    pages += sorted((root / "results").glob("*/model_card.md"))
    texts = {page: page.read_text() for page in pages}
    filled = {page: evidence.fill(text, root) for page, text in texts.items()}
    filled[root / "docs" / "report.md"] = report.document(root)
    return {page: text for page, text in filled.items() if text != texts.get(page)}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    try:
        stale = outdated()
        for path, text in stale.items():
            print(f"{'outdated' if arguments.check else 'wrote'}: {path}")
            if not arguments.check:
                files.write_atomic(path, lambda file, text=text: file.write(text))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
