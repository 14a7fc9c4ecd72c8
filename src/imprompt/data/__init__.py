"""Pairs of image and caption, and their cached columns."""
