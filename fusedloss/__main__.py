"""`python -m fusedloss`, and the `fusedloss` command."""

from __future__ import annotations

import sys

CLI_LIBRARIES = ("typer", "click", "rich")


def main() -> int:
    """Run the command line and return its exit status; `info` needs none of the command line's libraries."""
    if sys.argv[1:] == ["info"]:
        from fusedloss.cli.info import report

        print(report())
        return 0
    try:
        from fusedloss.cli.main import run
    except ModuleNotFoundError as error:
        if error.name not in CLI_LIBRARIES:
            raise
        print(f"fusedloss: the command line needs {error.name}: pip install 'fusedloss[train]'", file=sys.stderr)
        return 2
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
