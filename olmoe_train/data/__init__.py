"""From prepared tokens to batches. data/prepare/ writes the tokens, loader.py builds the batches."""
