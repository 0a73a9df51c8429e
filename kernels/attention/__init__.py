"""Attention of a decoding step."""
