"""What one notebook asks, one module a notebook."""
