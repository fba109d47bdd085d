"""Readers of the real data sets, and writers of our own faces in their layouts. One module per data set."""
