"""`python -m dtrain` is `dtrain`."""

from dtrain.cli import entry

entry()
