"""redknot: head-aware KV cache reuse, paged attention and sparse FFN."""
