"""`posterior calibrate --task text`: over a fake engine, and with vLLM on the first layers of the base."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from posterior.calibration.rightness import SAMPLED
from posterior.data.graded import encode
from posterior.models.base import Base, load_tokenizer
from posterior.storage import artefact
from server.calibrate.grading import described, graded
from server.calibrate.observing import Observation, observe
from server.calibrate.settings import Grading, TextCalibration
from server.cli import main
from server.services.predictive import Service
from tests.server import fakes, folders
from tests.server.http.sampling import DRAFTS, N
from tests.server.mixture import Reference

ROWS = [{"prompt": f"{i}?", "answers": ["Hello!" if i % 3 else "bye", "paris"]} for i in range(60)]
SETTINGS = TextCalibration(samples=N, max_tokens=4)


def observed(service: Service, rows: list[dict[str, Any]], settings: TextCalibration) -> list[Observation]:
    graded = encode(folders.TASK, fakes.Tokenizer(), rows)
    return asyncio.run(observe(service, service.find("gang"), graded, settings))


def is_right(service: Service, grading: Grading, text: str, accepted: str) -> bool:
    return asyncio.run(graded(service, grading, "who?", text, [accepted]))


def test_rows_are_written_sampled_and_graded(service: Service, engine: fakes.Engine) -> None:
    engine.drafts = DRAFTS
    first, second = observed(service, ROWS[:2], SETTINGS)
    assert (first.greedy.text, first.greedy.right, second.greedy.right) == ("hello", False, True)
    assert first.greedy.features["logprob"] == pytest.approx(math.log(0.5)), "three particles that agree"
    assert first.sampled is not None and first.meaning is not None
    assert first.sampled.features["own_meaning"] == 0 and first.sampled.features["largest_meaning"] == 0.6
    assert (first.meaning.text, first.meaning.right) == ("paris", True)
    assert set(first.meaning.features) == set(SAMPLED) and first.meaning.features["own_meaning"] == 0.6
    greedy, drawn = sorted(engine.bodies[:2], key=lambda body: body.get("n", 1))
    assert (greedy["temperature"], drawn["temperature"], drawn["n"]) == (0.0, 1.0, N)
    assert bytes(greedy["prompt"]) == b"0?" and greedy["max_tokens"] == 4


def test_without_samples_there_is_the_text_alone(service: Service, engine: fakes.Engine) -> None:
    (one,) = observed(service, ROWS[:1], TextCalibration(samples=0, predictive="map"))
    assert (one.sampled, one.meaning) == (None, None) and len(engine.bodies) == 1
    assert one.greedy.features["information"] == 0


def test_answers_are_graded_by_rule_or_by_the_base(service: Service, engine: fakes.Engine) -> None:
    assert is_right(service, "match", "The Paris.", "paris") and not is_right(service, "match", "in Paris", "paris")
    assert is_right(service, "f1", "in Paris", "paris") and not is_right(service, "f1", "London", "paris")
    engine.max_model_len = 400  # bytes
    yes, no = fakes.particle_logits(0, 2)  # means over the letters, as the base has no task
    assert is_right(service, "judge", "x", "y") is bool(yes > no)
    assert engine.scored == [(1, 1)], "once, by the base"
    assert (described("match"), described("f1"), described("judge")) == ("match", "f1 >= 0.5", "judge")


# The command


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "1"], "--samples is 1; give at least 2, or 0 for none"),
        (["--predictive", "map", "--particles", "3"], "--particles belongs to the mixture; --predictive map has none"),
        (["--coverage", ".5"], "--coverage belongs to --task choice, outcomes; text does not use it"),
        (["--predictive", "linearized"], "linearized"),
        (["--meaning", "nli"], "--meaning is nli; give its model's folder, --meaning-nli"),
        (["--device", "cuda:7"], "text is written on cpu or cuda"),
        (["--particles", "9"], "9 were asked for"),
        (["--task", "decision"], "a posterior of a choice; leave --task out"),
        (["--task", "choice", "--max-tokens", "3"], "--max-tokens belongs to --task text; choice does not use it"),
    ],
)
def test_options_that_do_not_belong_are_refused(
    folder: Path, base: Base, rows: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [] if "--task" in options else ["--task", "text"]
    assert main(["calibrate", str(folder), str(rows), "--base", str(base.path), *named, *options]) == 2
    assert said in capsys.readouterr().err


def test_what_can_be_known_before_is_said_before_the_engine_starts(
    folder: Path, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    assert main(["calibrate", str(folder), str(path), "--task", "text", "--base", str(base.path)]) == 2
    assert "3 graded answers are too few" in capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return folders.cut_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(tmp_path: Path, base: Base) -> Path:
    return folders.particles(tmp_path, base).path


def run(folder: Path, rows: Path, base: Base, *options: str) -> list[Any]:
    """What the command prints, as JSON; in a process of its own, which ends with its engine."""
    command = [sys.executable, "-m", "server.cli", "calibrate", str(folder), str(rows), "--task", "text", "--json"]
    command += ["--base", str(base.path), "--dtype", "float32", *options]
    environment = {**os.environ, "POSTERIOR_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.long
def test_the_command_writes_a_record_for_each_way_that_texts_come_about(
    folder: Path, base: Base, tmp_path: Path
) -> None:
    """With vLLM: the greedy token of each prompt by transformers and peft is accepted for every second row."""
    reference = Reference(base, [folder / f"particles/{k:03d}" for k in range(3)])
    tokenizer = load_tokenizer(base)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    lines, p = [], []
    for number in range(60):
        prompt = f"Question {number}: what comes after {number * 7}?"
        mixed = (weights[:, None] * reference.log_p(tokenizer.encode(prompt), [])[0].double().exp()).sum(0)
        text = tokenizer.decode([int(mixed.argmax())])
        p.append(float(mixed.max()))
        lines.append({"prompt": prompt, "answers": [text if number % 2 else "never"]})
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    said = run(folder, path, base, "--samples", "2", "--max-tokens", "1")
    assert [(each["key"]["text"], each["key"]["samples"]) for each in said] == [
        ("greedy", None), ("greedy", 2), ("meaning", 2)
    ]  # fmt: skip
    greedy = said[0]
    assert (greedy["n"], greedy["before"]["accuracy"]["value"], greedy["key"]["dtype"]) == (60, 0.5, "float32")
    nll = -sum(math.log(q if number % 2 else 1 - q) for number, q in enumerate(p)) / 60
    assert greedy["before"]["nll"]["value"] == pytest.approx(nll, abs=2e-3), "served as transformers has it"
    assert len(artefact.load(folder).texts) == 3


@pytest.mark.long
def test_given_answers_are_scored(folder: Path, base: Base, tmp_path: Path) -> None:
    """With vLLM, against transformers and peft."""
    reference, tokenizer = Reference(base, [folder / "map"]), load_tokenizer(base)
    lines, nll = [], 0.0
    for number in range(60):
        prompt, answer = f"Question {number}: what comes after {number}?", f" It is {number + 1}"
        ids = tokenizer.encode(answer)
        log_p = reference.log_p(tokenizer.encode(prompt), ids)[range(len(ids)), 0, ids]
        q = float(log_p.mean().exp())
        nll -= math.log(q if number % 2 else 1 - q) / 60
        lines.append({"prompt": prompt, "answer": answer, "correct": bool(number % 2)})
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    (said,) = run(folder, path, base, "--predictive", "map")
    assert (said["key"]["text"], said["grading"], said["max_tokens"]) == ("given", "given", None)
    assert said["before"]["nll"]["value"] == pytest.approx(nll, abs=2e-3)
