"""What a model is trained for: its head, its loss, and how it is scored."""
