"""`--devices N`: starts a training's processes on this machine, with torch's own launcher."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid

from siliang.language import Bilingual
from siliang.terminal import shell_command
from siliang.types import RankError

REPORTED = (2, 130)  # exit codes of processes that have printed their error themselves


def launch(devices: int, arguments: list[str], folder: str) -> int:
    """Runs `siliang` with these arguments in several processes.

    Args:
        devices: How many processes.
        folder: The run's folder, for the error.

    Returns:
        0, or the exit code of the first process that failed.

    Raises:
        RankError: A process was killed, or crashed.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // devices)))
    with tempfile.TemporaryDirectory(prefix="siliang-ranks-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            # -P: no module of the current folder is imported
            elastic_launch(config, sys.executable)("-u", "-P", "-m", "siliang", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode in REPORTED:
                return failure.exitcode
            code, command = failure.exitcode, shell_command("siliang", "train", "--resume", folder)
            killed = Bilingual(f"was killed by signal {-code}", f"被信号 {-code} 杀死")
            how = killed if code < 0 else Bilingual("crashed", "出错退出")
            raise RankError(
                Bilingual(
                    f"Rank {rank} of {devices} {how} (process {failure.pid}), and the run ended with it. What was "
                    f"saved before is whole.\nResume, with any number of devices: {command}",
                    f"第 {rank} 号进程（共 {devices} 个，进程号 {failure.pid}）{how.zh}，训练随之结束。此前保存的内容"
                    f"是完整的。\n继续训练，设备数不限：{command}",
                )
            ) from None
        except SignalException:
            return 130
    return 0
