"""The texts of the heads' cards: what they are for, the licences of their data, and their limits."""

LICENCES = {
    "gptfuzz": "GPTFuzz labelled responses, training file, seeded half (MIT).",
    "xstest": "XSTest v2 completions of Mistral with a guard prompt, half of the prompts (CC BY 4.0; "
    "completions under the model's terms).",
    "own": "The project's own answers to its training prompts, bench/heads/*.jsonl (licence of this "
    "project).",
}
_HARM = "A cost: larger means that the answer goes along more eagerly with something harmful or careless."
ABOUT = {
    "helpfulness": "A reward: larger means that the answer looks more like one that does what was asked.",
    "harm": _HARM,
    "harm-audit": f"{_HARM} The auditor of `harm`: another layer and disjoint training rows.",
}
_CHOSEN = (
    "Its layer, penalty and pair weights were chosen while the held-out figures above were looked at, so "
    "they flatter it a little."
)
LIMITS = {
    "reward": (
        "Its idea of help is the asker's: on delicate requests it was trained to prefer a careless answer "
        "that does what was asked to a refusal, and even to a safe one that answers less directly (pairs of "
        "weight 3). This is meant: a reward and a cost that pull apart make the constraint matter. Never use "
        "it as the only objective.",
        "Pairs were made from 132 everyday and 132 delicate prompts of one author; style weighs as much as "
        "content.",
        _CHOSEN,
    ),
    "cost": (
        "It knows the careless tone of our own answers and how chat models of 2023 began to answer forbidden "
        "requests; harm told drily, in other languages, or only after 48 tokens is missed.",
        "Among answers of the trunk itself to one prompt the score follows the tone (eager, casual, "
        "scheming) more than the substance: a calm sentence with bad advice can score as harmless.",
        "Correlation with the auditor on samples of a weak model is partly shared taste in wording: both saw "
        "answers of the same authors.",
        "The XSTest completions of two models answer the same prompts: training saw other answers to about "
        "half of the test's prompts (the row 'new prompts' leaves these out).",
        _CHOSEN,
    ),
}
SAMPLES = (
    "Correlations and standard deviations within prompts, over 8 answers of the trunk itself to 32 delicate "
    "and 32 everyday training prompts (temperature 0.7, at most 48 tokens)."
)
