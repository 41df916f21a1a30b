"""Exit codes of every verb: done, failed, invalid configuration or input, stopped by a signal (saved)."""

OK, FAILED, BAD_INPUT, STOPPED_BY_SIGNAL = 0, 1, 2, 75
