"""One instance's scheduler, driven step by step from a script.

The scheduler is the product's, with the product's agent, memory and transport; only HTTP and
tokenizer are left out.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import msgspec
import zmq
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedGenerateReqInput,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
)

from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.instance.agent.agent import Agent
from kunserve_sglang.sglang_seam.containment import REQUEST_FAILED
from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler
from kunserve_sglang.sglang_seam.waiting import REQUEST_TOO_LARGE
from kunserve_sglang.testing.local_scheduler import tokenized
from tests.support.answers import output_of
from tests.support.census import described, whereabouts
from tests.support.emulated_gpu import emulated_gpu_for_sglang
from tests.support.emulated_tensors import EmulatedDevice
from tests.support.faults import PLANTED, broken, wedge
from tests.support.frontend import Frontend
from tests.support.link import Link
from tests.support.loop import made_scheduler, stand, stands, turn
from tests.support.refusals import Refusals
from tests.support.script import (
    AbortRequest,
    Action,
    Add,
    Break,
    Call,
    Gate,
    Output,
    Pause,
    Plant,
    Turns,
    Wedge,
)

STALL_S = 60.0


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
        self.scheduler = made_scheduler(config, server, rank)
        self.scheduler.run_batch = self._run_batch
        self.scheduler.wait_for_events = self._wait_for_events
        self.scheduler.ipc_channels.send_to_tokenizer.send_output = self._forgotten
        self._frontend: Frontend | None = None
        if not self.scheduler.server_args.skip_tokenizer_init:
            self._frontend = Frontend(self.scheduler.server_args, self._dispatched)
            self.scheduler.output_streamer.send_to_detokenizer.send_output = self._frontend.arrives
        self.requests: dict[str, Any] = {}
        self._added: set[str] = set()
        self._to_abort: set[str] = set()
        self._aborted: set[str] = set()
        self._refused: set[str] = set()
        self._faults = ExitStack()
        self.refusals = Refusals()
        self._playing = False
        self.largest_slot = 0
        self.retracted = 0
        self.mixed = [0, 0]

    def wake_for(self, pipe: Connection) -> None:
        """While it idles, a word of the test is an event like any other."""
        self.scheduler._idle.register(pipe.fileno(), zmq.POLLIN)

    def play(self, script: list[tuple[int, Action]], link: Link) -> dict[str, Output]:
        """Run the script to its end and until all requests are finished."""
        for of_last_script in (
            self.requests,
            self._added,
            self._to_abort,
            self._aborted,
            self._refused,
        ):
            of_last_script.clear()
        self._flush()
        self._playing = True
        pending, step, progress = list(script), 0, time.monotonic()
        while pending or self._unanswered() or (self._frontend and self._frontend.open):
            while pending and pending[0][0] <= step:
                self._act(pending.pop(0)[1], link)
            if self._step():
                step, progress = step + 1, time.monotonic()
            elif pending and stands(self.scheduler):
                step = pending[0][0]
            if time.monotonic() - progress > STALL_S:
                raise TimeoutError(f"no step for {STALL_S} s at step {step}: {self._state()}")
            self._find_all()
        self._playing = False
        self._faults.close()
        assert self._gpu is None or not self._gpu.driver.unmapped_while_busy
        self.retracted += sum(r.retraction_count for r in self.requests.values())
        return {
            **{rid: self._output(r) for rid, r in self.requests.items() if rid in self._added},
            **{rid: Output((), "failed", 0) for rid in self._refused},
            **self._received(),
        }

    def _received(self) -> dict[str, Output]:
        answers = {} if self._frontend is None else self._frontend.take_answers()
        return {
            name: Output((), "abort" if left else "call", 0, received=chunks)
            for name, (chunks, left) in answers.items()
        }

    def _output(self, request: Any) -> Output:
        return output_of(request, aborted=request.rid in self._aborted)

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
        return f"{described(self.scheduler)}, unanswered {sorted(self._unanswered())}"

    def hold_pieces(self, hold: bool) -> None:
        """Let nothing move between members but what micro-batches take along."""
        agent = self.scheduler.agent
        agent.move_pieces = (lambda _: False) if hold else partial(Agent.move_pieces, agent)

    def waits(self) -> Counter[str]:
        """Where the product has waited for the device since the last call, by place."""
        assert self._gpu is not None
        waits, self._gpu.waits = self._gpu.waits, Counter()
        return Counter({k: n for k, n in waits.items() if k.startswith("kunserve_sglang.")})

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
        elif isinstance(action, Call):
            assert self._frontend is not None, "the members have no tokenizer"
            self._frontend.call(action.rid, action.endpoint, action.body, action.journaled)
        elif isinstance(action, AbortRequest):
            self._abort(action.rid)
        elif isinstance(action, Pause):
            self._pause(action)
        elif isinstance(action, Break):
            self._faults.enter_context(broken(self.scheduler, action.point, action.rid))
        elif isinstance(action, Plant):
            self._faults.enter_context(PLANTED[action.fault](self.scheduler))
        elif isinstance(action, Wedge):
            wedge(self.scheduler)
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

    def _abort(self, rid: str) -> None:
        if self._frontend is not None and self._frontend.knows(rid):
            self._frontend.leave(rid)
            return
        self._to_abort.add(rid)
        self.scheduler.abort_request(AbortReq(rid=rid))

    def _forgotten(self, answer: Any, *_: Any) -> None:
        """SGLang's only word about a request that it forgets between two steps.

        It may have waited for its first step or, retracted, for another one.
        """
        if isinstance(answer, AbortReq):
            if self._frontend is not None:
                self._frontend.arrives(answer)
            cause = (answer.finished_reason or {}).get("err_type")
            if cause == REQUEST_FAILED:
                self._refused |= {answer.rid} - self.requests.keys()
                return
            if cause == REQUEST_TOO_LARGE:
                return
            if answer.rid not in self._to_abort:
                raise AssertionError(f"given up: {answer}; {self._state()}")
            self._aborted.add(answer.rid)

    def _gate(self, gate: Gate, link: Link) -> None:
        link.send(("gate", gate.name))
        deadline = time.monotonic() + STALL_S
        while not link.poll():
            with self.scheduler.containment.contained():
                stand(self.scheduler)
            if time.monotonic() > deadline:
                raise TimeoutError(f"gate {gate.name} was never opened")
        assert link.recv() == "open"

    def _wait_for_events(self, timeout_ms: int) -> bool:
        """The scheduler's, but for no time when all that can come is the rest of the script."""
        idle = self._playing and self.scheduler.is_fully_idle()
        return KunServeScheduler.wait_for_events(self.scheduler, 0 if idle else timeout_ms)

    def _run_batch(self, batch: Any, *arguments: Any) -> Any:
        """SGLang's, and a note of the slots it writes, and of prefills that decode along."""
        self.largest_slot = max(self.largest_slot, int(batch.out_cache_loc.max()))
        if batch.forward_mode.is_mixed():
            self.mixed[self.scheduler.engine.cooperating] += 1
        return KunServeScheduler.run_batch(self.scheduler, batch, *arguments)

    def _step(self) -> bool:
        """One turn of the loop, and of the clients; true if a batch ran."""
        ran = False
        with self.scheduler.containment.contained():
            ran = turn(self.scheduler)
        if self._frontend is not None:
            self._frontend.settle()
        return ran

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
        self._added.add(add.rid)
        self._take_in(request)

    def _dispatched(self, message: Any) -> None:
        """From the frontend: a request, several, or that one is to be aborted."""
        if isinstance(message, AbortReq):
            self._to_abort.add(message.rid)
            self.scheduler.abort_request(message)
        elif isinstance(message, BatchTokenizedGenerateReqInput):
            self.scheduler.handle_batch_generate_request(message)
            self._find_queued({request.rid for request in message})
        else:
            self._take_in(message)

    def _take_in(self, request: Any) -> None:
        with self.scheduler.containment.taking_in(request):
            self.scheduler.handle_generate_request(request)
            self._find_queued({request.rid})

    def _find_queued(self, rids: set[str]) -> None:
        scheduler = self.scheduler
        queued = (*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue)
        self.requests.update({r.rid: r for r in queued if r.rid in rids})
