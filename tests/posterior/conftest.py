"""A tiny Llama in float64 with a random LoRA adapter: small enough for dense Jacobians and dense inverses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posterior.data.examples import Batch, Example, Examples
from posterior.data.scoring import Scoring
from posterior.likelihood.scores import scores
from posterior.models import lora

VOCABULARY = 300


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model's products are done before a second thread wakes up: the tests take a third of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def model() -> PeftModel:
    """Rank 2 on q_proj and v_proj, B random so that neither side's gradient vanishes; float64."""
    peft_model = lora.attach(tiny_llama().double(), rank=2, alpha=4, seed=1)
    generator = torch.Generator().manual_seed(2)
    theta = lora.get(peft_model)
    draws = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in theta.items()}
    peft_model.double()
    lora.put(peft_model, {name: 0.3 * value for name, value in draws.items()})
    return peft_model.eval().requires_grad_(False)


def summed(*examples: Example) -> Examples:
    """Scored by the sum of their tokens' log-probabilities."""
    return Examples(examples, Scoring("sum"))


def make_examples(count: int, *, answers: int = 3, tokens: int = 1, length: tuple[int, int] = (2, 9)) -> Examples:
    """Random prompts of different lengths with `answers` candidates of `tokens` tokens each."""
    generator = torch.Generator().manual_seed(3)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    examples = []
    for index in range(count):
        prompt = tuple(draw(1, VOCABULARY) for _ in range(draw(*length)))
        candidates = tuple(tuple(draw(1, VOCABULARY) for _ in range(tokens)) for _ in range(answers))
        examples.append(Example(prompt, candidates, index % answers))
    return summed(*examples)


def dense_jacobian(model: PeftModel, batch: Batch) -> dict[str, Tensor]:
    """d scores / d W of every LoRA matrix, [B, C, *W.shape], by torch.func: independent of the hooks under test."""
    modules = lora.matrices(model)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    keys = {name: names[id(module.weight)] for name, module in modules.items()}

    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return scores(self.inner, batch)

    wrapped = Scores()

    def function(parameters: dict[str, Tensor]) -> Tensor:
        full = {f"inner.{keys[name]}": value for name, value in parameters.items()}
        result: Tensor = torch.func.functional_call(wrapped, full, ())
        return result

    return torch.func.jacrev(function, chunk_size=1)(  # by rows: no vmap over fused kernels
        {name: module.weight.detach() for name, module in modules.items()}
    )


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of few resamples: test_metrics.py says how many it looks at."""
    monkeypatch.setattr("posterior.calibration.metrics.RESAMPLES", 100)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def save_tiny_base(folder: Path) -> Path:
    """The tiny Llama as an HF folder with a byte-level tokenizer and a chat template."""
    tiny_llama().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<end>", *alphabet]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def run_fit(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`posterior fit` on the tiny base with a few rows; keyword arguments become options. The draws have any width:
    the best one, of test_width.py, takes as long as all the rest."""
    import argparse
    import json

    from posterior.cli import fit
    from posterior.laplace import width

    monkeypatch.setattr(width, "DRAWS", 1)
    monkeypatch.setattr(width, "TOLERANCE", 0.5)

    def call(out: Path | None = None, rows: list[dict[str, Any]] | None = None, **options: Any) -> Any:
        data = tmp_path / "data.jsonl"
        rows = rows or [
            {"text": f"row {index} is {'good' if index % 2 else 'bad'}", "label": index % 2} for index in range(12)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        choice = {"template": "{text}:", "answers": ["n", "p"]} if options.get("task", "choice") == "choice" else {}
        words = [
            str(data),
            "--out",
            str(out or tmp_path / "tiny"),
            "--base",
            str(tiny_base),
        ]
        if "adapter" not in options:  # which is trained already
            options = {"rank": 2, "epochs": 2, **options}
        for key, value in {**choice, **options}.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{key.replace('_', '-')}", *([] if value is True else map(str, values))]
        parser = argparse.ArgumentParser()
        fit.add_arguments(parser)
        return fit.call(parser.parse_args(words))

    return call
