"""The settings of `posterior serve`. Flags, the environment and a file are made of their fields (reading.py).

Nothing here imports torch or vLLM: help and `posterior doctor` need neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import posterior
from posterior.meaning import THRESHOLD
from posterior.settings import Range, SettingError, Settings, setting
from server.configuration.window import COUNT, WINDOW

SHIPPED = Path(posterior.__file__).parent / "shipped"
LONGEST_DEFAULT = 8192  # tokens: many models claim far more than a small machine can hold
SECRETS = ("api_key", "ssl_keyfile_password", "outcomes")  # other users of the machine can read a command line
ORIGIN = re.compile(r"\*|https?://[^/\s?#@]+")

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LogFormat = Literal["plain", "json"]
CertReqs = Literal["none", "optional", "required"]


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Settings):
    """All of them, checked. Raises SettingError."""

    base: str | None = setting(
        None,
        "base model: a local HF folder, a .gguf file, or a Hugging Face id@revision (default: SmolLM2-135M-Instruct)",
        group="Model",
    )
    device: Device = setting("auto", "where models run (default: cuda if present)", group="Model")
    dtype: Dtype = setting("auto", "precision of vLLM (default: auto, the base's own)", group="Model")
    linearized: str = setting(
        "auto",
        "where the linearised predictive runs, with its own copy of the base: cpu, cuda, one GPU such as cuda:1, or "
        "off, and the mixture takes its place (default: where vLLM runs)",
        group="Model",
        metavar="DEVICE",
    )
    max_model_len: int | None = setting(
        None,
        f"longest prompt plus answer in tokens (default: the base's own, at most {LONGEST_DEFAULT})",
        Range(2, 2**31),
        group="Model",
    )
    tool_call_parser: str | None = setting(
        None,
        "let chats use tools: vLLM's name for how this base writes calls (hermes, llama3_json, mistral, ...)",
        group="Model",
        metavar="NAME",
    )

    posteriors: Path = setting(
        SHIPPED,
        "folder of posterior folders; each is served under its folder's name (default: the shipped ones)",
        group="Posterior",
        metavar="FOLDER",
    )
    particles: int = setting(
        8,
        "samples of each Laplace posterior for the mixture: more mean less Monte-Carlo error and more work",
        Range(2, 1000),  # one sample has no spread
        group="Posterior",
    )
    meaning_embedding: Path | None = setting(
        None,
        "let samples be told apart by embeddings: a folder of sentence-transformers (default: none)",
        group="Posterior",
        metavar="FOLDER",
    )
    meaning_threshold: float = setting(
        THRESHOLD,
        "cosine of two embeddings from which texts mean the same",
        Range(-1, 1),
        group="Posterior",
        metavar="COSINE",
    )
    meaning_nli: Path | None = setting(
        None,
        "let samples be told apart by entailment: a folder with a sequence classifier for it (default: none)",
        group="Posterior",
        metavar="FOLDER",
    )

    max_requests: int = setting(
        1024, "requests for answers at a time; more get 429 with Retry-After", Range(1, 2**20), group="Limits"
    )
    drain_seconds: float = setting(
        30.0,
        "after SIGTERM, how long running requests may go on before they end with an error",
        Range(0, 86400),
        group="Limits",
    )

    api_key: str | None = setting(
        None,
        "ask clients for this key; give it as POSTERIOR_API_KEY, since other users of the machine can read a command "
        "line",
        group="Access",
        metavar="KEY",
    )
    keys: Path | None = setting(
        None,
        "TOML file of several keys, each with its rights; SIGHUP reads it again",
        group="Access",
        metavar="FILE",
    )
    cors_origin: tuple[str, ...] | None = setting(
        None,
        "let the pages of this origin call the server from a browser, as in https://example.org; '*': any page. May be "
        "repeated (default: none)",
        group="Access",
        metavar="ORIGIN",
    )

    outcomes: bool | str = setting(
        False,
        "keep answers, so that POST /v1/outcomes can say what turned out to be true of them: in a file "
        "(sqlite:///FILE), in PostgreSQL (postgresql://USER:PASSWORD@HOST/DATABASE), or without a URL in "
        "~/.local/state/posterior-server/outcomes.db; give a password as POSTERIOR_OUTCOMES (default: nothing is kept)",
        group="Outcomes",
        metavar="URL",
    )
    answers_days: float = setting(
        30.0,
        "with --outcomes, days that an answer waits for its outcome before it is deleted",
        Range(0, 36500, above=True),
        group="Outcomes",
    )
    keep_requests: bool = setting(
        False, "with --outcomes, keep the bodies of requests too: the prompts", group="Outcomes"
    )
    label_share: float = setting(
        0.0,
        "with --outcomes, share of answers whose outcome is asked for, with `label: requested` in the answer. Chance "
        "chooses them: only their outcomes show how all answers are",
        Range(0, 1),
        group="Outcomes",
        metavar="SHARE",
    )
    outcomes_window: str | None = setting(
        None,
        f"with --outcomes, which answers and outcomes the metrics are of, for each posterior the newest: {WINDOW} "
        f"(default: {COUNT})",
        group="Outcomes",
        metavar="N|Nd",
    )

    host: str = setting("127.0.0.1", "address to listen on; any but loopback needs a key", group="Network")
    port: int = setting(8000, "port to listen on; 0: any that is free", Range(0, 65535), group="Network")
    uds: Path | None = setting(
        None, "listen on a unix socket at this path, instead of host and port", group="Network", metavar="PATH"
    )
    root_path: str = setting(
        "/",
        "the path below which a proxy publishes the server, and which it takes away before it passes requests on",
        group="Network",
        metavar="PATH",
    )
    ssl_certfile: Path | None = setting(
        None, "answer HTTPS, with the certificate (and its chain) in this PEM file", group="Network", metavar="FILE"
    )
    ssl_keyfile: Path | None = setting(
        None, "the certificate's private key (default: it is in the certificate's file)", group="Network",
        metavar="FILE",
    )  # fmt: skip
    ssl_keyfile_password: str | None = setting(
        None, "of the private key; give it as POSTERIOR_SSL_KEYFILE_PASSWORD", group="Network", metavar="PASSWORD"
    )
    ssl_ca_certs: Path | None = setting(
        None, "authorities whose certificates clients may show, as a PEM file", group="Network", metavar="FILE"
    )
    ssl_cert_reqs: CertReqs = setting("none", "whether clients must show a certificate", group="Network")
    ssl_ciphers: str | None = setting(
        None, "OpenSSL's list of ciphers up to TLS 1.2 (default: Python's own)", group="Network", metavar="LIST"
    )

    log_format: LogFormat = setting("plain", "of the log: lines for people, or a JSON object a line", group="Logging")
    log_prompts: bool = setting(
        False, "write the bodies of requests into the log too: prompts are in them", group="Logging"
    )
    verbose: bool = setting(
        False,
        "on a terminal, show what vLLM and torch say; else it goes to a log file there, and is shown elsewhere",
        group="Logging",
    )
    otlp_endpoint: str | None = setting(
        None,
        "send traces to this OpenTelemetry collector, as in http://localhost:4318; OTEL_EXPORTER_OTLP_ENDPOINT and "
        "OpenTelemetry's other variables are read too (default: none)",
        group="Logging",
        metavar="URL",
    )

    max_num_seqs: int | None = setting(
        None,
        "sequences in one batch of vLLM; a mixture takes one a particle (default: 64 on a CPU, 256 on a GPU)",
        Range(1, 2**16),
        group="Engine",
    )
    kv_cache_gib: float | None = setting(
        None,
        "KV cache in GiB; a mixture fills it K times as fast (default: 1 on a CPU, what the share leaves on a GPU)",
        Range(0, 2**20, above=True),
        group="Engine",
    )
    hot_load_gib: float = setting(
        1.0,
        "memory in GiB for the adapters of posteriors that are loaded later, while the server runs",
        Range(0, 2**20),
        group="Engine",
        metavar="GIB",
    )
    gpu_memory_utilization: float = setting(
        0.7,
        "share of the GPU's memory for vLLM; the linearised predictive needs its own copy of the base",
        Range(0, 1, above=True),
        group="Engine",
    )
    compile: bool = setting(
        False,
        "compile the model on a CPU: faster text, a slower start (minutes at first), needs g++; a GPU always does",
        group="Engine",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|off|cpu|cuda(:\d{1,3})?", self.linearized):
            raise SettingError(
                "{linearized} is {value!r}; it must be off, cpu, cuda, or one GPU such as cuda:1", value=self.linearized
            )
        for origin in self.cors_origin or ():
            if not ORIGIN.fullmatch(origin):
                raise SettingError(
                    "{cors_origin} is {value}; give a scheme and a host without a path, as in https://example.org, "
                    "or *",
                    value=origin,
                )
        if not re.fullmatch(r"(/[\w.~-]+)*/?", self.root_path, re.ASCII) or not self.root_path.startswith("/"):
            raise SettingError("{root_path} is {value}; it must be a path as in /llm", value=self.root_path)
        if self.otlp_endpoint is not None and not re.match(r"https?://[^/\s]+", self.otlp_endpoint):
            raise SettingError(
                "{otlp_endpoint} is {value}; it must be a URL as in http://localhost:4318", value=self.otlp_endpoint
            )

    def ignored(self) -> Mapping[str, str]:
        reasons = {}
        if self.outcomes is False:
            reasons["keep_requests"] = "keeps them beside answers; give {outcomes} too, or leave it out"
            of_answers = ("label_share", "outcomes_window")
            reasons |= dict.fromkeys(
                of_answers, "belongs to answers that are kept; give {outcomes} too, or leave it out"
            )
        if self.uds is not None:
            reasons |= dict.fromkeys(("host", "port"), "has no meaning for a unix socket; leave it out, or {uds}")
        if self.ssl_certfile is None:
            of_tls = ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")
            reasons |= dict.fromkeys(of_tls, "belongs to HTTPS; give {ssl_certfile} too, or leave it out")
        if self.ssl_ca_certs is None:
            reasons["ssl_cert_reqs"] = "needs to know whose certificates count; give {ssl_ca_certs} too"
        return reasons

    @property
    def prefix(self) -> str:
        """`root_path` as ASGI has it: empty, or without a slash at its end."""
        return self.root_path.rstrip("/")
