"""Scorers of responses: rewards and costs.

    base.py         what a scorer is
    find.py         from the value of --reward, --cost or --audit to a scorer
    heads.py        linear heads on a model's hidden states
    models.py       which kind of model a folder is, and how it is asked
    last_token.py   classifiers, reward and cost models on the project's decoder, read at a text's last token
    guards.py       language models that answer safe or unsafe
    classifiers.py  sequence-classification models of transformers
    recipes.py      how each published kind is asked
    reader.py       writes and tokenises what is asked
    labels.py       the labels of a classifier
    functions.py    Python functions
    remote.py       asks judges behind HTTP
    remote_forms.py how judges are named and asked, and what of an answer is read
    answers.py      what judges have answered, so that none is asked twice
    built_in.py     length and refusal
    guest.py        the boundary to code of the user's: what it may return, and what it cannot change
    names.py        what may name a scorer
    scoring.py      scores of all responses of a sample; trying scorers out before a run
    training.py     `python -m engine.train head`, whose parts are the files head_*.py

A new kind of scorer is a file with a function that returns a `base.TextScorer`,
and its form in `find.find_scorer`.
"""
