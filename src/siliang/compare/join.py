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

LOCAL = "local"  # instead of an address: start Ray on this machine
PROBE_S = 45.0  # timeout for a cluster to respond
CONNECT_S = 5.0  # timeout for a TCP connection to its head
STORE_BYTES = 2**27  # object store of a Ray started here: few files go through it
PROBE = """
import logging, sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except Exception as error:
    sys.exit(str(error).strip().splitlines()[0])
"""


def check_address(address: str) -> str:
    """Returns the address to join, after a cluster has responded at it.

    Raises:
        ClusterError: No cluster can be joined at the address.
    """
    if address == LOCAL:
        address = os.environ.get("RAY_ADDRESS") or LOCAL
    if address != LOCAL and not ray.is_initialized():
        _probe(address)
    return address


def connect(address: str, threads: int) -> bool:
    """Joins the cluster, or starts Ray without dashboard and telemetry. Returns False and does nothing if this process
    has joined a cluster before.

    Args:
        threads: The CPUs of a Ray that is started here without a GPU.

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
        # without a working_dir, Ray's processes import from the current folder: give them an empty one
        with tempfile.TemporaryDirectory() as empty:
            ray.init(**settings, runtime_env={"working_dir": empty})
    except Exception as error:  # Ray has many exception classes without a common base
        where = (
            Bilingual("started on this machine", "在本机启动 Ray")
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
    """Joins the cluster in a separate process, because joining may hang or crash.

    Raises:
        ClusterError: The cluster cannot be joined.
    """
    if "://" in address:
        raise ClusterError(
            Bilingual(
                f"--ray {address}: siliang does not support the Ray client. Run it on a machine that has joined "
                "the cluster with `ray start --address HOST:PORT`, and give HOST:PORT of the cluster's head.",
                f"--ray {address}：siliang 不支持 Ray 客户端。请给出集群主节点的 HOST:PORT，"
                "并在已用 `ray start --address HOST:PORT` 加入集群的机器上运行。",
            )
        )
    command = [sys.executable, "-P", "-c", PROBE, address]
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself retries for a minute
            socket.create_connection((host, int(port)), CONNECT_S).close()
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        why: str = Bilingual(
            f"no Ray cluster responded within {PROBE_S:.0f} s.", f"{PROBE_S:.0f} 秒内没有 Ray 集群应答。"
        )
    except OSError as error:
        why = f"{error.strerror or error}."
    else:
        if done.returncode == 0:
            return
        why = (
            done.stderr.strip().splitlines()
            or [Bilingual(f"the probe ended with code {done.returncode}", f"探测进程以代码 {done.returncode} 结束")]
        )[-1]
        if "InvalidAuthToken" in done.stderr:
            why = Bilingual(
                "the cluster needs its token: copy ~/.ray/auth_token from the cluster's head to this machine.",
                "集群需要令牌：请把主节点的 ~/.ray/auth_token 复制到本机。",
            )
    raise ClusterError(
        Bilingual(
            f"--ray {address}: the Ray cluster cannot be joined: {why}\n"
            "Run `ray status` on this machine; `--ray` without an address starts Ray on this machine.",
            f"--ray {address}：无法加入该 Ray 集群：{local(why, 'zh')}\n"
            "请在本机运行 `ray status` 查看；`--ray` 不带地址则在本机启动 Ray。",
        )
    )
