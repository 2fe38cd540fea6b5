"""Helpers shared by tests: code generation for a GPU that is not there, and inspection of machine code."""
