"""Joins a Ray cluster, or starts Ray on this machine."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
from typing import Any

import ray

from siliang.language import Bilingual, local
from siliang.types import ClusterError, first_line

LOCAL = "local"  # in place of an address: a Ray of our own on this machine
PROBE_S = 45.0  # for a cluster to respond
CONNECT_S = 5.0  # to connect to its machine
STORE_BYTES = 2**27  # object store of a Ray of our own: few files go through it
PROBE = """
import logging, sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except Exception as error:
    sys.exit(str(error).strip().splitlines()[0])
"""


def check(address: str) -> str:
    """Returns the address to join, after a cluster has responded there.

    Raises:
        ClusterError: It cannot be joined.
    """
    if address == LOCAL:
        address = os.environ.get("RAY_ADDRESS") or LOCAL
    if address != LOCAL and not ray.is_initialized():
        _probe(address)
    return address


def start(address: str, threads: int) -> bool:
    """Joins the cluster, or starts Ray without dashboard and telemetry. False if this process has joined a cluster
    before; that one stays as it is.

    Args:
        threads: Of Ray on this machine, if there is no card.

    Raises:
        ClusterError: Ray cannot be started or joined.
    """
    if ray.is_initialized():
        return False
    import torch

    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        settings |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        if not torch.cuda.is_available():
            settings |= {"num_cpus": threads, "num_gpus": 0}
    try:
        # Ray's processes import from a working_dir, or else from the current folder: this one is empty
        with tempfile.TemporaryDirectory() as empty:
            ray.init(**settings, runtime_env={"working_dir": empty})
    except Exception as error:  # Ray raises kinds of its own for each thing that it lacks
        where = (
            Bilingual("started here", "在本机启动 Ray")
            if address == LOCAL
            else Bilingual(f"used at {address}", f"使用 {address} 的 Ray")
        )
        raise ClusterError(
            Bilingual(
                f"Ray cannot be {where}: {first_line(error, kind=True)}",
                f"无法{where.zh}：{local(first_line(error, kind=True), 'zh')}",
            )
        ) from error
    return True


def _probe(address: str) -> None:
    """Joins the cluster in a process of its own, which may hang or crash in place of this one.

    Raises:
        ClusterError: It cannot be joined.
    """
    if "://" in address:
        raise ClusterError(
            Bilingual(
                f"--ray {address}: siliang does not work through a Ray client. Give HOST:PORT of the "
                "cluster's head, on a "
                "machine that `ray start --address HOST:PORT` has made part of it.",
                f"--ray {address}：siliang 不支持 Ray 客户端。请给出集群主节点的 HOST:PORT，"
                "并在已用 `ray start --address HOST:PORT` 加入集群的机器上运行。",
            )
        )
    command = [sys.executable, "-P", "-c", PROBE, address]
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would try for a minute
            socket.create_connection((host, int(port)), CONNECT_S).close()
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        why: str = Bilingual(
            f"no Ray cluster has responded within {PROBE_S:.0f} s.", f"{PROBE_S:.0f} 秒内没有 Ray 集群应答。"
        )
    except OSError as error:
        why = f"{error.strerror or error}."
    else:
        if done.returncode == 0:
            return
        why = (
            done.stderr.strip().splitlines()
            or [Bilingual(f"it ended with code {done.returncode}", f"它以代码 {done.returncode} 结束")]
        )[-1]
        if "InvalidAuthToken" in done.stderr:
            why = Bilingual(
                "it requires its token: copy ~/.ray/auth_token from the cluster's head to this machine.",
                "集群需要令牌：请把主节点的 ~/.ray/auth_token 复制到本机。",
            )
    raise ClusterError(
        Bilingual(
            f"--ray {address}: no Ray cluster can be joined there: {why}\n"
            "Look at `ray status` on this machine; `--ray` alone starts Ray on this machine.",
            f"--ray {address}：无法加入该处的 Ray 集群：{local(why, 'zh')}\n"
            "请在本机查看 `ray status`；单独使用 `--ray` 则在本机启动 Ray。",
        )
    )
