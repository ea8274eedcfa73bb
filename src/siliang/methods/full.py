"""Full fine-tuning: every parameter of the base model is trained, and nothing is attached."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.method import Method, Parts


class Full(Method[PeftConfig]):
    """Every parameter. It has no adapter, and so no config: the run trains the model itself."""

    name = "full"
    config = None
    learning_rate = 3e-5
    learning_rate_source = Bilingual(
        "Devlin et al. 2018, appendix A.3: 2e-5 to 5e-5",
        "Devlin 等 2018，附录 A.3：2e-5 至 5e-5",
    )
    trains = Bilingual("every parameter", "全部参数")
    freezes_the_base = False
    why_not_mergeable = Bilingual(
        "After full fine-tuning there is no adapter to merge: the run's model is the tuned one.",
        "全参数微调之后没有可合并的适配器：运行中的模型就是微调后的模型。",
    )

    def attach(self, model: nn.Module, config: PeftConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        raise AssertionError("full fine-tuning attaches nothing")
