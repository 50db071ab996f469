"""The tests. A package of its own, because some installed distributions bring a `tests` along."""
