"""One file for each finding: the commands that measure it, and its figure, numbers and text."""
