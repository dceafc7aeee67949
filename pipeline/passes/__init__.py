"""Graph passes, one per file; their order stands in ``bertile.optimizer``."""
