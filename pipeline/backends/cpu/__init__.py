"""The backend for processors."""
