"""Finds out all facts: of the flags, of Python, of the host."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kunserve_sglang.cli.doctor.facts import AskedFacts, Facts, ModelFacts
from kunserve_sglang.cli.doctor.hosts import state_folder, this_host
from kunserve_sglang.cli.doctor.options import Asked
from kunserve_sglang.cli.doctor.packages import installation
from kunserve_sglang.core.addresses import listen_at
from kunserve_sglang.core.errors import ConfigurationError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def gather(asked: Asked) -> Facts:
    """Some tenths of a second; nothing is left behind."""
    return Facts(
        asked=_asked(asked),
        installation=installation(),
        host=this_host(),
        model=model_at(asked.model_path) if asked.model_path else None,
        state=state_folder(Path(asked.cluster.state_folder))
        if asked.cluster.state_folder
        else None,
    )


def _asked(asked: Asked) -> AskedFacts:
    cluster = asked.cluster
    return AskedFacts(
        instances=cluster.num_instances if asked.instances_named else None,
        device=asked.device,
        memory_budget=asked.launch.memory_budget,
        transport=cluster.transport,
        max_queued=cluster.max_queued,
        host=cluster.host,
        port=cluster.port if asked.port_named else 0,
        port_error=_error_of_listening(cluster.host, cluster.port) if asked.port_named else "",
        has_key=bool(cluster.admin_api_key or asked.launch.api_key),
        allow_open=cluster.allow_open,
    )


def _error_of_listening(host: str, port: int) -> str:
    try:
        listen_at(host, port).close()
    except ConfigurationError as error:
        return str(error)
    return ""


def model_at(path: str) -> ModelFacts:
    """A model's folder, looked at from outside; no weights are read but their beginnings."""
    folder = Path(path)
    if not folder.exists():
        if _HUB_NAME.fullmatch(path):
            return ModelFacts(path=path)
        return ModelFacts(path=path, error="there is no such folder")
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = [p for pattern in _WEIGHTS for p in folder.glob(pattern)]
        for file in weights:
            with file.open("rb") as stream:
                stream.read(1)
    except OSError as error:
        name = Path(str(error.filename or folder)).name
        return ModelFacts(path=path, error=f"{name}: {error.strerror or error}")
    except ValueError:
        return ModelFacts(path=path, error="config.json is no JSON")
    if not weights:
        return ModelFacts(path=path, error="there are no weights in it")
    return ModelFacts(
        path=path,
        here=True,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
        parameter_bytes=sum(file.stat().st_size for file in weights),
    )
