"""Secrets and the authenticated record of a protected photo; knows nothing of networks and needs no torch."""
