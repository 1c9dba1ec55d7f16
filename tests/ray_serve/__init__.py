"""Tests on a local Ray cluster. `make test-ray` installs Ray and runs them; `make test` does neither."""
