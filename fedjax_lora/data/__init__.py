"""Data: where examples come from, who holds them, and how a client walks through its own."""
