"""From files to token ids.

tables.py          rows of jsonl, csv and parquet files and of `datasets`
chat.py            cells -> conversations, and through the chat template to token ids
templates.py       chat templates by name or from a file
prompts.py         rows -> prompts: checked, in the chat template, as token ids
response_pairs.py  rows -> prompts with two responses each
dealing.py         seeded choices among prompts: subsets, splits, the prompts of an iteration and of a step
"""
