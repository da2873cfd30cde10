"""Transformer language models."""

from dtrain import component


class Options(component.Options):
    """A decoder-only transformer."""
