"""Checks of the tree itself: floors, sizes, pages that are generated from the code."""
