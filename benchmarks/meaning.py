"""Which cosine of sentence embeddings tells the same answer from another one?

    python -m benchmarks.meaning FOLDER

FOLDER is one of sentence-transformers, as `posterior serve --meaning-embedding` takes it. The answers below were
written by hand, to ten questions: a line holds answers of one meaning. Two answers to one question are a same pair if
they are in one line, else an other pair. "right" is the mean of two shares: of the same pairs that reach a threshold,
and of the other pairs that do not. The best threshold is a choice on these pairs, and no result.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from posterior.evaluation.report import markdown_rows
from posterior.meaning.embedding import Embedding

ANSWERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "Which city has the most people in the United States?": (
        ("New York City", "NYC", "New York", "It is New York City.", "New York, NY"),
        ("Los Angeles", "LA", "Los Angeles, California"),
        ("Chicago", "Chicago, Illinois"),
    ),
    "Who was president of the United States in 2010?": (
        ("Barack Obama", "Obama", "President Obama", "Barack Hussein Obama II", "It was Barack Obama."),
        ("George W. Bush", "Bush", "President George W. Bush"),
        ("Bill Clinton", "Clinton"),
        ("Michelle Obama",),
    ),
    "What is the capital of Australia?": (
        ("Canberra", "The capital is Canberra.", "Canberra, Australia"),
        ("Sydney", "The capital of Australia is Sydney.", "Sydney, New South Wales"),
        ("Melbourne",),
    ),
    "When did World War II end?": (
        ("1945", "In 1945", "It ended in 1945.", "in the year 1945"),
        ("1944", "In 1944"),
        ("1918", "It ended in 1918."),
        ("September 2, 1945", "2 September 1945"),
    ),
    "How many legs does a spider have?": (
        ("8", "eight", "Eight legs", "A spider has eight legs."),
        ("6", "six", "Six legs"),
        ("10", "ten"),
    ),
    "Who wrote Romeo and Juliet?": (
        ("William Shakespeare", "Shakespeare", "It was written by William Shakespeare.", "W. Shakespeare"),
        ("Christopher Marlowe", "Marlowe"),
        ("Charles Dickens", "Dickens"),
    ),
    "Which country did the Korean War begin in?": (
        ("South Korea", "Republic of Korea", "the South of Korea"),
        ("North Korea", "Democratic People's Republic of Korea"),
        ("China", "People's Republic of China"),
    ),
    "Is a tomato a fruit?": (
        ("Yes", "Yes, it is.", "Yes, a tomato is a fruit."),
        ("No", "No, it is not.", "No, a tomato is a vegetable."),
    ),
    "What is the chemical symbol of gold?": (
        ("Au", "The symbol is Au.", "Au (gold)"),
        ("Ag", "The symbol is Ag."),
        ("Fe",),
    ),
    "Where was Albert Einstein born?": (
        ("Ulm", "Ulm, Germany", "He was born in Ulm.", "in Ulm, in the Kingdom of Württemberg"),
        ("Munich", "Munich, Germany", "He was born in Munich."),
        ("Vienna", "Vienna, Austria"),
    ),
}  # fmt: skip
THRESHOLDS = (*(n / 100 for n in range(40, 100, 5)), 0.98, 0.99)
BEFORE = ("", "the question", "nine other questions with answers, and the question")  # what stands before the answers


def prompt(before: str, question: str) -> str:
    """What stands before each answer to the question."""
    others = [f"{other} {lines[0][0]}" for other, lines in ANSWERS.items() if other != question]
    return {BEFORE[0]: "", BEFORE[1]: f"{question} ", BEFORE[2]: "\n".join([*others, f"{question} "])}[before]


def pairs(model: Embedding, before: str) -> tuple[list[float], list[bool]]:
    """The cosine of every pair of answers to one question, and whether it is the same meaning."""
    cosines, same = [], []
    for question, lines in ANSWERS.items():
        answers = [(number, answer) for number, line in enumerate(lines) for answer in line]
        start = prompt(before, question)
        vectors = model.vectors([start + answer for _, answer in answers])
        for one, other in combinations(range(len(answers)), 2):
            cosines.append(float(vectors[one] @ vectors[other]))
            same.append(answers[one][0] == answers[other][0])
    return cosines, same


def report(model: Embedding) -> str:
    """The AUROC and a table of thresholds, for answers alone and after what may stand before them."""
    blocks = []
    for before in BEFORE:
        found, said = pairs(model, before)
        cosines, same = torch.tensor(found), torch.tensor(said)
        rows = []
        for threshold in THRESHOLDS:
            kept, merged = (cosines[same] >= threshold).float().mean(), (cosines[~same] >= threshold).float().mean()
            columns = (kept, merged, (kept + 1 - merged) / 2)
            rows.append([f"{threshold:.2f}", *(f"{float(each):.2f}" for each in columns)])
        where = f"after {before}" if before else "alone"
        title = f"{int(same.sum())} same and {int((~same).sum())} other pairs, {where}"
        head = ["threshold", "same that reach it", "other that reach it", "right"]
        blocks.append(f"### {title}: AUROC {roc_auc_score(said, found):.3f}\n\n{markdown_rows([head, *rows])}")
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of sentence-transformers")
    print(report(Embedding(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
