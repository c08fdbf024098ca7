"""What can be wrong with what is asked for: where to listen, what to keep, what to serve. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kunserve_sglang.cli.doctor.expected import budget_of
from kunserve_sglang.cli.doctor.facts import Facts, ModelFacts
from kunserve_sglang.cli.doctor.finding import Finding, error, warning
from kunserve_sglang.cli.doctor.host_rules import LONGEST_BESIDE_STATE, too_long
from kunserve_sglang.core.hosts import is_local
from kunserve_sglang.core.sizes import format_size


def serving_findings(facts: Facts) -> Iterator[Finding]:
    asked = facts.asked
    if asked.port_error:
        yield error("port", asked.port_error, "end who listens there, or name another --port")
    if not (asked.has_key or asked.allow_open or is_local(asked.host)):
        yield error(
            "key",
            f"--host {asked.host} is open to others, and there is no key",
            "set KUNSERVE_ADMIN_API_KEY, or --allow-open if everybody may do everything",
        )
    yield from _state(facts)
    if facts.model is not None:
        yield from _model(facts, facts.model)


def _state(facts: Facts) -> Iterator[Finding]:
    if (state := facts.state) is None:
        return
    if state.error:
        yield error(
            "state-folder",
            f"--state-folder {state.path} cannot be used: {state.error}",
            "name a folder of this user's, one for each launcher",
        )
    elif too_long(state.path, LONGEST_BESIDE_STATE):
        yield error(
            "state-folder",
            f"--state-folder {state.path} is too long a path for sockets in it",
            "name a folder with a shorter path",
        )


def _model(facts: Facts, model: ModelFacts) -> Iterator[Finding]:
    if model.error:
        yield error(
            "model",
            f"--model-path {model.path}: {model.error}",
            "name a folder with config.json and the weights, which this user may read",
        )
    elif not model.here:
        yield warning(
            "model",
            f"--model-path {model.path} is no folder here: SGLang will ask a hub for it",
            "nothing, if this host reaches the hub; otherwise name a folder",
        )
    elif facts.instances and facts.asked.device == "cpu":
        budget, needed = budget_of(facts), model.parameter_bytes
        if model.dtype == "float32":
            needed //= 2  # SGLang serves such models in float16
        if needed >= budget:
            yield error(
                "budget",
                f"the parameters of the model take {format_size(needed)}, and an instance gets "
                f"{format_size(budget)}",
                "a larger --memory-budget, fewer instances, or a smaller model",
            )
