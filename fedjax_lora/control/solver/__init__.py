"""TSFA's problem of one round, solved: shares, best responses, Newton's method."""
