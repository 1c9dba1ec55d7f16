"""One script a question; each prints a table, then one line of JSON."""
