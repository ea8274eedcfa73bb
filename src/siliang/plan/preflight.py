"""The plan before a run starts: it is shown, and a run that does not fit is refused or, if allowed, changed."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.distributed.device_mesh import DeviceMesh

from siliang.check import CheckInput
from siliang.config import RunConfig
from siliang.engine.splits import mixing_of_run, result_of_a_split
from siliang.language import Bilingual, both, local
from siliang.plan.device import Device, for_this_process, share_memory, target_device
from siliang.plan.history import record_work
from siliang.plan.kept import KeptPlan, content_key, keep_plan, may_be_ample, read_plan, run_key
from siliang.plan.methods import plan
from siliang.records import Category, Change, MethodPlan, Predicted, Record
from siliang.safety.safe_yaml import parse_yaml
from siliang.types import PlanError
from siliang.units import show_bytes

FIT_MAY_CHANGE = ("train.batch_size", "train.gradient_accumulation", "train.memory_budget")


class Planner:
    """Plans runs before they start in this process. Runs that differ only in their seed are planned once.

    Attributes:
        device: The device to plan for; None for this machine's own.
        last_plan: The last plan. It may be that of a run that differs in its seed.
    """

    def __init__(self, device: Device | None = None) -> None:
        self.device = device
        self.last_plan: MethodPlan | None = None
        self._before_bytes, self._is_own = 0, True
        self._cache: dict[str, KeptPlan] = {}

    def __call__(
        self, config: RunConfig, subject: CheckInput, say: Callable[[str], None], mesh: DeviceMesh | None = None
    ) -> tuple[RunConfig, Predicted]:
        """Prints the run's predicted memory.

        Args:
            subject: The run's data, which has been read.
            mesh: The run's ranks, if it has several.

        Returns:
            The config, with the changes that it needs to fit, if `train.fit` allows them, and with the strategy of
            several ranks; and the prediction, comparable with the record's measurement. If no plan can be made, a line
            says so, the run continues, and the prediction is empty.

        Raises:
            PlanError: The run will not fit.
        """
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device = self.device or for_this_process(share_memory(target_device(config), processes))
        # CUDA's allocator does not count the context
        uncounted = device.process_bytes if device.kind == "cuda" else 0
        self._before_bytes, self.last_plan = device.process_bytes - uncounted, None
        found = self._find(config, subject, device, mesh)
        if found.plan.error:
            # a fault of the run will stop it soon
            say(both(f"memory     {found.plan.error}", f"内存       {local(found.plan.error)}"))
            return config, Predicted()
        planned = self.last_plan = _with_overhead_of(found, device)
        self._is_own = found.seed == config.train.seed
        self._cache[run_key(config)] = KeptPlan(plan=planned, process_bytes=device.process_bytes, seed=found.seed)
        if planned.strategy:
            config = config.with_strategy(planned.strategy)
        config = apply_plan(config, planned, device, say)
        parts = {**planned.parts, "overhead": planned.overhead_bytes - uncounted}
        return config, Predicted(parts, planned.loading_bytes - uncounted)

    def _find(self, config: RunConfig, subject: CheckInput, device: Device, mesh: DeviceMesh | None) -> KeptPlan:
        """The plan of this process, of an earlier one, or a new one."""
        found = self._cache.get(run_key(config))
        if found is not None and found.plan.fits is not False:
            return found
        # a budget in bytes counts the memory of the process, which is never twice the same
        keeps = mesh is None and not isinstance(config.train.memory_budget, int) and may_be_ample(device)
        key = content_key(config, subject, device) if keeps else None
        if key is not None and (kept := read_plan(key, device)) is not None:
            return kept
        planned = plan(
            config,
            device,
            data=subject.prepared,
            invented=subject.invented,
            base_config=subject.model_config,  # what is loaded, whatever its name
            timed=False,
            mesh=mesh,
            training_only=True,
        ).methods[0]
        made = KeptPlan(plan=planned, process_bytes=device.process_bytes, seed=config.train.seed)
        if key is not None:
            keep_plan(key, made, device)
        return made

    def calibrate(self, record: Record) -> None:
        """Stores the measured overhead of this run for later plans.

        Not where the plan is that of another seed: the difference would be that of two heaviest steps, too.
        """
        if self.last_plan is not None and self._is_own:
            tensors = self.last_plan.tensor_bytes
            record_work(record.device.name, record.memory.steps_bytes - self._before_bytes - tensors)


def _with_overhead_of(found: KeptPlan, device: Device) -> MethodPlan:
    """The plan with the device's present overhead instead of that at the time of planning."""
    planned = found.plan
    more, process = device.overhead_bytes - planned.overhead_bytes, device.process_bytes - found.process_bytes
    changed = {"overhead_bytes": device.overhead_bytes, "peak_bytes": planned.peak_bytes + more}
    changed["loading_bytes"] = planned.loading_bytes + process
    return planned.model_copy(update=changed)


# The parts of records/plan.py.
PARTS: dict[Category, str] = {
    "weights": "权重",
    "trained": "训练的参数",
    "gradients": "梯度",
    "optimizer": "优化器",
    "activations": "激活值",
    "frozen": "缓存的冻结层输出",
    "logits": "logits",
    "workspace": "临时张量",
}


def apply_plan(config: RunConfig, planned: MethodPlan, device: Device, say: Callable[[str], None]) -> RunConfig:
    """Prints that a run fits, or makes it fit.

    Raises:
        PlanError: It does not fit, and may not be changed.
    """
    available, where, needed = in_memory(device), _where(planned), show_bytes(planned.needed_bytes)
    if planned.fits is not False:
        recomputed, phases = Bilingual("", ""), Bilingual("", "")
        if n := planned.recomputed_layers:
            recomputed = Bilingual(
                f", {n} of {planned.layers} layers recomputing", f"，{planned.layers} 层中有 {n} 层重新计算"
            )
        if planned.loading_bytes > planned.peak_bytes:
            load, steps = show_bytes(planned.loading_bytes), show_bytes(planned.peak_bytes)
            phases = Bilingual(f"loading {load}, the steps {steps}: ", f"加载时 {load}，训练时 {steps}：")
        parts = _parts(planned)
        say(
            both(
                f"memory     about {needed} of {available}{where}{recomputed} ({phases}{parts})",
                f"内存       {where.zh}约需 {needed}，{available.zh}{recomputed.zh}（{phases.zh}{parts.zh}）",
            )
        )
        return config
    result = _result_of_fit(config, planned)
    if config.train.fit and planned.fit is not None and result is not None:
        changed = with_changes(config, planned.fit.changes)
        more = 100 * (planned.fit.time_factor - 1)
        slower = Bilingual(f", {more:.0f}% more time", f"，用时增加 {more:.0f}%") if more > 0.5 else Bilingual("", "")
        before, after, changes = (
            show_bytes(planned.peak_bytes),
            show_bytes(planned.fit.peak_bytes),
            in_words(planned.fit.changes),
        )
        say(
            both(
                f"memory     about {before} of {available} do not fit; {changes}: {after}{slower}, with {result}",
                f"内存       约需 {before}，{available.zh}，放不下；改用 {changes}：{after}{slower.zh}，{result.zh}",
            )
        )
        planned.peak_bytes, planned.parts = planned.fit.peak_bytes, planned.fit.parts
        return changed
    details, advice = _parts(planned), _advice(planned, result)
    if planned.loading_bytes > planned.peak_bytes:
        load, steps = show_bytes(planned.loading_bytes), show_bytes(planned.peak_bytes)
        details = Bilingual(f"loading {load}, the steps {steps}", f"加载时 {load}，训练时 {steps}")
    raise PlanError(
        Bilingual(
            f"This run needs about {needed}{where}, and the device has {available}: {details}.\n{advice}",
            f"这次训练{where.zh}约需 {needed}，{available.zh}：{details.zh}。\n{advice.zh}",
        )
    )


def in_memory(device: Device) -> Bilingual:
    """The memory of the device, in words."""
    if not device.memory_bytes:
        return Bilingual("an unknown size", "可用大小未知")
    size = show_bytes(device.memory_bytes)
    if device.memory_source == "free here":
        return Bilingual(f"{size} free here", f"本机有 {size} 可用")
    return Bilingual(f"{size} as asked", f"按设置有 {size}")


def _where(planned: MethodPlan) -> Bilingual:
    if planned.strategy == "fsdp":
        return Bilingual(" on each device, weights sharded (fsdp)", "每个设备（权重分片，fsdp）")
    return Bilingual(" on each device", "每个设备") if planned.strategy else Bilingual("", "")


def with_changes(config: RunConfig, changes: list[Change]) -> RunConfig:
    """The config with these changes made."""
    values = config.model_dump(mode="json")
    for change in changes:
        *sections, last = change.setting.split(".")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[last] = parse_yaml(change.after)
    return RunConfig.build(values)


def in_words(changes: list[Change]) -> str:
    """The changes as arguments of --set."""
    return " ".join(f"{change.setting}={change.after}" for change in changes)


def _parts(planned: MethodPlan) -> Bilingual:
    largest = sorted(planned.parts, key=lambda name: -planned.parts[name])[:3]
    parts: list[tuple[Category, str]] = [
        (name, show_bytes(planned.parts[name])) for name in largest if planned.parts[name]
    ]
    shown = ", ".join(f"{name} {size}" for name, size in parts)
    shown_zh = "、".join(f"{PARTS[name]} {size}" for name, size in parts)
    return Bilingual(shown, shown_zh)


def _result_of_fit(config: RunConfig, planned: MethodPlan) -> Bilingual | None:
    """What the changes that make a run fit do to its result; None where train.fit may not make them."""
    if planned.fit is None or any(change.setting not in FIT_MAY_CHANGE for change in planned.fit.changes):
        return None
    splits = any(change.setting == "train.batch_size" for change in planned.fit.changes)
    return result_of_a_split(mixing_of_run(config) if splits else [])


def _advice(planned: MethodPlan, result: Bilingual | None) -> Bilingual:
    if planned.fit is None:
        return Bilingual(
            "No setting makes it fit: use a smaller model, or another method (`siliang plan --method all`).",
            "怎样调整设置都放不下：请换更小的模型，或换一种方法（`siliang plan --method all`）。",
        )
    size, changes = show_bytes(planned.fit.peak_bytes), in_words(planned.fit.changes)
    same, same_zh = "", ""
    if result is not None:
        same, same_zh = (
            f", with {result}; or let train.fit=true do it",
            f"，{result.zh}；也可设 train.fit=true 自动调整",
        )
    return Bilingual(f"It fits ({size}) with {changes}{same}.", f"这样设置就放得下（{size}）：{changes}{same_zh}。")
