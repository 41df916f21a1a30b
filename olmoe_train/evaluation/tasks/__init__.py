"""Downstream tasks: multiple-choice questions that a model answers by the likelihood of each choice."""
