"""The kernel backends against the reference, and against themselves bit for bit."""
