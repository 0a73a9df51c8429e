"""A table that is printed in a terminal and written into a page."""

from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Grid(NamedTuple):
    """A table; bars in header and rows are escaped for Markdown."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Returns the table in Markdown, under its title."""
        title = self.title
        for barred in ("|slack|", "|lambda - lambda*_p|"):
            title = title.replace(barred, barred.replace("|", "\\|"))
        lines = [f"**{title}**", "", f"| {' | '.join(self.header)} |", "|" + "---|" * len(self.header)]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])

    def show(self, console: Console) -> None:
        """Prints the table."""
        table = Table(*(h.replace("\\|", "|") for h in self.header), title=self.title)
        for row in self.rows:
            table.add_row(*(cell.replace("\\|", "|") for cell in row))
        console.print(table)
