"""Stores behind a network: object stores through obstore, others through fsspec. See cluster/storage.py."""
