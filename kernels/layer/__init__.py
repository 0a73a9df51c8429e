"""The work of a decoder layer between its matrix products."""
