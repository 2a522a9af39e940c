"""Everything on disk: run folders, checkpoints, JSON lines, hashes."""
