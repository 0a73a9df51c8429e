"""Disturbs every command on purpose, and tells whether anything went wrong in silence."""
