"""`python -m bench.run` lists the cases; `python -m bench.run CASE` checks, then measures, prints a table and
adds a line to bench/results.jsonl, from which bench/RESULTS.md is written."""

import sys

import tyro
from rich.console import Console
from rich.table import Table

from bench.run.cases import CASES
from bench.run.results import add, notes_of, table_of
from engine.command import run_command


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    if not arguments or arguments[0] not in CASES:
        print("python -m bench.run CASE [--help]; cases:")
        for name, case in CASES.items():
            print(f"  {name:12} {' '.join(case.config.__doc__.split())}")
        return 2 if arguments and arguments[0] not in ("-h", "--help") else 0
    name = arguments[0]
    config = tyro.cli(CASES[name].config, args=arguments[1:], prog=f"python -m bench.run {name}")
    return run_command(lambda _, standing: _measure(name, config), arguments)


def _measure(name: str, config) -> None:
    line = CASES[name].run(config)
    title, header, rows = table_of(line)
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in notes_of(line):
        console.print(note)
    if config.save:
        add(line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
