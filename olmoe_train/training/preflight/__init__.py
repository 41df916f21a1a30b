"""Checks of a training config before anything is allocated."""
