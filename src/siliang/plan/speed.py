"""The time of a planned step: its floating-point operations over the speed of the device."""

from __future__ import annotations

from transformers import PretrainedConfig

from siliang.language import Bilingual
from siliang.plan.device import EFFICIENCY, Device, measure_flops
from siliang.records import PlanRecord


def add_times(record: PlanRecord, device: Device, base_config: PretrainedConfig) -> None:
    """Adds speeds and times to a plan, if the device's speed can be measured here or is given by the user."""
    if device.flops:
        flops, source = device.flops, Bilingual("as asked", "按设置")
    elif device.here:
        text = base_config.get_text_config()
        width = text.hidden_size
        inner = getattr(text, "intermediate_size", None) or 4 * width
        rows = min(max(record.batch_tokens, 16), 1024)
        flops = measure_flops(device.precision.dtype, rows, width, int(inner))
        source = Bilingual("measured here", "在本机测得")
    else:
        return
    speed, share = flops / 1e9, 100 * EFFICIENCY
    record.rate = Bilingual(
        f"{speed:,.0f} GFLOP/s {source}, of which a step reaches {share:.0f}%",
        f"{speed:,.0f} GFLOP/s（{source.zh}），训练时按其 {share:.0f}% 计",
    )
    for one in record.methods:
        if one.flops_per_token:
            one.tokens_per_s = flops * EFFICIENCY / (one.flops_per_token * one.time_factor)
            if record.tokens_per_epoch is not None:
                one.epoch_s = record.tokens_per_epoch / one.tokens_per_s
