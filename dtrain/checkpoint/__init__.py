"""What survives: snapshots in shared memory, checkpoints on storage, and the rules of what is kept and trusted."""
