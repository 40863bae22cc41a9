"""A Slurm of one node on this machine while a ``with`` lasts: its own munge, ports and folders, no root needed."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Return the programs that are not installed (Debian: slurm-wlm and munge)."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


@contextlib.contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[None]:
    """Start munged, slurmctld and slurmd, set ``SLURM_CONF``, and end them again."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            control_port=_free_port(),
            node_port=_free_port(),
            cpus=cpus,
        )
    )
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ.update(SLURM_CONF=str(conf), PATH=_path())
    processes: list[subprocess.Popen[bytes]] = []
    try:
        files = ("pid-file", "log-file", "seed-file")
        munge = [f"--{name}={folder}/munge.{name}" for name in files]
        munge += [f"--key-file={key}", f"--socket={folder}/munge.socket", "--foreground", "--force"]
        for words in (["munged", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            with open(folder / f"{words[0]}.out", "wb") as output:
                processes.append(subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT))
            time.sleep(0.5)
        _wait_until_idle(folder, processes)
        yield
    finally:
        _empty_the_queue()
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _empty_the_queue() -> None:
    """Cancel what is left, and wait for it: processes of a job would outlive their daemons."""
    subprocess.run(["scancel", "--me"], capture_output=True)
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        left = subprocess.run(["squeue", "--me", "-h"], capture_output=True, text=True)
        if left.returncode or not left.stdout.strip():
            return
        time.sleep(0.5)


def _wait_until_idle(folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout.strip()
        if state == "idle":
            return
        time.sleep(0.5)
    told = "\n".join(
        f"== {path.name}\n{path.read_text()[-2000:]}" for path in [*folder.glob("*.out"), *folder.glob("*.log")]
    )
    raise RuntimeError(f"expected an idle Slurm node within a minute; its programs said:\n{told}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
