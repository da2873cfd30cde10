"""What the doctor found: one line a finding, and the next move under each that is not as it should be."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dtrain.finding import Finding

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def show(findings: "Sequence[Finding]") -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(Text(finding.state, style=STYLES[finding.state]), finding.area, text)
    return table


def verdict(findings: "Sequence[Finding]", what: str = "this machine") -> str:
    """One sentence: how many of what, and whether `what` can train."""
    counts = {state: sum(finding.state == state for finding in findings) for state in ("problem", "warning")}
    counted = [f"{n} {state}{'s' if n > 1 else ''}" for state, n in counts.items() if n]
    if counts["problem"]:
        return f"{what} cannot train as it is: {', '.join(counted)} above, each with its remedy"
    return f"{what} can train{f' ({counted[0]} above)' if counted else ''}"
