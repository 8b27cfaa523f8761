"""More cells than memory, more devices than one, interruptions."""
