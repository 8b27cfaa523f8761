"""What every reader raises where it knows a file, and knows why it can't be read."""


class Refusal(ValueError):
    """What a file is, and the line that makes it one that is read; without path and dot, which `read_cells` adds."""
