"""Tests of deploy/kubernetes, rendered. `make test-kubernetes` installs what they need; `make test` does neither."""
