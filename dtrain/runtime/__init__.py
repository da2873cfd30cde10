"""Who keeps it alive: driver (one per run) -> agent (one per node) -> ranks, all forked from the node's zygote."""
