"""Reference operations, and the choice of implementation for what `kernels/` accelerates."""
