"""Checks of the machines of a run: what `olmoe doctor` prints, and its short form at every start."""
