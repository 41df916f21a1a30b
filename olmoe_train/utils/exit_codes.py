"""Exit codes of every verb."""

OK, FAILED, BAD_INPUT, STOPPED_BY_SIGNAL = 0, 1, 2, 75
