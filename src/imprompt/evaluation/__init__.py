"""Judging what was generated, and telling it in tables and reports."""
