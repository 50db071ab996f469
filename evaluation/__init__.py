"""Judging answers: sets and their sources, scores, the published numbers, findings, the report."""
