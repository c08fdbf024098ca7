"""What is under way to each instance, and so which one the policy chooses for the next request."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.policy.dispatch import Candidate, Policy
from kunserve_sglang.router.proxy.prefix_index import PrefixIndex, Prompt

if TYPE_CHECKING:
    # Its libraries are loaded only by a router that reads prompts.
    from kunserve_sglang.router.proxy.prompts import PromptReader

_BYTES_PER_TOKEN = 4
_DEFAULT_OUTPUT_TOKENS = 128
"""SGLang's own default for `max_new_tokens`."""

_EXPECTED_SHARE = 0.7
"""Share of its limit that SGLang expects a request to produce, before it has seen any."""

_MAX_OUTPUT_TOKENS = 1 << 30
"""Far above any model's context; JSON has numbers that are no floats."""


class _Limit(msgspec.Struct):
    max_new_tokens: int | None = None


class _Limits(msgspec.Struct):
    """The fields that bound the output, in the APIs of SGLang and OpenAI."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    sampling_params: _Limit | list[_Limit] | None = None


_limits_decoder = msgspec.json.Decoder(_Limits)


def request_tokens(body: bytes, output: int | None = None) -> int:
    """About how much a request adds to the demand of an instance, in token slots.

    `output` is what `most_output` says of it.
    """
    output = most_output(body) if output is None else output
    return len(body) // _BYTES_PER_TOKEN + int(_EXPECTED_SHARE * output)


def most_output(body: bytes) -> int:
    """Tokens that a request asks for at most."""
    if not body:
        return 0
    try:
        output = _output_limit(_limits_decoder.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # No JSON, or none that an instance will accept: it is for the instance to say so.
        output = _DEFAULT_OUTPUT_TOKENS
    return min(_MAX_OUTPUT_TOKENS, max(0, output))


def _output_limit(limits: _Limits) -> int:
    sampling = limits.sampling_params
    if isinstance(sampling, list):
        return sum(s.max_new_tokens or _DEFAULT_OUTPUT_TOKENS for s in sampling)
    return (
        limits.max_completion_tokens
        or limits.max_tokens
        or limits.max_output_tokens
        or (sampling.max_new_tokens if sampling else None)
        or _DEFAULT_OUTPUT_TOKENS
    )


class Weight(msgspec.Struct, frozen=True):
    """What a request means to an instance: token slots in the end, and a prompt to prefill.

    Its answer has at most `output` tokens.
    """

    tokens: int
    prompt: Prompt
    output: int = 0

    def prompt_tokens(self, body: bytes) -> int:
        """In its prompt; where that was not read, about."""
        return self.prompt.tokens or len(body) // _BYTES_PER_TOKEN


class Dispatcher:
    """Chooses instances, and remembers what is under way to each of them.

    With an index of prefixes, `prompts` reads requests to look them up there. With `ahead` it
    reckons with prompts that wait at an instance already.
    """

    def __init__(
        self,
        registry: Registry,
        prefixes: PrefixIndex | None = None,
        prompts: PromptReader | None = None,
        *,
        ahead: bool = False,
    ) -> None:
        self._registry = registry
        self._prefixes = prefixes
        self._prompts = prompts
        self._turn = 0
        self._tickets = itertools.count()
        self._sent: defaultdict[int, SentTokens] = defaultdict(SentTokens)
        self._ahead = defaultdict[int, SentTokens](SentTokens) if ahead else None

    async def weigh(self, path: str, body: bytes) -> Weight:
        """What a request with this body will ask of an instance, about."""
        prompt = Prompt(0) if self._prompts is None else await self._prompts.read(path, body)
        output = most_output(body)
        return Weight(request_tokens(body, output), prompt, output)

    def pick(
        self, policy: Policy, weight: Weight, fits: Callable[[Instance], bool]
    ) -> Instance | None:
        """An available instance that `fits`, if there is one."""
        available = [i for i in self._registry.available() if fits(i)]
        if not available:
            return None
        turn, self._turn = self._turn, self._turn + 1
        return available[policy([self._candidate(i, weight.prompt) for i in available], turn)]

    def under_way(self, instance: Instance, weight: Weight) -> UnderWay:
        """Counts a request as sent to `instance` inside the block."""
        sent = self._sent[instance.number]
        ahead = None if self._ahead is None else self._ahead[instance.number]
        return UnderWay(instance, weight, sent, next(self._tickets), self._prefixes, ahead)

    def _candidate(self, instance: Instance, prompt: Prompt) -> Candidate:
        """Of a plain server we know what we have sent there ourselves, and nothing else."""
        group = None
        if instance.status is None:
            reported, known, capacity = 0, 0, instance.capacity
        else:
            load, layout = instance.status.load, instance.status.layout
            reported, known = load.demand, load.running + load.waiting
            capacity = load.slots.capacity
            group = layout.ids[0] if layout.cooperative else None
        number, tokens = self._sent[instance.number].after(known)
        cached = self._prefixes.cached_tokens(instance, prompt) if self._prefixes else 0
        return Candidate(
            in_flight=instance.in_flight,
            demand=reported + tokens,
            capacity=capacity,
            batch=known + number,
            new_tokens=prompt.tokens - cached,
            ahead=self._prompts_ahead(instance),
            group=group,
        )

    def _prompts_ahead(self, instance: Instance) -> int:
        """Tokens of prompts that it has not begun with, as far as it says and we know."""
        if self._ahead is None:
            return 0
        load = instance.status.load if instance.status else None
        known = load.running + load.waiting if load else 0
        _, tokens = self._ahead[instance.number].after(known)
        return tokens + (load.prompts if load else 0)


class SentTokens:
    """The tokens of all requests that are under way to one number, by ticket, and their sum."""

    __slots__ = ("_tokens", "_total")

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self._total = 0

    def add(self, ticket: int, tokens: int) -> None:
        self._tokens[ticket] = tokens
        self._total += tokens

    def remove(self, ticket: int) -> None:
        self._total -= self._tokens.pop(ticket)

    def after(self, known: int) -> tuple[int, int]:
        """Requests that are too recent for the instance's last status record, and their tokens.

        The record knows of `known` requests, so it misses the latest of those under way.
        """
        number = len(self._tokens) - known
        if number <= 0:
            return 0, 0
        if not known:
            return number, self._total
        return number, sum(itertools.islice(reversed(self._tokens.values()), number))


class UnderWay:
    """One request at one instance; `sent` is all that is there."""

    __slots__ = ("_ahead", "_instance", "_prefix", "_prompt", "_sent", "_ticket", "_tokens")

    def __init__(
        self,
        instance: Instance,
        weight: Weight,
        sent: SentTokens,
        ticket: int,
        prefixes: PrefixIndex | None,
        ahead: SentTokens | None = None,
    ) -> None:
        self._ahead = ahead
        self._instance = instance
        self._prompt = weight.prompt.tokens
        self._tokens = weight.tokens
        self._sent = sent
        self._ticket = ticket
        self._prefix = prefixes.on_its_way(instance, weight.prompt) if prefixes else None

    def __enter__(self) -> None:
        self._sent.add(self._ticket, self._tokens)
        if self._ahead is not None:
            self._ahead.add(self._ticket, self._prompt)
        self._instance.in_flight += 1
        if self._prefix is not None:
            self._prefix.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._instance.in_flight -= 1
        self._sent.remove(self._ticket)
        if self._ahead is not None:
            self._ahead.remove(self._ticket)
        if self._prefix is not None:
            self._prefix.__exit__(*error)
