"""Scorers that runs name as module:function, and some that a run refuses."""


def letters(prompts, responses):
    return [float(len(set(r))) for r in responses]


def codes(prompts, responses):
    return [float(sum(map(ord, r)) % 25) for r in responses]


def either_sign(prompts, responses):
    return [score - 12.0 for score in codes(prompts, responses)]


def brevity(prompts, responses):
    return [-score for score in codes(prompts, responses)]


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in r) + len(r) / 100 for r in responses]


def constant(prompts, responses):
    return [1.0] * len(responses)


def not_a_number(prompts, responses):
    return [float("nan")] * len(responses)


def only_one(prompts, responses):
    return [0.0]


def away(prompts, responses):
    raise RuntimeError("the judge is away")
