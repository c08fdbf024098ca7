"""One instance's scheduler in a process of its own, driven step by step from a script.

The scheduler is the product's, with the product's agent, memory and transport; only HTTP and
tokenizer are left out. A script is a list of `(step, action)`; a step is one forward pass of this
scheduler, so that a script means the same every time it is played.
"""

from __future__ import annotations

import os
import pickle
import time
from array import array
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import msgspec
import torch
from sglang.srt.managers.io_struct import (
    AbortReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
)
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import PortArgs, ServerArgs

from kunserve_sglang.core.blocks import block_hashes
from kunserve_sglang.core.settings import INSTANCE_ENVIRONMENT, InstanceConfig
from kunserve_sglang.instance.agent.agent import Agent
from kunserve_sglang.instance.ranks.ranks import Fact, Ranks
from kunserve_sglang.sglang_seam import plugin
from kunserve_sglang.sglang_seam.containment import REQUEST_FAILED
from kunserve_sglang.sglang_seam.scheduler import INSTANCE_LOST, KunServeScheduler
from kunserve_sglang.sglang_seam.waiting import REQUEST_TOO_LARGE
from kunserve_sglang.testing.local_scheduler import tokenized
from tests.support.census import whereabouts
from tests.support.emulated_gpu import emulated_gpu_for_sglang
from tests.support.emulated_tensors import EmulatedDevice
from tests.support.faults import broken

STALL_S = 60.0

_RULED_OUT = -1e9
"""No logprob of a token that may come is as low."""

_NEVER_RAN = "Aborted by AbortReq."
"""SGLang's word for a request that it runs on another prompt, only to be rid of it."""


@dataclass(frozen=True)
class Add:
    """A request arrives."""

    rid: str
    prompt: tuple[int, ...]
    new_tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)
    asks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AbortRequest:
    rid: str


@dataclass(frozen=True)
class Gate:
    """Stand still until the layout has reached this many transitions; tell the test first."""

    name: str


@dataclass(frozen=True)
class Pause:
    """Generation pauses for some turns of the loop, with requests left in place or retracted."""

    mode: str


@dataclass(frozen=True)
class Turns:
    """So many turns of the loop, whether or not a batch runs in them."""

    count: int


@dataclass(frozen=True)
class Break:
    """From now on something fails whenever it has to do with this request: see `faults`."""

    point: str
    rid: str


@dataclass(frozen=True)
class Wedge:
    """SGLang believes from now on that there is no room, and nothing makes it look again."""


Action = Add | AbortRequest | Gate | Pause | Turns | Break | Wedge


@dataclass(frozen=True)
class Output:
    """An answer; `logprobs` are all that SGLang would send, by the names of its record.

    `end` is what it would say of the reason; `hidden` are hidden states, one row a token.
    """

    tokens: tuple[int, ...]
    reason: str
    cached: int
    logprobs: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    hidden: list[Any] = field(default_factory=list)


class Link:
    """The pipe to the test, at which rank 0 looks for all ranks."""

    _FOUND: Fact[bool] = Fact("a word of the test", msgspec.msgpack.Decoder(bool))
    _WORD: Fact[bytes] = Fact("the word", msgspec.msgpack.Decoder(bytes))

    def __init__(self, pipe: Connection | None, ranks: Ranks) -> None:
        self._pipe: Any = pipe
        self._ranks = ranks

    def poll(self) -> bool:
        return self._ranks.agree(self._FOUND, lambda: self._pipe.poll())

    def recv(self) -> Any:
        return pickle.loads(self._ranks.agree(self._WORD, lambda: self._pipe.recv_bytes()))

    def send(self, word: Any) -> None:
        if self._pipe is not None:
            self._pipe.send(word)


class Member:
    """Drives one scheduler; lives in the child process.

    With the device `cuda`, that is an emulated one, of this process and all others of this user.
    """

    def __init__(self, config: InstanceConfig, server: dict[str, Any], rank: int) -> None:
        self._gpu: EmulatedDevice | None = None
        if server.get("device") == "cuda":
            self._for_good = ExitStack()
            self._gpu = self._for_good.enter_context(emulated_gpu_for_sglang())
            # There are no CUDA graphs.
            config = msgspec.structs.replace(config, stage_graph_max_bs=0)
            server = {"disable_cuda_graph": True, **server}
        os.environ[INSTANCE_ENVIRONMENT] = config.to_environment()
        # Measurements of this model are of no use to anybody else.
        os.environ["XDG_CACHE_HOME"] = str(Path(server["model_path"]).parent)
        plugin.register()
        HookRegistry.apply_hooks()
        torch.set_num_threads(1)
        arguments = ServerArgs(
            sampling_backend="pytorch",
            log_level="error",
            **{
                "skip_tokenizer_init": True,
                "device": "cpu",
                "attention_backend": "torch_native",
                "disable_overlap_schedule": True,
                **server,
            },
        )
        ports = PortArgs.init_new(arguments)
        self.scheduler = KunServeScheduler(arguments, ports, 0, rank, 0, 0, 0, 0, None)
        self.scheduler.schedule_stream = self.scheduler.device_module.Stream()
        self.scheduler._war_barrier_enabled = False
        self.scheduler.result_queue = deque()
        self.scheduler.run_batch = self._run_batch
        self.scheduler.ipc_channels.send_to_tokenizer.send_output = self._forgotten
        self.requests: dict[str, Any] = {}
        self._to_abort: set[str] = set()
        self._aborted: set[str] = set()
        self._refused: set[str] = set()
        self._faults = ExitStack()
        self.largest_slot = 0
        self.retracted = 0

    def play(self, script: list[tuple[int, Action]], link: Link) -> dict[str, Output]:
        """Run the script to its end and until all requests are finished."""
        for of_last_script in (self.requests, self._to_abort, self._aborted, self._refused):
            of_last_script.clear()
        self._flush()
        pending, step, progress = list(script), 0, time.monotonic()
        while pending or self._unanswered():
            while pending and pending[0][0] <= step:
                self._act(pending.pop(0)[1], link)
            if self._step():
                step, progress = step + 1, time.monotonic()
            elif pending and self.scheduler.is_fully_idle():
                step = pending[0][0]
            if time.monotonic() - progress > STALL_S:
                raise TimeoutError(f"no step for {STALL_S} s at step {step}: {self._state()}")
            self._find_all()
        self._faults.close()
        assert self._gpu is None or not self._gpu.driver.unmapped_while_busy
        self.retracted += sum(r.retraction_count for r in self.requests.values())
        return {rid: self._output(r) for rid, r in self.requests.items()} | {
            rid: Output((), "failed", 0) for rid in self._refused
        }

    def _output(self, request: Any) -> Output:
        reason = request.finished_reason
        if getattr(reason, "message", None) == _NEVER_RAN:
            return Output((), "abort", 0)
        return Output(
            tuple(request.output_ids_through_stop),
            self._end(request),
            request.cached_tokens,
            _logprobs(request),
            {} if reason is None else reason.to_json(),
            request.hidden_states,
        )

    def _end(self, request: Any) -> str:
        if request.rid in self._aborted:
            return "abort"
        reason: dict[str, Any] = request.finished_reason.to_json()
        return "failed" if reason.get("err_type") == REQUEST_FAILED else str(reason["type"])

    def _unanswered(self) -> set[str]:
        return {rid for rid, r in self.requests.items() if not r.finished()} - self._aborted

    def _find_all(self) -> None:
        """Raises when the scheduler has lost a request, or has one twice."""
        places, unanswered = whereabouts(self.scheduler), self._unanswered()
        amiss = {
            rid: found
            for rid in self.requests
            if len(found := places.get(rid, [])) != (rid in unanswered)
        }
        if amiss:
            raise AssertionError(f"requests and where they are: {amiss}; {self._state()}")

    def _state(self) -> str:
        s = self.scheduler
        ready, flights = s.cooperation._ready, s.cooperation._flights
        return (
            f"running {[r.rid for r in s.running_batch.reqs]}, "
            f"waiting {[r.rid for r in s.waiting_queue]}, chunked {s.chunked_req}, "
            f"full {s.running_batch.batch_is_full}, cooperating {s.engine.cooperating}, "
            f"ready {[r.rid for r in ready.reqs]}, in flight {len(flights)}, "
            f"free {s.token_to_kv_pool_allocator.available_size()} of "
            f"{s.token_to_kv_pool_allocator.size}, cached {s.tree_cache.evictable_size()}, "
            f"unanswered {sorted(self._unanswered())}"
        )

    def hold_pieces(self, hold: bool) -> None:
        """Let nothing move between members but what micro-batches take along."""
        agent = self.scheduler.agent
        agent.move_pieces = (lambda _: False) if hold else partial(Agent.move_pieces, agent)

    def waits(self) -> Counter[str]:
        """Where the product has waited for the device since the last call, by place."""
        assert self._gpu is not None
        waits, self._gpu.waits = self._gpu.waits, Counter()
        return Counter({k: n for k, n in waits.items() if k.startswith("kunserve_sglang.")})

    def cached(self) -> set[int]:
        """The blocks of all sequences in the radix tree, each hashed from its beginning."""
        found: set[int] = set()
        paths = [
            (node, array("q")) for node in self.scheduler.tree_cache.root_node.children.values()
        ]
        while paths:
            node, before = paths.pop()
            sequence = before + node.key.raw_token_ids()
            found.update(block_hashes(sequence, node.key.extra_key))
            paths += [(child, sequence) for child in node.children.values()]
        return found

    def idle(self) -> None:
        """One turn of the loop without work: serve peers and commands."""
        self._step()

    def _flush(self) -> None:
        """Forget cached prefixes, once those who finished last have left their batch."""
        for _ in range(100):
            if self.scheduler.flush_cache():
                return
            self._step()
        raise TimeoutError(f"the scheduler does not come to rest: {self._state()}")

    def _act(self, action: Action, link: Link) -> None:
        if isinstance(action, Add):
            self._add(action)
        elif isinstance(action, AbortRequest):
            self._abort(action.rid)
        elif isinstance(action, Pause):
            self._pause(action)
        elif isinstance(action, Break):
            self._faults.enter_context(broken(self.scheduler, action.point, action.rid))
        elif isinstance(action, Wedge):
            self._wedge()
        elif isinstance(action, Turns):
            for _ in range(action.count):
                self._step()
        else:
            self._gate(action, link)

    def _pause(self, pause: Pause) -> None:
        s = self.scheduler
        s.pause_generation(PauseGenerationReqInput(mode=pause.mode))
        for _ in range(20):
            if s.engine.cooperating:
                assert not s.cooperation.turn()
        s.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))

    def _wedge(self) -> None:
        s = self.scheduler
        s.running_batch.batch_is_full = True
        s.waiting._seen = s.waiting._situation(s.running_batch)

    def _abort(self, rid: str) -> None:
        self._to_abort.add(rid)
        self.scheduler.abort_request(AbortReq(rid=rid))

    def _forgotten(self, answer: Any, *_: Any) -> None:
        """SGLang's only word about a request that it forgets between two steps.

        It may have waited for its first step or, retracted, for another one; or its group has lost
        a member, and the request what that one held of it.
        """
        if isinstance(answer, AbortReq):
            cause = (answer.finished_reason or {}).get("err_type")
            if cause == REQUEST_FAILED:
                self._refused |= {answer.rid} - self.requests.keys()
                return
            if cause == REQUEST_TOO_LARGE:
                return
            if answer.rid not in self._to_abort and cause != INSTANCE_LOST:
                raise AssertionError(f"given up: {answer}; {self._state()}")
            self._aborted.add(answer.rid)

    def _gate(self, gate: Gate, link: Link) -> None:
        link.send(("gate", gate.name))
        deadline = time.monotonic() + STALL_S
        while not link.poll():
            self.scheduler.process_input_requests([])
            if self.scheduler.engine.cooperating:
                self.scheduler.agent.serve_one()
                self.scheduler.agent.move_pieces(0.0)
            if time.monotonic() > deadline:
                raise TimeoutError(f"gate {gate.name} was never opened")
        assert link.recv() == "open"

    def _run_batch(self, batch: Any, *arguments: Any) -> Any:
        """SGLang's, and a note of the slots it writes."""
        self.largest_slot = max(self.largest_slot, int(batch.out_cache_loc.max()))
        return KunServeScheduler.run_batch(self.scheduler, batch, *arguments)

    def _step(self) -> bool:
        """One turn of the loop; true if a batch ran."""
        with self.scheduler.containment.contained():
            return self._turn()
        return False

    @torch.no_grad()
    def _turn(self) -> bool:
        s = self.scheduler
        if s.engine.cooperating:
            return bool(s.cooperation.turn())
        s.process_input_requests([])
        if s.engine.cooperating:
            return False
        if s.enable_overlap:
            return self._overlap_step()
        plan = s.get_next_batch_to_run(running_batch=s.running_batch, last_batch=s.last_batch)
        s.running_batch, batch = plan.running_batch, plan.batch_to_run
        if batch:
            s.process_batch_result(batch, s.run_batch(batch))
        else:
            s.on_idle()
        s.last_batch = batch
        return batch is not None

    def _overlap_step(self) -> bool:
        """SGLang's overlap loop after the step boundary: results are applied one step later."""
        s = self.scheduler
        plan = s.get_next_batch_to_run(running_batch=s.running_batch, last_batch=s.last_batch)
        s.running_batch, batch = plan.running_batch, plan.batch_to_run
        at_once = s.is_disable_overlap_for_batch(batch, last_batch=s.last_batch)
        if at_once:
            s.process_batch_result(*s.result_queue.popleft())
        result = None
        if batch:
            result = s.run_batch(batch)
            s._apply_war_barrier()
            s.result_queue.append((batch.copy(), result))
        if s.last_batch:
            if not at_once:
                s.process_batch_result(*s.result_queue.popleft())
        elif batch is None:
            s.on_idle()
        s.launch_batch_sample_if_needed(result, batch)
        s.last_batch = batch
        return batch is not None

    def _add(self, add: Add) -> None:
        scheduler = self.scheduler
        request = tokenized(
            add.rid,
            add.prompt,
            add.new_tokens,
            stream=False,
            asks=add.asks,
            tokenizer=scheduler.tokenizer,
            **add.sampling,
        )
        with scheduler.containment.taking_in(request):
            scheduler.handle_generate_request(request)
            queued = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
            self.requests[add.rid] = next(r for r in queued if r.rid == add.rid)


def _logprobs(request: Any) -> dict[str, Any]:
    """Of its prompt and its output; empty if it did not ask.

    Of tokens that a grammar rules out, all equally unlikely, any may be among the most likely.
    """
    if not request.return_logprob:
        return {}
    record = asdict(request.logprob)
    for kind in ("input", "output"):
        names = f"{kind}_top_logprobs_val", f"{kind}_top_logprobs_idx"
        rows = zip(*(record[name] or () for name in names), strict=True)
        possible = [
            [(v, i) for v, i in zip(vals, idxs, strict=True) if v > _RULED_OUT] if vals else vals
            for vals, idxs in rows
        ]
        record[names[0]] = [row and [v for v, _ in row] for row in possible]
        record[names[1]] = [row and [i for _, i in row] for row in possible]
    return record


def serve(
    pipe: Connection | None, config: InstanceConfig, server: dict[str, Any], rank: int = 0
) -> None:
    """Entry point of the child process: obey `(verb, argument)` until told to stop.

    Of an instance with several ranks, rank 0 has the pipe, and the others obey as well.
    """
    member = Member(config, server, rank)
    link = Link(pipe, member.scheduler.ranks)
    link.send(("ready", member.scheduler.max_total_num_tokens))
    while True:
        if not link.poll():
            member.idle()
            continue
        try:
            verb, argument = link.recv()
        except EOFError:
            return
        if verb == "play":
            link.send(("played", member.play(argument, link)))
        elif verb == "numbers":
            link.send(("numbers", (member.largest_slot, member.retracted)))
        elif verb == "cached":
            link.send(("cached", member.cached()))
        elif verb == "waits":
            link.send(("waits", member.waits()))
        elif verb == "hold":
            member.hold_pieces(argument)
            link.send(("held", None))
        elif verb == "stop":
            os._exit(0)
