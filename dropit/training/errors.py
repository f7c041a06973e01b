"""What a user is told in one line, and the exit code that goes with it."""


class UserError(Exception):
    """Something that the user can mend: the message says what it is and what would be right."""

    exit_code = 1


class ConfigError(UserError):
    """A config file, a key or an argument is wrong."""

    exit_code = 2


class SetupError(UserError):
    """The machine lacks something that the run needs: data, weights, devices, a place to write."""
