"""Exit codes of every verb: done, failed, invalid configuration or input, stopped by a signal (saved), and
nobody reads the output (128 + SIGPIPE, as a shell reports it)."""

OK, FAILED, BAD_INPUT, STOPPED_BY_SIGNAL, CLOSED_OUTPUT = 0, 1, 2, 75, 141
