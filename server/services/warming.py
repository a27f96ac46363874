"""What the first requests would otherwise wait for, and what is odd about the base."""

from __future__ import annotations

from posterior.data import base_check
from posterior.data.candidates import encode
from server.services.predictive import Service


async def warm_up(service: Service) -> list[str]:
    """A line for everything that is odd, after the workers have loaded their models and vLLM every adapter.

    Raises PosteriorError where no posterior passes its self-test.
    """
    if service.linearizer is not None:
        await service.linearizer.start()
    if service.comparer is not None:
        await service.comparer.start()
    prompt = service.tokenizer.encode("Warm up.")
    for served in service.registry.entries:
        task = served.posterior.task if served.posterior is not None else None
        candidates = encode(service.tokenizer, (task and task.answers) or (" no", " yes"))
        await service.engine.score([prompt], candidates, served.particles or [served.map])
        if service.linearizer is not None and served.predictives[0] == "linearized":
            await service.linearizer.moments(served.key, [prompt], candidates)
    await service.engine.warm_up(prompt)
    tested = [] if service.lifecycle is None else await service.lifecycle.examine()
    return [*tested, *await _odd(service)]


async def _odd(service: Service) -> list[str]:
    """What is odd about the base as vLLM serves it, and about each posterior's prompts on it."""
    probes = base_check.probes(service.tokenizer)
    totals = {name: await service.engine.score([ids[:1]], (ids[1:],), [None]) for name, ids in probes.items()}
    means = {name: float(total.log_p) / (len(probes[name]) - 1) for name, total in totals.items()}
    joints = [
        f"{item.name}: {line}"
        for item in service.registry.posteriors
        for line in base_check.joints(service.tokenizer, item.task)
    ]
    return [*base_check.judge(probes, means, service.engine.vocab_size), *joints]
