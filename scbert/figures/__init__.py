"""One function a figure: given a table, it returns axes."""
