"""SGLang's scheduler as an instance of a KunServe cluster: owner and stage at once."""

from __future__ import annotations

import os
from typing import Any

import torch
import zmq

# The class is taken from its module at definition: the hook that installs our subclass rewrites
# every imported name `Scheduler`, and a subclass must not inherit from itself.
from sglang.srt.managers import scheduler as upstream

from kunserve_sglang.config import InstanceConfig, instance_from_environment
from kunserve_sglang.errors import InternalError
from kunserve_sglang.instance.agent import Agent, Body
from kunserve_sglang.instance.control import ControlLink
from kunserve_sglang.messages import PROTOCOL_VERSION, Hello
from kunserve_sglang.sglang_seam.engine import SglangEngine
from kunserve_sglang.sglang_seam.model_runner import KunServeModelRunner, KunServeWorker
from kunserve_sglang.transport import HostAwareDataPlane

_IDLE_WAIT_MS = 500


class KunServeScheduler(upstream.Scheduler):
    """Adds the agent to SGLang's loop: one call at each step boundary, one wait when idle."""

    instance: InstanceConfig
    agent: Agent

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        instance = instance_from_environment()
        if instance is None:
            raise InternalError("the KunServe scheduler was started outside an instance")
        self.instance = instance
        if instance.cpus:
            os.sched_setaffinity(0, instance.cpus)
            torch.set_num_threads(len(instance.cpus))
        super().__init__(*args, **kwargs)
        self.agent = self._build_agent()
        self._idle = self._build_idle_poller()

    def init_tp_model_worker(self) -> None:
        self.tp_worker = KunServeWorker(
            server_args=self.server_args,
            gpu_id=self.ps.gpu_id,
            ps=self.ps,
            nccl_port=self.nccl_port,
            instance=self.instance,
        )

    def get_init_info(self) -> dict[str, Any]:
        """The launcher refuses to serve without our key: it proves that the plugin took effect."""
        return {**super().get_init_info(), "kunserve": type(self).__name__}

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """First thing in every turn of the loop, with all results applied: the step boundary."""
        super().process_input_requests(recv_reqs)
        self.agent.poll()

    def maybe_sleep_on_idle(self) -> None:
        """Wait for a request, a command or a peer's micro-batch instead of spinning."""
        self.agent.publish()
        self._idle.poll(_IDLE_WAIT_MS)

    def requests_with_slots(self) -> list[Any]:
        """All requests that hold token slots, each once."""
        found: dict[str, Any] = {}
        for batch in (self.running_batch, self.last_batch):
            for request in batch.reqs if batch is not None else ():
                if request.req_pool_idx is not None and not request.finished():
                    found[request.rid] = request
        if self.chunked_req is not None:
            found[self.chunked_req.rid] = self.chunked_req
        return list(found.values())

    def _build_agent(self) -> Agent:
        runner: KunServeModelRunner = self.tp_worker.model_runner
        instance = self.instance
        profile = runner.kv_cache_configurator.profile
        context: zmq.Context[Any] = zmq.Context(1)
        plane = HostAwareDataPlane(instance.data_socket)
        engine = SglangEngine(self)
        hello = Hello(
            version=PROTOCOL_VERSION,
            instance=instance.instance,
            url=instance.url,
            data_address=plane.address,
            scheduler=type(self).__name__,
            layer_count=engine.layer_count,
            memory=profile,
            capacity=self.max_total_num_tokens,
        )
        body = Body(
            instance=instance.instance,
            profile=profile,
            pool=runner.memory.pool,
            parameters=runner.memory.parameters,
            kv=runner.token_to_kv_pool.store,
            engine=engine,
            plane=plane,
            control=ControlLink(context, instance.control_address, hello),
        )
        agent = Agent(body, peer_timeout_s=instance.peer_timeout_s)
        engine.cooperate = agent.forward
        return agent

    def _build_idle_poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        for socket in (
            self.ipc_channels.recv_from_tokenizer,
            self.ipc_channels.recv_from_rpc,
            self.agent.control_handle,
            *self.agent.data_handles,
        ):
            poller.register(socket, zmq.POLLIN)
        return poller
