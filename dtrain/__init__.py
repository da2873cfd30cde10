"""dtrain: one command carries a training job to a Ray cluster, shards it, and keeps it alive."""

__version__ = "0.1.0"
