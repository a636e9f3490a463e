"""What is chosen before a run: pilot, bound, rank, first queue."""
