"""The rows of the customer-service posterior: three typed questions about messages to a bank.

    python -m benchmarks.support --data FOLDER        FOLDER has banking77/{train,test}.jsonl (CC BY 4.0, PolyAI)

writes benchmarks/data/support.{train,calibration,test}.jsonl, decision rows for `posterior fit`, `calibrate` and
`evaluate`. What is true of a message follows from its intent, one of 77, which people gave it: the department (our
grouping of the intents), whether something has gone wrong, and whether there may be fraud or theft. Half of the rows
ask for the department, a quarter each statement; of the last, half are true, so that 8 in 100 are not all that a fit
sees. Training and calibration rows are of banking77's training messages, test rows of its test messages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from posterior.data.reading import Row, read_rows

DATA = Path(__file__).parent / "data"
ROWS = {"train": 512, "calibration": 600, "test": 600}
DEPARTMENTS = ("account", "cards", "cash", "exchange", "payments", "security", "top-ups", "transfers")
WRONG = frozenset(
    [
        "balance_not_updated_after_bank_transfer",
        "balance_not_updated_after_cheque_or_cash_deposit",
        "beneficiary_not_allowed",
        "card_arrival",
        "card_not_working",
        "card_payment_fee_charged",
        "card_payment_not_recognised",
        "card_payment_wrong_exchange_rate",
        "card_swallowed",
        "cash_withdrawal_charge",
        "cash_withdrawal_not_recognised",
        "compromised_card",
        "contactless_not_working",
        "declined_card_payment",
        "declined_cash_withdrawal",
        "declined_transfer",
        "direct_debit_payment_not_recognised",
        "extra_charge_on_statement",
        "failed_transfer",
        "lost_or_stolen_card",
        "lost_or_stolen_phone",
        "passcode_forgotten",
        "pending_card_payment",
        "pending_cash_withdrawal",
        "pending_top_up",
        "pending_transfer",
        "pin_blocked",
        "refund_not_showing_up",
        "reverted_card_payment",
        "top_up_failed",
        "top_up_reverted",
        "transaction_charged_twice",
        "transfer_fee_charged",
        "transfer_not_received_by_recipient",
        "unable_to_verify_identity",
        "virtual_card_not_working",
        "wrong_amount_of_cash_received",
        "wrong_exchange_rate_for_cash_withdrawal",
    ]
)
THEFT = frozenset(
    [
        "card_payment_not_recognised",
        "cash_withdrawal_not_recognised",
        "compromised_card",
        "direct_debit_payment_not_recognised",
        "lost_or_stolen_card",
        "lost_or_stolen_phone",
    ]
)
DEPARTMENT = {
    "type": "choice",
    "name": "department",
    "instructions": "Which department should answer?",
    "choices": [{"value": value} for value in DEPARTMENTS],
}
PROBLEM = {"type": "predicate", "name": "problem", "instructions": "Something has gone wrong for the customer."}
FRAUD = {"type": "predicate", "name": "fraud", "instructions": "The customer may be a victim of fraud or theft."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77/{train,test}.jsonl")
    args = parser.parse_args()
    train, test = (unique(read_rows(args.data / "banking77" / f"{part}.jsonl")) for part in ("train", "test"))
    known = {str(row["text"]) for row in train}
    generator = torch.Generator().manual_seed(0)
    train, test = (shuffled(part, generator) for part in (train, [row for row in test if row["text"] not in known]))
    write("train", decisions(train[:5000], ROWS["train"]))
    write("calibration", decisions(train[5000:], ROWS["calibration"]))
    write("test", decisions(test, ROWS["test"]))


def unique(rows: list[Row]) -> list[Row]:
    return list({str(row["text"]): row for row in rows}.values())


def shuffled(rows: list[Row], generator: torch.Generator) -> list[Row]:
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def decisions(messages: list[Row], count: int) -> list[dict[str, Any]]:
    """As many rows, each of a message of its own."""
    quarter = count // 4
    asked, rest = messages[: 2 * quarter], messages[2 * quarter :]
    stated, rest = rest[:quarter], rest[quarter:]
    theft = [row for row in rest if row["intent"] in THEFT][: quarter // 2]
    other = [row for row in rest if row["intent"] not in THEFT][: quarter - len(theft)]
    return [
        *(decision(row, DEPARTMENT, row["department"]) for row in asked),
        *(decision(row, PROBLEM, row["intent"] in WRONG) for row in stated),
        *(decision(row, FRAUD, row["intent"] in THEFT) for row in (*theft, *other)),
    ]


def decision(row: Row, question: dict[str, Any], answer: Any) -> dict[str, Any]:
    return {"input": row["text"], "question": question, "answer": answer}


def write(part: str, rows: list[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (DATA / f"support.{part}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
