"""Names instructions that TVM cannot."""
