"""Prometheus metrics of ours, labelled by posterior and never by particle; vLLM's own stand beside them."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from posterior.predictive.decoding import TextPredictive
from posterior.predictive.mixture import Predictive
from server.access.keys import Key, owner

SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))
NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BATCH = (1, 2, 4, 8, 16, 32)
FAMILIARITY = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PARTICLES = (2, 3, 4, 6, 8, 9, 13, 16, 32, 64, 128)
NO_MODEL = "none"  # of a request that has found no model, or the base alone


class Metrics:
    """One registry of ours, so that a process may hold more than one server (tests do)."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.ready = Gauge("posterior_ready", "1 after the warm-up.", registry=own)
        self.info = Gauge(
            "posterior_info", "The posteriors served.", ("posterior", "hash", "family", "base"), registry=own
        )
        self.refused = Gauge(
            "posterior_refused", "Posterior folders that are not served; the log says why.", registry=own
        )
        self._of_loading(own)
        self._of_requests(own)
        self._of_keys(own)
        self._of_answers(own)
        self._of_texts(own)
        self._of_the_linearized_predictive(own)
        self._of_outcomes(own)

    def _of_loading(self, own: CollectorRegistry) -> None:
        loaded = ("posterior", "hash")
        self.aliases = Gauge(
            "posterior_alias_info", "Where aliases lead.", ("alias", "posterior", "hash"), registry=own
        )
        self.adapters = Gauge("posterior_adapters", "Adapters in memory.", registry=own)
        self.places = Gauge("posterior_adapter_places", "Adapters that there is memory for.", registry=own)
        self.draining = Gauge(
            "posterior_draining", "Posteriors that were unloaded, and whose last requests are being answered.",
            registry=own,
        )  # fmt: skip
        self.probe_difference = Gauge(
            "posterior_probe_difference",
            "The largest difference of a probability from the one that was stored with the posterior, on its probes.",
            loaded,
            registry=own,
        )
        self.probe_gap = Gauge(
            "posterior_probe_gap",
            "Mean confidence minus the share of right answers, on held-out probes: above 0, the posterior is too sure.",
            loaded,
            registry=own,
        )
        self.probe_gap_z = Gauge(
            "posterior_probe_gap_z",
            "The same in standard errors of a calibrated posterior; beyond -3 and 3 it is not calibrated.",
            loaded,
            registry=own,
        )

    def _of_requests(self, own: CollectorRegistry) -> None:
        request = ("posterior", "endpoint", "predictive")
        self.requests = Counter("posterior_requests", "Requests by outcome.", (*request, "status"), registry=own)
        self.duration = Histogram(
            "posterior_request_duration_seconds", "From request to last byte.", request, registry=own, buckets=SECONDS
        )
        self.prompt_tokens = Counter("posterior_prompt_tokens", "Prompt tokens read.", ("posterior",), registry=own)
        self.generated_tokens = Counter("posterior_generated_tokens", "Tokens written.", ("posterior",), registry=own)

    def _of_keys(self, own: CollectorRegistry) -> None:
        self.key_requests = Counter(
            "posterior_key_requests",
            "Requests for answers by the name of their key and outcome, and refused requests of any kind.",
            ("key", "status"),
            registry=own,
        )
        self.key_tokens = Counter(
            "posterior_key_tokens", "Tokens read and written, by the name of the key.", ("key",), registry=own
        )

    def _of_answers(self, own: CollectorRegistry) -> None:
        answer = ("posterior", "predictive")
        self.answers = Counter("posterior_answers", "Answers with a distribution.", answer, registry=own)
        self.confidence = Histogram(
            "posterior_confidence", "Probability of the answer.", answer, registry=own, buckets=SHARES
        )
        self.epistemic = Histogram(
            "posterior_epistemic_entropy_nats",
            "Mutual information of answer and weights.",
            answer,
            registry=own,
            buckets=NATS,
        )
        self.total = Histogram(
            "posterior_total_entropy_nats", "Entropy of the predictive.", answer, registry=own, buckets=NATS
        )
        self.abstentions = Counter(
            "posterior_abstentions",
            "Answers that were withheld, and texts that came with abstain, since `max_risk` allowed too little error.",
            ("posterior", "reason"),
            registry=own,
        )
        self.familiarity = Histogram(
            "posterior_familiarity",
            "Share of held-out rows that are at least as strange as the question.",
            ("posterior",),
            registry=own,
            buckets=FAMILIARITY,
        )
        self.particles = Histogram(
            "posterior_auto_particles",
            "Particles of an answer that was asked for with particles: auto.",
            ("posterior",),
            registry=own,
            buckets=PARTICLES,
        )

    def _of_texts(self, own: CollectorRegistry) -> None:
        self.token_epistemic = Histogram(
            "posterior_token_epistemic_entropy_nats",
            "Mutual information of token and weights, mean of a text.",
            ("posterior",),
            registry=own,
            buckets=NATS,
        )
        self.semantic = Histogram(
            "posterior_semantic_entropy_nats",
            "Entropy of the meanings of a text's samples.",
            ("posterior",),
            registry=own,
            buckets=NATS,
        )
        self.semantic_epistemic = Histogram(
            "posterior_semantic_epistemic_entropy_nats",
            "Mutual information of meaning and weights.",
            ("posterior",),
            registry=own,
            buckets=NATS,
        )
        self.text_confidence = Histogram(
            "posterior_text_confidence",
            "Probability that a text is right, of texts with a calibration.",
            ("posterior",),
            registry=own,
            buckets=SHARES,
        )
        self.meaning_restarts = Counter(
            "posterior_meaning_restarts", "Times the worker that tells meanings apart was lost.", registry=own
        )
        self.effective = Histogram(
            "posterior_effective_particles_ratio",
            "Effective particles after a text, as a share of its particles.",
            ("posterior",),
            registry=own,
            buckets=SHARES,
        )
        self.resumes = Counter(
            "posterior_gang_resumes", "Siblings that disagreed and began again.", ("posterior",), registry=own
        )

    def _of_the_linearized_predictive(self, own: CollectorRegistry) -> None:
        self.batch_size = Histogram(
            "posterior_linearized_batch_size", "Prompts in one linearised batch.", registry=own, buckets=BATCH
        )
        self.queue = Histogram(
            "posterior_linearized_queue_seconds", "Wait before a linearised batch.", registry=own, buckets=SECONDS
        )
        self.unreadable = Gauge(
            "posterior_linearized_refused",
            "Posteriors that the linearised predictive's worker could not read; the log says why.",
            registry=own,
        )
        self.restarts = Counter(
            "posterior_linearized_restarts", "Times the linearised predictive's worker was lost.", registry=own
        )

    def _of_outcomes(self, own: CollectorRegistry) -> None:
        self.outcomes = Counter(
            "posterior_outcomes", "Outcomes that were reported, by what became of them.", ("posterior", "status"),
            registry=own,
        )  # fmt: skip
        self.answers_dropped = Counter(
            "posterior_answers_dropped", "Answers that could not be kept: no outcome can name them.", registry=own
        )

    def count_answer(self, posterior: str, predictive: str, result: Predictive, confidence: float) -> None:
        """Count one answer with a distribution."""
        self.answers.labels(posterior, predictive).inc()
        self.confidence.labels(posterior, predictive).observe(confidence)
        self.epistemic.labels(posterior, predictive).observe(result.epistemic)
        self.total.labels(posterior, predictive).observe(result.total)

    def count_text(self, posterior: str, text: TextPredictive, resumed: int) -> None:
        """Count one text, and how often its siblings began again."""
        self.resumes.labels(posterior).inc(resumed)
        if len(text.logprob):
            self.token_epistemic.labels(posterior).observe(float(text.epistemic.mean()))
            after = text.log_weights[-1].exp()
            self.effective.labels(posterior).observe(1 / float(after.square().sum()) / len(after))

    def count_meanings(self, posterior: str, meanings: Predictive, resumed: int) -> None:
        """Count the meanings of a text's samples, and how often their siblings began again."""
        self.resumes.labels(posterior).inc(resumed)
        self.semantic.labels(posterior).observe(meanings.total)
        self.semantic_epistemic.labels(posterior).observe(meanings.epistemic)

    def text(self) -> bytes:
        """Ours and vLLM's, in Prometheus' text format."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)


class Observation:
    """One request on its way: its labels are filled in as they become known; `end` counts it once. What it takes is
    counted to its key, if it has one."""

    def __init__(self, metrics: Metrics, endpoint: str, key: Key | None = None) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._key = key
        self.owner = owner(key)
        self._start = time.monotonic()
        self.posterior = NO_MODEL  # never a name a client made up
        self.predictive = NO_MODEL
        self.tokens = 0  # counted so far
        self.status: int | None = None  # that it ended with
        self._release: Callable[[], None] = lambda: None

    def begin(self, posterior: str, release: Callable[[], None]) -> None:
        """The request is about this posterior, which is kept until `release` is called at the end."""
        self.posterior, self._release = posterior, release

    def count_tokens(self, prompt: int, completion: int) -> None:
        """Count what the request read and wrote."""
        self._metrics.prompt_tokens.labels(self.posterior).inc(prompt)
        self._metrics.generated_tokens.labels(self.posterior).inc(completion)
        self.tokens += prompt + completion
        if self._key is not None:
            self._metrics.key_tokens.labels(self._key.name).inc(prompt + completion)
            self._key.quota.spend("tokens", prompt + completion)

    def end(self, status: int) -> None:
        """Count the request, with the status that it ended with."""
        if self.status is not None:
            return
        self.status = status
        self._release()
        if self._key is not None:
            self._metrics.key_requests.labels(self._key.name, str(status)).inc()
        labels = (self.posterior, self._endpoint, self.predictive)
        self._metrics.requests.labels(*labels, str(status)).inc()
        self._metrics.duration.labels(*labels).observe(time.monotonic() - self._start)
