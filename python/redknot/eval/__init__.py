"""The embedded model, and what measures it."""
