"""What goes wrong by a user's mistake, and what a user should know: each in one line."""


class ConfigError(ValueError):
    """A user's mistake in a configuration, in one line."""


class Notice(UserWarning):
    """What a user should know, in one line."""


class ConfigWarning(Notice):
    """What a configuration turns into without saying so, in one line."""


class RunWarning(Notice):
    """What a run came upon, in one line."""


def reason_of(error: Exception) -> str:
    """What an error of a file or of another library says, in one line."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
