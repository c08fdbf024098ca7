"""Pods as a kubelet runs them, by the manifests' own commands, volumes, probes and times.

Instead of an image there is this environment; what a container may not do, it cannot do here: the
root is read-only, and there are no capabilities.
"""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from kunserve_sglang.core.processes import die_with_parent, family
from tests.support.manifests import Object, container_of, pod_of
from tests.support.network import Host, Network
from tests.support.places import ROOT

_ROOT = """
mount -t tmpfs none {root}
for entry in /*; do
    if [ -L "$entry" ]; then cp -a "$entry" {root}/
    elif [ -d "$entry" ]; then mkdir {root}"$entry" && mount --rbind "$entry" {root}"$entry"
    fi
done
mount --bind {hosts} {root}/etc/hosts
"""
_READ_ONLY = """
for entry in {root}/*; do
    case "${{entry##*/}}" in
        proc|sys|dev{volumes}) ;;
        *) mountpoint -q "$entry" && mount -o remount,bind,ro "$entry" ;;
    esac
done
mount -o remount,bind,ro {root}
"""
_RUN = """
exec chroot {root} setpriv --bounding-set=-all --inh-caps=-all --no-new-privs \\
    taskset -c {cpus} {command}
"""
_TERM_S = 30.0


class Pod:
    """One pod of a workload, at an address of its own; it runs from when it is made.

    `volumes` has a folder for each of the pod's volumes, and `hosts` the names that it resolves.
    """

    def __init__(
        self,
        workload: Object,
        network: Network,
        folder: Path,
        *,
        volumes: dict[str, Path],
        hosts: Path,
        cpus: str,
    ) -> None:
        self._spec = pod_of(workload)["spec"]
        self._container = container_of(workload)
        self._network = network
        self.host: Host = network.add()
        folder.mkdir()
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("nsenter", f"--net={self.host.path}"),
                    *("unshare", "--mount", "--propagation", "private"),
                    *("sh", "-ec", self._script(folder, volumes, hosts, cpus)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
                env=self._environment(),
            )

    def ready(self) -> bool:
        """What its readiness probe finds."""
        return self._probe(self._container["readinessProbe"])

    def alive(self) -> bool:
        """What its liveness probe finds; without one, whether the container runs."""
        if "livenessProbe" not in self._container:
            return self._process.poll() is None
        return self._probe(self._container["livenessProbe"])

    def stop(self) -> int:
        """As a kubelet does it; the exit status. Raises `TimeoutExpired` if it takes too long."""
        if "lifecycle" in self._container:
            assert self._run(self._container["lifecycle"]["preStop"]["exec"]["command"])
        self._process.terminate()
        return self._process.wait(self._spec["terminationGracePeriodSeconds"])

    def kill(self) -> None:
        """Whatever it does."""
        if self._process.poll() is None:
            for process in family(self._process.pid):
                process.kill()
        self._process.wait(_TERM_S)

    def _script(self, folder: Path, volumes: dict[str, Path], hosts: Path, cpus: str) -> str:
        root = folder / "root"
        root.mkdir()
        mounts, tops = [], []
        for mount in self._container["volumeMounts"]:
            inside = mount["mountPath"]
            tops.append(inside.split("/")[1])
            outside = volumes.get(mount["name"]) or folder / mount["name"]
            outside.mkdir(exist_ok=True)
            mounts.append(f"mkdir -p {root}{inside}; mount --bind {outside} {root}{inside}")
            if mount.get("readOnly"):
                mounts.append(f"mount -o remount,bind,ro {root}{inside}")
        # The image: what runs here, though it may be in a folder that a volume has covered.
        for image in {ROOT, Path(sys.prefix).resolve()}:
            mounts.append(f"mkdir -p {root}{image}; mount --rbind {image} {root}{image}")
        command = [sys.executable, "-m", *self._container["args"]]
        kept = "".join(f"|{top}" for top in tops)
        return "\n".join(
            [
                _ROOT.format(root=root, hosts=hosts),
                *mounts,
                _READ_ONLY.format(root=root, volumes=kept),
                _RUN.format(root=root, cpus=cpus, command=shlex.join(command)),
            ]
        )

    def _environment(self) -> dict[str, str]:
        """The image's, and the manifest's."""
        image = {"HOME": "/tmp", "XDG_CACHE_HOME": "/cache", "PYTHONUNBUFFERED": "1"}
        path = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        given = {item["name"]: item["value"] for item in self._container.get("env", [])}
        return {**path, **image, **given}

    def _probe(self, probe: dict[str, Any]) -> bool:
        if self._process.poll() is not None:
            return False
        if "exec" in probe:
            return self._run(probe["exec"]["command"])
        asked = probe["httpGet"]
        (port,) = (p for p in self._container["ports"] if p["name"] == asked["port"])
        with self._network.threads(1) as thread:
            return thread.submit(
                self._answers, port["containerPort"], asked["path"], probe["timeoutSeconds"]
            ).result()

    def _answers(self, port: int, path: str, timeout_s: float) -> bool:
        connection = http.client.HTTPConnection(self.host.address, port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            return 200 <= connection.getresponse().status < 400
        except OSError:
            return False
        finally:
            connection.close()

    def _run(self, command: list[str]) -> bool:
        """Whether a command in the container succeeds."""
        inside = ["nsenter", f"--target={self._process.pid}", "--mount", "--net", "--root", "--wd"]
        return subprocess.run([*inside, *command], check=False, timeout=60).returncode == 0
