"""From files to token ids.

formats.py         rows of a file: jsonl, json, csv, parquet, also compressed
tables.py          from a name to rows: of a file, a folder or a data set that `datasets` knows
reading.py         what is left out and counted, and how many rows of a large set are held
chat.py            cells -> conversations, and through the chat template to token ids
templates.py       chat templates by name or from a file
layouts.py         rows of published layouts -> conversations and their answers
prompts.py         rows -> prompts: checked, in the chat template, as token ids
response_pairs.py  rows -> prompts with two responses each
dealing.py         seeded choices among prompts: subsets, splits, the prompts of an iteration and of a step
"""
