"""`posterior import`: other people's adapters as particles, and what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posterior.cli import imported
from posterior.data.examples import collate
from posterior.errors import PosteriorError
from posterior.evaluation import predictions
from posterior.likelihood.scores import scores
from posterior.models import adalora, lora
from posterior.storage import artefact
from tests.posterior.conftest import make_examples


@pytest.fixture
def peft_folder(tiny_base, tmp_path) -> Callable[..., Path]:
    """An adapter as PEFT itself saves it."""

    def make(name: str, seed: int = 0, targets: tuple[str, ...] = ("q_proj",), **options) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": list(targets), **options})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
        for module in lora.matrices(model).values():
            torch.nn.init.normal_(module.weight, std=0.3)
        model.peft_config["default"].base_model_name_or_path = "tiny-llama"
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        return tmp_path / name

    return make


@pytest.fixture
def collect(tiny_base, tmp_path) -> Callable[..., artefact.Posterior]:
    def call(*folders: Path, **options) -> artefact.Posterior:
        words = [*folders, "--out", tmp_path / "joined", "--base", tiny_base]
        for key, value in {"template": "{text}:", "answers": ["n", "p"], **options}.items():
            words += [f"--{key}", *(value if isinstance(value, list) else [value])]
        parser = argparse.ArgumentParser()
        imported.add_arguments(parser)
        return imported.call(parser.parse_args([str(word) for word in words]))

    return call


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (r".*\.(q_proj|down_proj)", {"q_proj", "down_proj"}),
        (".*o_proj", {"o_proj"}),
    ],
)
def test_a_pattern_of_targets_is_what_it_matched(peft_folder, collect, run_fit, tiny_base, tmp_path, targets, modules):
    """Imported, and fitted: PEFT's logits stay, and the tensors name the modules."""
    folder = peft_folder("a", 1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    )
    for module in lora.matrices(model).values():
        torch.nn.init.normal_(module.weight, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    edit(folder, target_modules=targets, base_model_name_or_path="tiny-llama")  # as it was written by hand
    for posterior in (collect(folder), run_fit(tmp_path / "fitted", adapter=folder)):
        assert {name.rpartition(".")[2] for name in lora.modules(posterior.map_dir)} == modules
        torch.testing.assert_close(
            logits(tiny_base, posterior.map_dir), logits(tiny_base, folder), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: edit(f, use_dora=True), "a has use_dora set"),
        (lambda f: edit(f, r=1024), "a has rank 1024; vLLM serves up to 512"),
        (lambda f: edit(f, lora_alpha="x"), "a has a lora_alpha that is not a number"),
        (lambda f: damage(f), "a holds a value in .* that is not finite"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "a is no PEFT adapter: .* not a JSON object"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "a is no PEFT adapter: .* not a JSON object"),
    ],
)
def test_fit_refuses_what_import_refuses(peft_folder, collect, run_fit, change, match):
    folder = peft_folder("a", 1)
    change(folder)
    for use in (lambda: collect(folder), lambda: run_fit(adapter=folder)):
        with pytest.raises(PosteriorError, match=match) as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": ["lm_head"]}, "adapts lm_head; only adapters inside"),
        ({"rank": 600}, "--rank is 600; it must be at least 1 and at most 512"),
    ],
)
def test_fit_does_not_begin_what_cannot_be_served(run_fit, options, match):
    with pytest.raises(PosteriorError, match=match):
        run_fit(**options)


def test_particles_are_the_adapters(peft_folder, collect, tiny_base, capsys):
    """Logits under PEFT of each folder given and of each particle written are equal; weights are normalised."""
    folders = [peft_folder("a", 1), peft_folder("b", 2)]
    posterior = collect(*folders, weights=[1, 3])
    assert posterior.family == "particles" and posterior.weights == (0.25, 0.75)
    assert posterior.task.template == "{text}:" and posterior.task.answers == ("n", "p")
    assert "names its base" not in capsys.readouterr().err
    tokens = torch.arange(5, 15)[None]
    seen = []
    for given, written in zip(reversed(folders), posterior.adapters(2, posterior.path), strict=True):
        with torch.no_grad():
            expected, found = (
                PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(path))(tokens).logits
                for path in (given, written)
            )
        assert torch.equal(found, expected)
        seen.append(found)
    assert not torch.allclose(*seen)
    heaviest = lora.read_adapter(folders[1])
    assert all(torch.equal(heaviest[name], value) for name, value in lora.read_adapter(posterior.map_dir).items())


@pytest.fixture
def adalora_folder(tiny_base, tmp_path) -> Callable[..., Path]:
    """An AdaLoRA adapter as PEFT itself saves it, its layers cut to ranks 2 and 3 of 4."""

    def make(name: str, seed: int = 0) -> Path:
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=6, target_modules=["q_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        kept = {"0": [True, False, True, False], "1": [True, True, False, True]}
        model.peft_config["default"].rank_pattern = {
            f"model.layers.{layer}.self_attn.q_proj.lora_E.default": mask for layer, mask in kept.items()
        }
        model.peft_config["default"].base_model_name_or_path = "tiny-llama"
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        return tmp_path / name

    return make


def logits(tiny_base: Path, folder: Path) -> torch.Tensor:
    """By PEFT alone."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(folder))
    with torch.no_grad():
        return model(torch.arange(5, 15)[None]).logits


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT, of what PEFT wrote
def test_adalora_becomes_lora(adalora_folder, collect, tiny_base):
    """Logits under PEFT of the AdaLoRA folder and of the LoRA particle are equal to 1e-5; ranks are filled to 4."""
    folders = [adalora_folder("a", 1), adalora_folder("b", 2)]
    posterior = collect(*folders)
    assert posterior.lora["r"] == 4 and posterior.lora["lora_alpha"] == 6
    for given, written in zip(folders, posterior.adapters(2, posterior.path), strict=True):
        expected = logits(tiny_base, given)
        torch.testing.assert_close(logits(tiny_base, written), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, logits(tiny_base, folders[0] if given is folders[1] else folders[1]))
    theta = lora.read_adapter(posterior.map_dir)
    assert [int(value.any(1).sum()) for name, value in theta.items() if name.endswith(".A")] == [2, 3]


def test_a_layer_that_adalora_cut_to_nothing(tmp_path):
    shapes = {"A": (0, 3), "B": (5, 0), "E": (0, 1)}
    tensors = {f"base_model.model.0.q.lora_{part}": torch.ones(shape) for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    theta, config = adalora.convert(tmp_path, {"init_r": 2, "lora_alpha": 8, "tinit": 3})
    assert theta["0.q.A"].shape == (2, 3) and theta["0.q.B"].shape == (5, 2) and not theta["0.q.B"].any()
    assert config["r"] == 2 and config["peft_type"] == "LORA" and "tinit" not in config


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT, of what PEFT wrote
def test_laplace_of_adalora(adalora_folder, run_fit, tiny_base):
    folder = adalora_folder("a", 1)
    posterior = run_fit(adapter=folder)
    torch.testing.assert_close(logits(tiny_base, posterior.map_dir), logits(tiny_base, folder), rtol=1e-5, atol=1e-5)


def test_rslora_round_trips(peft_folder, collect, tiny_base):
    folder = peft_folder("a", 1, use_rslora=True, r=4)
    posterior = collect(folder)
    (written,) = posterior.adapters(1, posterior.path)
    assert torch.equal(logits(tiny_base, written), logits(tiny_base, folder))
    plain = peft_folder("b", 1, r=4)
    assert not torch.allclose(logits(tiny_base, plain), logits(tiny_base, folder))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: edit(f, init_r=None), "a is no readable AdaLoRA adapter"),
        (lambda f: edit(f, init_r=2), "a is no readable AdaLoRA adapter"),
        (lambda f: edit(f, lora_alpha=0), "a is no readable AdaLoRA adapter"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "a is no readable AdaLoRA adapter"),
        (
            lambda f: save_file({"x": torch.ones(1)}, f / "adapter_model.safetensors"),
            "or more than those",
        ),
    ],
)
def test_a_bad_adalora_folder_is_one_sentence(adalora_folder, collect, change, match):
    folder = adalora_folder("a")
    change(folder)
    with pytest.raises(PosteriorError, match=match) as error:
        collect(folder)
    assert "\n" not in str(error.value)


def test_the_predictive_is_the_weighted_average(peft_folder, collect, tiny_base):
    folders = [peft_folder("a", 1), peft_folder("b", 2)]
    posterior = collect(*folders, weights=[1, 3])
    examples = make_examples(4, answers=2)
    probabilities = []
    for folder in folders:
        model = lora.load_peft(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
        with torch.no_grad():
            probabilities.append(scores(model, collate(examples)).double().softmax(1))
    found = predictions.sampled(model, posterior, 2, examples)
    torch.testing.assert_close(
        found.probability, 0.25 * probabilities[0] + 0.75 * probabilities[1], rtol=1e-5, atol=1e-6
    )


def test_a_fitted_map_can_be_imported_again(run_fit, collect, tmp_path):
    fitted = [
        run_fit(tmp_path / name, method="ensemble", particles=1, seed=seed) for name, seed in (("f", 1), ("g", 2))
    ]
    assert collect(*(posterior.map_dir for posterior in fitted)).weights == (0.5, 0.5)


def test_another_base_s_name_is_a_warning(peft_folder, collect, capsys):
    folder = peft_folder("a")
    edit(folder, base_model_name_or_path="somebody/else")
    collect(folder, peft_folder("b", 2))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "names its base" in line]
    assert "'somebody/else'; it is taken for 'tiny-llama'" in line


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: shutil.rmtree(f), "b is no PEFT adapter: adapter_config.json is missing"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "no PEFT adapter"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no readable adapter_model.safetensors"),
        (lambda f: edit(f, peft_type="IA3"), "is a IA3 adapter; only LORA"),
        (lambda f: edit(f, init_lora_weights="pissa"), "initialised by pissa, which changes the base's weights"),
        (lambda f: edit(f, lora_alpha=8), "b has lora_alpha 8, but .*a has 4"),
        (lambda f: edit(f, use_rslora=True), "b has use_rslora True"),
        (lambda f: edit(f, alpha_pattern={"q_proj": 1}), "b has alpha_pattern"),
        (damage, "b holds a value in model.layers.0.self_attn.q_proj.A that is not finite"),
    ],
)
def test_a_bad_folder_is_one_sentence(peft_folder, collect, tmp_path, change, match):
    folders = [peft_folder("a", 1), peft_folder("b", 2)]
    change(folders[1])
    with pytest.raises(PosteriorError, match=match) as error:
        collect(*folders)
    assert "\n" not in str(error.value) and not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 3}, "b has r 3, but .*a has 2"),
        ({"targets": ("v_proj",)}, "b adapts other modules"),
        ({"targets": ("q_proj", "v_proj")}, "b adapts other modules"),
    ],
)
def test_adapters_of_other_shapes_are_refused(peft_folder, collect, options, match):
    with pytest.raises(PosteriorError, match=match):
        collect(peft_folder("a"), peft_folder("b", **options))


def test_adapters_of_another_base_are_refused(peft_folder, collect):
    folder = peft_folder("a")
    path = folder / "adapter_model.safetensors"
    save_file({key: value.repeat(1, 2) if "lora_A" in key else value for key, value in load_file(path).items()}, path)
    with pytest.raises(PosteriorError, match="does not fit the base model"):
        collect(folder)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1]}, "1 weights for 2 particles"),
        ({"weights": [1, -1]}, "must be numbers >= 0"),
        ({"weights": [0, 0]}, "not all zero"),
        ({"weights": ["nan", 1]}, "must be numbers >= 0"),
        ({"answers": ["p", "p"]}, "tokenise alike"),
        ({"template": "no field"}, "has no {field}"),
    ],
)
def test_bad_options_are_one_sentence(peft_folder, collect, options, match):
    with pytest.raises(PosteriorError, match=match):
        collect(peft_folder("a", 1), peft_folder("b", 2), **options)


def test_the_command_says_what_it_wrote(peft_folder, tiny_base, tmp_path, capsys):
    from server.cli import main

    words = ["import", peft_folder("a"), "--out", tmp_path / "joined", "--base", tiny_base, "--template", "{text}:"]
    assert main([str(word) for word in words]) == 0
    assert "1 particles" in capsys.readouterr().out
    assert artefact.load(tmp_path / "joined").task.answers is None
