"""The memory plan: runs the training step on fake tensors before anything is loaded, and finds changes with which the
run fits."""

from siliang.callable_packages import make_callable
from siliang.plan.device import Device, target_device
from siliang.plan.fake_run import Baseline, FakeRun
from siliang.plan.methods import plan
from siliang.plan.shapes import SHAPES, model_config
from siliang.records import Change, Fit, MethodPlan, PlanRecord

__all__ = [
    "SHAPES",
    "Baseline",
    "Change",
    "Device",
    "FakeRun",
    "Fit",
    "MethodPlan",
    "PlanRecord",
    "model_config",
    "plan",
    "target_device",
]

make_callable(__name__)
