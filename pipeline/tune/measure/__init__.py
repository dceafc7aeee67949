"""Times candidates: here, in a process of their own, or on a device over TVM's RPC."""
