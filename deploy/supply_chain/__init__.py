"""Checks that need more than a command line; `make supply-chain` calls them."""
