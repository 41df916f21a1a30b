"""From a corpus to batches: prepare.py writes token shards, tokens.py reads them, loader.py makes batches."""
