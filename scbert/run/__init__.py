"""A run of a notebook: its parameters, its record, what it needs, and the report."""
