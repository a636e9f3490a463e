"""What a client does in a round: local steps, their optimizer, corrections, what stays with it."""
