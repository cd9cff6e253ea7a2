"""Lists the commands: python -m experiments.

The list is read from the source files without importing them, because imports are slow.
"""

import ast
import sys
from pathlib import Path


def list_commands() -> dict[str, str]:
    """Maps each command to the first line of its docstring."""
    commands = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        commands[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return commands


def main(arguments: list[str]) -> int:
    """Prints the list, or one line about bad arguments; returns the exit status."""
    commands = list_commands()
    if arguments and arguments[0] in commands:
        name = arguments[0]
        print(f"error: run it as python -m experiments.{name}", file=sys.stderr)
        return 2
    if arguments and arguments != ["--help"]:
        names = ", ".join(commands)
        print(
            f"error: no command is called {arguments[0]!r}; the commands are {names}.",
            file=sys.stderr,
        )
        return 2
    print("usage: python -m experiments.COMMAND [--config=FILE.py:VARIANT] [--help]")
    print("--help lists the variants and fields of a command.\n")
    width = max(map(len, commands))
    for name, summary in commands.items():
        print(f"  {name:{width}}  {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
