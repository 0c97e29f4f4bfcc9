"""Ctrl-C, as the commands pass it on. Nothing is imported here: the command line begins with it."""


class Interrupted(Exception):
    """Ctrl-C while a command ran, by which time every temporary file is gone."""
