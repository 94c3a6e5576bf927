"""One worker, and many as one."""
