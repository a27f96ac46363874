"""Posterior folders with random weights for the real base: distinct distributions in a second, no fit. And that base
cut short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from posterior.calibration.familiarity import About, AdapterName, Center, Familiarity
from posterior.calibration.metrics import Estimate
from posterior.calibration.records import template_hash
from posterior.calibration.rightness import PLAIN, Model, TextKey, TextRecord
from posterior.calibration.risk import Risk
from posterior.curvature.kfac import Factor, Kronecker
from posterior.data.examples import encode
from posterior.data.task import Task
from posterior.likelihood.states import last_states
from posterior.models import lora
from posterior.models.base import Base, load_model, load_tokenizer, resolve
from posterior.storage import artefact

RANK = 8
TASK = Task("choice", "{text}\nSentiment:", (" negative", " positive"))
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
    "lora_dropout": 0.0, "use_rslora": False, "bias": "none", "inference_mode": True,
}  # fmt: skip


LAYERS = 3  # of 30


def cut_base(root: Path) -> Base:
    """The default base's first layers: its own weights, widths, heads and tokenizer, at a tenth of the time. For tests
    that ask how parts work together, not how good the answers are."""
    whole, folder = resolve(), root / "first-layers"
    shutil.copytree(whole.path, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model: Any = load_model(whole, torch.bfloat16, "cpu")
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    return resolve(str(folder))


def random_theta(base: Base, seed: int, scale: float = 0.05) -> lora.Theta:
    """A and B of q_proj and v_proj, normal with standard deviation `scale`."""
    config = json.loads((base.path / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    outputs = {"q_proj": width, "v_proj": width // heads * config["num_key_value_heads"]}
    generator = torch.Generator().manual_seed(seed)
    theta = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in outputs.items():
            key = f"model.layers.{layer}.self_attn.{name}"
            theta[f"{key}.A"] = scale * torch.randn(RANK, width, generator=generator)
            theta[f"{key}.B"] = scale * torch.randn(out, RANK, generator=generator)
    return theta


def _record(base: Base) -> dict[str, str | None]:
    return {"id": base.id, "revision": base.revision, "hash": base.hash}


def particles(
    root: Path, base: Base, weights: tuple[float, ...] = (0.5, 0.3, 0.2), *, name: str = "gang", seed: int = 0
) -> artefact.Posterior:
    """The folder "gang": unequal particles; of another seed they are others."""
    thetas = [random_theta(base, seed + each) for each in range(1, 1 + len(weights))]
    return artefact.save(
        root / name, family="particles", base=_record(base), task=TASK, lora_config=CONFIG, prior={}, fit={},
        mean=random_theta(base, seed), particles=thetas, weights=weights,
    )  # fmt: skip


def laplace(
    root: Path, base: Base, precision: float = 1000.0, *, name: str = "mood", seed: int = 7
) -> artefact.Posterior:
    """The folder "mood": random curvature of rank 4 on the large side of each matrix."""
    mean = random_theta(base, seed)
    generator = torch.Generator().manual_seed(0)
    curvature = {}
    for key, value in mean.items():
        small, large = (value.shape[0], value.shape[1]) if key.endswith("A") else (value.shape[1], value.shape[0])
        bases = [torch.linalg.qr(torch.randn(d, k, generator=generator))[0] for d, k in ((small, small), (large, 4))]
        curvature[key] = Kronecker(
            Factor(bases[0], torch.rand(small, generator=generator), 0.0), Factor(bases[1], torch.ones(4), 0.1)
        )
    return artefact.save(
        root / name, family="laplace", base=_record(base), task=TASK, lora_config=CONFIG, prior={}, fit={},
        mean=mean, curvature=curvature, precision=dict.fromkeys(mean, precision),
    )  # fmt: skip


KNOWN = [{"text": text, "label": " negative"} for text in ("good", "bad", "so so", "never again")]
# Options of a request, and whose states tell its familiarity.
TOLD_BY: list[tuple[dict[str, str], AdapterName]] = [
    ({"predictive": "map"}, "map"),
    ({"predictive": "linearized"}, "map"),
    ({"predictive": "mixture"}, "particle"),
    ({"predictive": "mixture", "particles": "auto"}, "particle"),
]
FARTHEST, STEPS = 200.0, 2000  # of the distances that `compare` gives held-out rows


def states(posterior: artefact.Posterior, base: Base, rows: list[dict[str, str]]) -> dict[AdapterName, torch.Tensor]:
    """What the LM head reads at each prompt's end, by transformers and peft, in float32."""
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval()
    examples = encode(TASK, load_tokenizer(base), rows)
    found: dict[AdapterName, torch.Tensor] = {"map": last_states(model, examples).double()}
    lora.put(model, next(posterior.thetas(1)))
    return found | {"particle": last_states(model, examples).double()}


def grade(posterior: artefact.Posterior, base: Base) -> artefact.Posterior:
    """With a record of how probably its texts at temperature 0 are right, made up."""
    model = Model(
        features=PLAIN, center=(-1.0,) * len(PLAIN), scale=(2.0,) * len(PLAIN), intercept=0.25,
        weight=tuple(0.5 + 0.1 * i for i in range(len(PLAIN))),
    )  # fmt: skip
    key = TextKey(
        base=base.hash, posterior=posterior.hash, predictive="mixture", particles=len(posterior.weights),
        dtype="float32", text="greedy",
    )  # fmt: skip
    half = Estimate(0.5, 0.4, 0.6)
    risk = Risk(confidence=(0.9,) * 60, right=(True,) * 60)
    posterior.add_text(TextRecord(
        key=key, model=model, guard=model, strange=1.0, risk=risk, n=120, data="sha256:0", grading="match",
        before={"ece": half}, after={"ece": half},
    ))  # fmt: skip
    return artefact.load(posterior.path)


def compare(posterior: artefact.Posterior, base: Base) -> artefact.Posterior:
    """With rows to compare questions with, whose distances are evenly spaced: so that a familiarity tells a distance
    from KNOWN to FARTHEST / STEPS."""
    for adapter, known in states(posterior, base, KNOWN).items():
        about = About(
            base=base.hash, posterior=posterior.hash, template=template_hash(TASK), adapter=adapter, dtype="float32",
            n=STEPS, data="sha256:0",
        )  # fmt: skip
        center = Center.fit(known, torch.zeros(len(KNOWN), dtype=torch.long))
        held = torch.linspace(FARTHEST / STEPS, FARTHEST, STEPS, dtype=torch.float64)
        posterior.compare_with(about, Familiarity(center, held, torch.zeros(STEPS, dtype=torch.long)))
    return artefact.load(posterior.path)
