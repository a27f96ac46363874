"""One class is the source of flags, environment and file, and a flag goes before the environment before the file."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from posterior.errors import PosteriorError
from server.cli import Parser
from server.configuration import reading
from server.configuration.schema import ServeSettings


def read(*words: str, **environment: str) -> ServeSettings:
    parser = Parser(prog="posterior serve")
    reading.add_arguments(parser)
    return reading.read(parser.parse_args(words), environment)


def refused(*words: str, **environment: str) -> str:
    with pytest.raises(PosteriorError) as caught:
        read(*words, **environment)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.toml"


def test_nothing_given_is_the_defaults() -> None:
    assert read() == ServeSettings()


def test_a_flag_goes_before_the_environment_and_that_before_the_file(file: Path) -> None:
    file.write_text("port = 1\nparticles = 3\nmax_num_seqs = 5\n")
    found = read("--config", str(file), "--port", "2", POSTERIOR_PORT="4", POSTERIOR_PARTICLES="6")
    assert (found.port, found.particles, found.max_num_seqs) == (2, 6, 5)
    assert read(POSTERIOR_CONFIG=str(file)).port == 1


ELSEWHERE: Mapping[str, tuple[str, str, object]] = {  # of each kind of field: as a variable, in the file, what it is
    "base": ("a/b@c", '"a/b@c"', "a/b@c"),
    "device": ("cpu", '"cpu"', "cpu"),
    "max_model_len": ("512", "512", 512),
    "kv_cache_gib": ("2", "2", 2),
    "compile": ("true", "true", True),
    "outcomes": ("sqlite:///x", '"sqlite:///x"', "sqlite:///x"),
    "cors_origin": ("https://a, https://b", '["https://a", "https://b"]', ("https://a", "https://b")),
    "keys": ("/x/y", '"/x/y"', Path("/x/y")),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_kind_of_setting_stands_in_the_environment_and_in_the_file(name: str, file: Path) -> None:
    variable, line, value = ELSEWHERE[name]
    file.write_text(f"{name} = {line}\n")
    for found in (read(**{f"POSTERIOR_{name.upper()}": variable}), read("--config", str(file))):
        assert getattr(found, name) == value


def test_flags_of_every_kind() -> None:
    words = "--compile --outcomes --cors-origin https://a --cors-origin https://b --keys k --drain-seconds 1.5"
    found = read(*words.split())
    assert found == ServeSettings(
        compile=True, outcomes=True, cors_origin=("https://a", "https://b"), keys=Path("k"), drain_seconds=1.5
    )
    assert read("--outcomes", "sqlite:///x").outcomes == "sqlite:///x"
    assert read(POSTERIOR_OUTCOMES="yes").outcomes is True and read(POSTERIOR_OUTCOMES="").outcomes is False


def test_a_path_in_the_file_is_relative_to_it(file: Path) -> None:
    file.write_text('keys = "keys.toml"\n')
    assert read("--config", str(file)).keys == file.parent / "keys.toml"
    file.write_text('keys = "~/keys.toml"\n')
    assert read("--config", str(file)).keys == Path.home() / "keys.toml"


def test_a_mistake_is_called_what_its_user_called_it(file: Path) -> None:
    assert refused("--port", "99999").startswith("--port is 99999; it must be at least 0 and at most 65535")
    assert refused(POSTERIOR_PORT="99999").startswith("POSTERIOR_PORT is 99999; it must be")
    assert refused(POSTERIOR_PORT="many").startswith("POSTERIOR_PORT is many; it must be")
    assert refused(POSTERIOR_COMPILE="maybe") == "POSTERIOR_COMPILE is maybe; it must be true or false"
    for where in ("tpu", "cuda:", "cuda:x", "OFF", "cpu\n"):
        assert refused("--linearized", where).endswith("it must be off, cpu, cuda, or one GPU such as cuda:1")
    file.write_text("port = 99999\n")
    assert refused("--config", str(file)).startswith(f"{file}: port is 99999; it must be")
    file.write_text('device = "tpu"\n')
    assert refused("--config", str(file)).startswith(f"{file}: device is tpu; it must be 'auto' or 'cpu' or 'cuda'")


UNKNOWN = {
    "prot = 1": "unknown setting 'prot'; did you mean 'port'?",
    "max-model-len = 4": "unknown setting 'max-model-len'; did you mean 'max_model_len'?",
    "zebra = 1": "unknown setting 'zebra'; `posterior serve --help` lists the settings",
    "[network]\nport = 1": "unknown setting 'network'",
    "port = 1979-05-27": "port is no text, number, list, true or false",
    "port = ": "is not TOML in UTF-8",
    "cors_origin = [1]": "cors_origin is (1,); it must be a list of texts or None",
}


@pytest.mark.parametrize("line", UNKNOWN)
def test_a_line_that_is_no_setting_is_refused_with_a_hint(line: str, file: Path) -> None:
    file.write_text(line + "\n")
    assert UNKNOWN[line] in refused("--config", str(file))


def test_a_file_that_is_not_there(file: Path) -> None:
    assert (
        refused("--config", str(file))
        == f"cannot read {file}: No such file or directory; name a TOML file with --config"
    )


def test_a_variable_that_is_no_setting_is_refused_with_a_hint() -> None:
    assert refused(POSTERIOR_PROT="1").endswith("did you mean POSTERIOR_PORT?")
    assert refused(POSTERIOR_API_KEYS="1").endswith("did you mean POSTERIOR_API_KEY?")
    assert refused(POSTERIOR_port="1").endswith("did you mean POSTERIOR_PORT?")
    assert refused(POSTERIOR_ZEBRA="1").endswith("lists the settings")


def test_variables_of_other_programs_and_of_kubernetes_are_left_alone() -> None:
    others = {f"POSTERIOR_{name}": "x" for name in reading.OTHERS - {"CONFIG"}}
    service = {
        "POSTERIOR_SERVICE_HOST": "10.0.0.1",
        "POSTERIOR_SERVICE_PORT_HTTP": "80",
        "POSTERIOR_PORT": "tcp://10.0.0.1:80",
        "POSTERIOR_PORT_80_TCP_ADDR": "10.0.0.1",
        "POSTERIOR_SERVER_SERVICE_PORT": "80",
        "POSTERIOR_SERVER_PORT": "tcp://10.0.0.1:80",
        "HOME": "/root",
    }
    assert read(**others, **service) == ServeSettings()


IGNORED = {
    "--keep-requests": "--keep-requests keeps them beside answers; give --outcomes too, or leave it out",
    "--uds x --port 9": "--port has no meaning for a unix socket; leave it out, or --uds",
    "--ssl-keyfile x": "--ssl-keyfile belongs to HTTPS; give --ssl-certfile too, or leave it out",
    "--ssl-certfile x --ssl-cert-reqs required": "--ssl-cert-reqs needs to know whose certificates count; give --ssl-",
    "--cors-origin example.org": "--cors-origin is example.org; give a scheme and a host without a path",
    "--cors-origin https://example.org/": "--cors-origin is https://example.org/; give a scheme",
    "--root-path llm": "--root-path is llm; it must be a path as in /llm",
    "--otlp-endpoint collector:4318": "--otlp-endpoint is collector:4318; it must be a URL as in http://localhost:4318",
}


@pytest.mark.parametrize("words", IGNORED)
def test_what_makes_no_sense_is_refused(words: str) -> None:
    assert refused(*words.split()).startswith(IGNORED[words])


def test_secrets_that_others_can_read(file: Path) -> None:
    file.write_text('api_key = "s3cret"\nport = 1\n')
    file.chmod(0o644)
    said = f"other users of this machine can read api_key in {file}; run `chmod 600 {file}`"
    assert reading.exposed(file) == said and reading.exposed(None) is None
    file.chmod(0o600)
    assert reading.exposed(file) is None


def test_help_groups_every_setting_and_says_where_else_it_can_stand(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="posterior serve")
    reading.add_arguments(parser)
    parser.print_help()
    text = capsys.readouterr().out
    groups = list(dict.fromkeys(each.metadata["group"] for each in fields(ServeSettings)))
    assert groups == ["Model", "Posterior", "Limits", "Access", "Outcomes", "Network", "Logging", "Engine"]
    assert [line[:-1] for line in text.splitlines() if re.fullmatch("[A-Z][a-z]+:", line)] == groups
    for each in fields(ServeSettings):
        assert f"--{each.name.replace('_', '-')}" in text
    assert "POSTERIOR_MAX_MODEL_LEN=4096" in text and "posterior doctor" in text


def test_the_environment_of_this_process_is_read() -> None:
    assert reading.read.__defaults__ == (os.environ,)
    assert reading.read(argparse.Namespace(config=None), {}) == ServeSettings()
