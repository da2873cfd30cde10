"""The embedded cluster: a Ray head on this machine, started on first use and kept warm."""

from pydantic import Field

from dtrain import component


class Options(component.Options):
    """A Ray head on this machine, bound to loopback, started on first use and kept warm."""

    home: str = Field(default="~/.dtrain", min_length=1, max_length=1024)
    """Folder that holds what belongs to the embedded cluster: its record, token and logs."""
