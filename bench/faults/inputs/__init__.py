"""Malformed inputs: what each has to be refused for, or why it is none of the program's business."""
