"""The cache strategies, one file each. Torch only."""

ALL_CACHES = ("none", "prefix", "dual", "delayed", "vicinity")
"""The names, for algorithms that take every strategy."""
