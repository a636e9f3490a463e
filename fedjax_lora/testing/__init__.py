"""What tells an author of a method whether it keeps the laws of its slot."""
