"""Experiments: which class-balanced loss pays where, by commands that anyone can repeat."""
