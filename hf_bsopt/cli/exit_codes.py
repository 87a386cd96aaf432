"""The exit codes of the command."""

FOUND, NOTHING_FITS, USAGE, INTERRUPTED = 0, 1, 2, 130
