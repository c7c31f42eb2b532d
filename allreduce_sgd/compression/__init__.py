"""Compression: what ranks send instead of whole gradients. One codec per file, error feedback around any of them."""
