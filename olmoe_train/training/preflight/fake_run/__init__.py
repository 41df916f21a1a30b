"""A run on fake ranks, without memory, values or other processes: `olmoe plan check=true`."""
