"""The one page with everything that was measured."""
