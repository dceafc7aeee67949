"""Times candidates on a GPU, and measures what that GPU can do at most."""
