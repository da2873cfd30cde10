"""Text from files."""

from dtrain import component


class Options(component.Options):
    """Text."""
