"""`posterior import --full`: whole models as particles, beside transformers' own predictions of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from posterior.cli import imported
from posterior.errors import PosteriorError
from posterior.models import lora
from posterior.storage import artefact
from tests.posterior.evaluation.made import arguments, write

Q, K, DOWN = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.down_proj"))
# Answers of one token and of several, and as many as the row says.
ROWS: list[dict[str, Any]] = [
    {"text": "one", "choices": ["n", "p"], "label": 0},
    {"text": "two rows", "choices": ["no", "yes", "a"], "label": 1},
    {"text": "three", "choices": ["p", "q", "r"], "label": 2},
]


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """The base after an update of these modules, of this rank, as transformers saves it."""

    def make(name: str, *modules: str, rank: int = 3, seed: int = 0, shard: str = "1GB") -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        generator = torch.Generator().manual_seed(seed)
        for module in modules:
            weight = model.get_parameter(f"{module}.weight")
            b, a = (torch.randn(size, generator=generator) for size in ((len(weight), rank), (rank, weight.shape[1])))
            weight.data += 0.1 * b @ a
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return make


@pytest.fixture
def collect(tiny_base: Path, tmp_path: Path) -> Callable[..., artefact.Posterior]:
    def call(*words: Any, out: str = "joined") -> artefact.Posterior:
        options = ("--full", "--out", tmp_path / out, "--base", tiny_base, "--template", "{text}:")
        imported.run(arguments(imported, *words, *options))
        return artefact.load(tmp_path / out)

    return call


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0].double()
    return found


def particle(tiny_base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(folder))


def probabilities(model: Any, tokenizer: Any, row: dict[str, Any]) -> Tensor:
    """Of the row's choices, each in a pass of its own: the softmax of the means of their tokens' log-probabilities."""
    prompt, scores = tokenizer(f"{row['text']}:").input_ids, []
    for choice in row["choices"]:
        own = tokenizer(choice).input_ids
        log_p = logits(model, prompt + own).log_softmax(-1)[len(prompt) - 1 : -1]
        scores.append(log_p.gather(1, torch.tensor(own)[:, None]).mean())
    return torch.stack(scores).softmax(0)


def test_a_low_rank_change_is_recovered(trained, collect, tiny_base, tmp_path):
    """The matrices, and transformers' predictions of the checkpoint."""
    folder = trained("a", Q, K, DOWN)
    rows = write(tmp_path / "rows.jsonl", ROWS)
    posterior = collect(folder, "--rank", 4, "--rows", rows)
    assert posterior.lora["r"] == posterior.lora["lora_alpha"] == 4 and posterior.weights == (1.0,)
    assert set(lora.modules(posterior.map_dir)) == {Q, K, DOWN} == set(posterior.fit["errors"])
    assert all(error < 1e-5 for (error,) in posterior.fit["errors"].values())
    fact = posterior.fit["checkpoints"]["000"]
    assert fact["folder"] == str(folder) and fact["matrices"] == 3 and 0 < fact["error"] < 1e-5
    assert 0 < fact["total_variation"]["mean"] <= fact["total_variation"]["largest"] < 1e-5
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_base, folder))
    theta = lora.read_adapter(posterior.map_dir)
    for module in (Q, K, DOWN):
        change = after.get_parameter(f"{module}.weight") - before.get_parameter(f"{module}.weight")
        torch.testing.assert_close(theta[f"{module}.B"] @ theta[f"{module}.A"], change, rtol=1e-4, atol=1e-6)
    tokens = list(range(5, 15))
    expected = logits(after, tokens)
    torch.testing.assert_close(logits(particle(tiny_base, posterior.map_dir), tokens), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(before, tokens), expected, rtol=0.01, atol=0.01)


def test_the_total_variation_is_transformers_own(trained, collect, tiny_base, tmp_path, capsys):
    """Of two checkpoints at a rank that loses much: each particle and each checkpoint by a plain model of its own."""
    folders = [trained("a", Q, K, rank=8, seed=1), trained("b", Q, DOWN, rank=8, seed=2)]
    rows = write(tmp_path / "rows.jsonl", ROWS)
    posterior = collect(*folders, "--rank", 1, "--rows", rows, "--weights", 1, 3)
    said = capsys.readouterr().out
    assert posterior.weights == (0.25, 0.75) and posterior.fit["map"] == 1
    assert posterior.fit["compared"]["rows"] == 3
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for number, folder in enumerate(folders):
        models = (AutoModelForCausalLM.from_pretrained(folder), particle(tiny_base, posterior._particle(number)))
        found = [[probabilities(model, tokenizer, row) for model in models] for row in ROWS]
        distances = torch.stack([(p - q).abs().sum() / 2 for p, q in found])
        fact = posterior.fit["checkpoints"][f"{number:03d}"]
        assert fact["total_variation"]["mean"] == pytest.approx(float(distances.mean()), abs=1e-6)
        assert fact["total_variation"]["largest"] == pytest.approx(float(distances.max()), abs=1e-6)
        assert distances.max() > 0.01 and fact["matrices"] == 2
        worst = max(posterior.fit["errors"], key=lambda module: posterior.fit["errors"][module][number])
        assert (
            f"{folder}: 2 matrices changed; rank 1 leaves out {fact['error']:.3g} of the change (relative Frobenius "
            f"norm), most in {worst} {posterior.fit['errors'][worst][number]:.3g}, "
        ) in said
        assert f"over 3 rows: mean {distances.mean():.3g}, largest {distances.max():.3g}\n" in said
    assert said.splitlines()[-1].startswith(f"wrote {posterior.path} (joined@")


def test_what_one_checkpoint_leaves_alone_is_zero(trained, collect):
    posterior = collect(trained("a", Q), trained("b", DOWN, seed=1), "--rank", 3)
    for number, (own, other) in enumerate(((Q, DOWN), (DOWN, Q))):
        theta = lora.read_adapter(posterior._particle(number))
        assert not theta[f"{other}.A"].any() and not theta[f"{other}.B"].any() and theta[f"{own}.A"].any(1).all()
        assert posterior.fit["errors"][other][number] == 0


def test_shards_are_the_same_checkpoint(trained, collect):
    whole, sharded = trained("whole", Q, DOWN), trained("sharded", Q, DOWN, shard="4KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert collect(whole, out="one").hash == collect(sharded, out="two").hash


def test_checkpoints_that_change_nothing(trained, collect, capsys, tmp_path):
    """One of several is told, and all together are an error."""
    posterior = collect(trained("a", Q), trained("same"))
    assert "same is the base itself: its particle changes nothing" in capsys.readouterr().err
    assert posterior.weights == (0.5, 0.5)
    with pytest.raises(PosteriorError, match="no checkpoint differs from the base tiny-llama"):
        collect(tmp_path / "same", out="none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--rank", 0], "--rank is 0; it must be at least 1 and at most 512"),
        (["--rank", 513], "--rank is 513; it must be"),
        (["--weights", 1, 2], "2 weights for 1 particles"),
        (["--rows", "nowhere.jsonl"], "no data file at nowhere.jsonl"),
        (["--rows", "nowhere.jsonl", "--task", "text"], "--rows compares the probabilities of answers; a text task"),
        (["--answers", "p", "p"], "tokenise alike"),
    ],
)
def test_bad_options_are_one_line(trained, collect, tmp_path, words, match):
    with pytest.raises(PosteriorError, match=match):
        collect(trained("a", Q), *words)
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("option", ["--rank", "--rows"])
def test_adapters_have_no_options_of_whole_models(tmp_path, option):
    with pytest.raises(PosteriorError, match=f"{option} belongs to --full"):
        imported.call(arguments(imported, "a", "--out", tmp_path / "joined", "--template", "{text}:", option, 3))


def test_a_bad_checkpoint_leaves_nothing(trained, collect, tmp_path):
    """Also where the first one is good."""
    bad = trained("bad", Q)
    model = AutoModelForCausalLM.from_pretrained(bad)
    model.model.norm.weight.data += 1
    model.save_pretrained(bad)
    with pytest.raises(PosteriorError, match=re.escape("1 norms or other weights outside linear layers")):
        collect(trained("a", Q), bad)
    assert not (tmp_path / "joined").exists()
