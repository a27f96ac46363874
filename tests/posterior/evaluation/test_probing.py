"""`posterior probe`, and the probes that a fit leaves: which rows, and what the posterior says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posterior.calibration.probes import Probes
from posterior.cli import fit, probe
from posterior.errors import PosteriorError
from posterior.evaluation import probing
from posterior.models import lora
from posterior.models.base import load_model, load_tokenizer, resolve
from posterior.storage import artefact
from tests.posterior.evaluation.made import arguments, write

WORDS = ("good", "fine", "poor", "bad")


def row(index: int) -> dict[str, Any]:
    return {"text": f"{WORDS[index % 4]} thing {index}", "label": int(index % 4 > 1), "secret": "not kept"}


@pytest.fixture(scope="module")
def fitted(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> artefact.Posterior:
    """Of rows of which the first is too long for a probe."""
    folder = tmp_path_factory.mktemp("fitted")
    data = write(folder / "train.jsonl", [{"text": "long " * 20, "label": 0}, *map(row, range(20))])
    options = ["--out", folder / "tiny", "--template", "{text}:", "--answers", "p", "n", "--base", tiny_base]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posterior.calibration.probes.MAX_TOKENS", 64)
        fit.call(arguments(fit, data, *options, "--rank", 2, "--epochs", 1))
    return artefact.load(folder / "tiny")


def found(posterior: artefact.Posterior) -> Probes:
    probes = artefact.load(posterior.path).probes
    assert probes is not None
    return probes


def answers(base: Path, adapter: Path, probes: Probes) -> torch.Tensor:
    """[N, 2] of the adapter of a PEFT folder, by transformers' logits at the prompt's last token."""
    spec = resolve(str(base))
    tokenizer: Any = load_tokenizer(spec)
    model = lora.load_peft(load_model(spec, torch.float32, "cpu"), adapter).eval()
    columns = [tokenizer.encode(answer, add_special_tokens=False)[0] for answer in "pn"]
    rows = []
    for each in probes.rows:
        ids = tokenizer.encode(f"{each.row['text']}:")
        with torch.no_grad():
            rows.append(model(torch.tensor([ids])).logits[0, -1, columns].double().softmax(-1))
    return torch.stack(rows)


def test_a_fit_leaves_probes_of_its_first_short_rows(
    fitted: artefact.Posterior, tiny_base: Path, tmp_path: Path
) -> None:
    probes = found(fitted)
    assert [each.row for each in probes.rows] == [{k: v for k, v in row(i).items() if k != "secret"} for i in range(8)]
    assert [each.label for each in probes.rows] == [row(i)["label"] for i in range(8)]
    assert not probes.heldout and probes.dtype == "float32" and probes.particles == 8
    stored = torch.tensor([each.probability for each in probes.rows], dtype=torch.float64)  # [N, 9, 2]
    folders = [fitted.map_dir, *fitted.adapters(8, tmp_path / "draws")]
    scale = fitted.task.scoring.scale
    for number in (0, 1, 8):
        expected = answers(tiny_base, folders[number], probes) ** scale
        assert torch.allclose(stored[:, number], expected / expected.sum(1, keepdim=True), atol=1e-5)
    linearized = torch.tensor([each.linearized for each in probes.rows])
    assert torch.allclose(linearized.sum(1), torch.ones(8)) and not torch.allclose(linearized, stored[:, 0].float())


def test_held_out_rows_take_their_place_and_the_posterior_stays_the_same(
    fitted: artefact.Posterior, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "held-out.jsonl", [row(index) for index in range(100, 105)])
    before = found(fitted)
    probe.run(arguments(probe, fitted.path, data, "--base", tiny_base))
    assert "probes.json" in capsys.readouterr().out
    after = found(fitted)
    assert after.heldout and len(after.rows) == 5 and artefact.load(fitted.path).hash == fitted.hash
    mixed = write(tmp_path / "mixed.jsonl", [row(100), row(0)])
    probe.run(arguments(probe, fitted.path, mixed, "--base", tiny_base))
    assert not found(fitted).heldout
    fitted.add_probes(before)


def test_a_text_has_probes_of_the_beginning_of_its_responses(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "response": f"a long answer about {i}"} for i in range(10)]
    data = write(tmp_path / "train.jsonl", rows)
    options = ["--task", "text", "--template", "{prompt}:", "--base", tiny_base, "--rank", 2, "--epochs", 1]
    fit.call(arguments(fit, data, "--out", tmp_path / "tiny", *options))
    probes = found(artefact.load(tmp_path / "tiny"))
    assert all(len(each.probability) == 9 and len(each.probability[0]) == 1 for each in probes.rows)
    spec = resolve(str(tiny_base))
    tokenizer: Any = load_tokenizer(spec)
    model = lora.load_peft(load_model(spec, torch.float32, "cpu"), tmp_path / "tiny" / "map").eval()
    prompt = tokenizer.encode("say 0:")
    answer = tokenizer.encode(rows[0]["response"], add_special_tokens=False)[:8]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    expected = logits[range(8), answer].mean().exp()
    assert probes.rows[0].probability[0][0] == pytest.approx(float(expected), abs=1e-5)


def test_rows_that_are_all_too_long(fitted: artefact.Posterior, tiny_base: Path) -> None:
    with pytest.raises(PosteriorError, match="no row has at most 128 tokens"):
        probing.probe(fitted, [{"text": "long " * 300, "label": 0}], base=str(tiny_base))


def test_rows_of_another_task(fitted: artefact.Posterior, tiny_base: Path) -> None:
    with pytest.raises(PosteriorError, match="field 'text' is missing"):
        probing.probe(fitted, [{"words": "good", "label": 0}], base=str(tiny_base))
