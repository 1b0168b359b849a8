"""The laboratory: every table and figure of the paper as data, and one command that repeats them."""
