"""Communicators: how ranks exchange tensors. One protocol (`base`), one file per way of doing it."""
