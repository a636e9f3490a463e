"""Low-rank adapters: their factors, the mask of ranks, and the modules they sit on."""
