"""Options of `posterior fit` that the chosen method would ignore are refused, even at their default value."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from posterior.cli import arguments, fit
from posterior.errors import PosteriorError


def check(*words: str) -> None:
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    arguments.in_options(fit.method)(parser.parse_args(["rows.jsonl", "--out", "x", *words]))


REFUSED = {
    "laplace": [
        "--particles 8",
        "--kernel layer",
        "--temperature 1",
        "--no-repulsion",
        "--tolerance 0.1",
        "--init pissa",
    ],
    "ensemble": ["--grouping layer", "--sharing expand", "--last-layer", "--structure kfac", "--kernel layer"],
    "svgd": ["--no-variational", "--curvature-rank 32", "--init pissa", "--tolerance 0.1"],
    "dropout --dropout 0.1": ["--label-samples 1", "--temperature 1", "--last-layer"],
    "swag": ["--structure diagonal", "--no-repulsion", "--grouping scalar"],
    "blob": ["--init pissa", "--tolerance 0.1", "--kernel layer", "--sharing reduce"],
    "ivon": ["--init pissa", "--no-repulsion", "--structure diagonal"],
    "tfb --adapter a": [
        "--rank 8",
        "--rslora",
        "--epochs 8",
        "--prior-precision 10",
        "--init random",
        "--grouping layer",
    ],
}
ACCEPTED = {
    "laplace": [
        "",
        "--grouping layer",
        "--structure full --sharing reduce",
        "--sharing reduce",
        "--curvature-rank whole",
        "--structure diagonal --last-layer",
    ],
    "laplace --adapter a": ["--batch-size 4", "--seed 1", "--grouping layer", "--prior-precision 3", "--max-length 9"],
    "ensemble": ["", "--particles 3", "--init pissa", "--rank 4 --alpha 8 --rslora --dropout 0.1 --steps 3"],
    "svgd": ["--kernel product --temperature 2 --no-repulsion --particles 3", "--prior-precision 3"],
    "dropout --dropout 0.1": ["--particles 3 --init pissa --targets q_proj"],
    "swag": ["--init pissa --epochs 3 --learning-rate 0.1"],
    "blob": ["--particles 3 --prior-precision 3 --epochs 3"],
    "ivon": ["--temperature 0.1 --learning-rate 0.003", "--particles 3 --prior-precision 3 --epochs 3"],
    "tfb --adapter a": ["--tolerance 0.1 --particles 3 --seed 3 --batch-size 2"],
}


@pytest.mark.parametrize(("method", "words"), [(method, words) for method, all in REFUSED.items() for words in all])
def test_refused_with_the_methods_that_use_it(method, words):
    option = words.split()[0]
    with pytest.raises(PosteriorError, match=f"^{option} belongs to --method .*; .* does not use it$") as error:
        check("--method", *method.split(), *words.split())
    assert method.split()[0] not in str(error.value).split(";")[0].split()


@pytest.mark.parametrize(("method", "words"), [(method, words) for method, all in ACCEPTED.items() for words in all])
def test_accepted(method, words):
    check("--method", *method.split(), *words.split())


@pytest.mark.parametrize("words", ["--rank 8", "--learning-rate 0.001", "--no-variational", "--dropout 0.1"])
def test_a_trained_adapter_is_not_trained(words):
    with pytest.raises(PosteriorError, match=f"^{words.split()[0]} is for training an adapter, but --adapter"):
        check("--adapter", "a", *words.split())


def test_one_precision_a_layer_goes_by_blocks():
    with pytest.raises(PosteriorError, match="^--grouping layer goes by blocks; give --structure kfac or diagonal"):
        check("--grouping", "layer", "--structure", "full")


@pytest.mark.parametrize("words", ["--sharing expand", "--curvature-rank 32"])
def test_what_a_diagonal_does_not_use(words):
    with pytest.raises(PosteriorError, match="belongs to --structure full or kfac"):
        check("--structure", "diagonal", *words.split())


def test_every_setting_of_every_method_is_an_option():
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    known = {action.dest for action in parser._actions}
    assert {each.name for method in fit.METHODS.values() for each in fields(method)} <= known
    given = vars(parser.parse_args(["rows.jsonl", "--out", "x"]))
    assert not {each.name for method in fit.METHODS.values() for each in fields(method)} & set(given)


def test_help_is_printed():
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    assert "--last-layer" in parser.format_help()
