"""The rows of the question-answering posterior: open questions with short answers.

    python -m benchmarks.questions --data FOLDER      FOLDER has webquestions/{trainmodel,val,devtest}.jsonl (CC BY 4.0)

writes benchmarks/data/answers.train.jsonl, rows of `posterior fit --task text` (`prompt`, `response`), and
answers.{calibration,test}.jsonl, rows of `posterior calibrate --task text` (`prompt`, `answers`). A training row's
response is the first of its accepted answers. Training rows are of `trainmodel`; calibration rows are the first half of
`val`; test rows are `devtest` and the other half. No question is in two of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from posterior.data.reading import Row, read_rows

DATA = Path(__file__).parent / "data"
TRAIN = 256  # rows: minutes of fitting on 2 cores
LONGEST = 6  # words of a response; longer ones are lists and addresses of pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with webquestions/")
    args = parser.parse_args()
    train, val, devtest = (
        read_rows(args.data / "webquestions" / f"{part}.jsonl") for part in ("trainmodel", "val", "devtest")
    )
    half = len(val) // 2
    calibration, test = graded(val[:half]), graded([*devtest, *val[half:]])
    known = {row["prompt"] for row in (*calibration, *test)}
    calibration = [row for row in calibration if row["prompt"] not in {other["prompt"] for other in test}]
    usable = [row for row in train if row["prompt"] not in known and short(row["answers"][0])]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(0)).tolist()
    write("train", [response(usable[index]) for index in order[:TRAIN]])
    write("calibration", calibration)
    write("test", test)


def graded(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each question once, with its accepted answers."""
    each = {row["prompt"]: row["answers"] for row in rows}
    return [{"prompt": prompt, "answers": answers} for prompt, answers in each.items()]


def short(answer: str) -> bool:
    return "://" not in answer and len(answer.split()) <= LONGEST


def response(row: Row) -> dict[str, Any]:
    return {"prompt": row["prompt"], "response": row["answers"][0]}


def write(part: str, rows: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (DATA / f"answers.{part}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
