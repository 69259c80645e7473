"""python -m pairs: from a corpus to a file of pairs, and looking at what was built."""
