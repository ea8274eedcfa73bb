"""What our trainer takes over from transformers' Trainer is still there, under the same name."""

import inspect

from transformers import Trainer

from siliang.train.trainer import SiliangTrainer

OWN = {
    "_forward_backward",
    "_of_all_ranks",
    "_as_many",
    "_smaller",
    "_sums",
    "_whole_state",
    "_optimizer_state",
    "_keep_frozen",
    "metrics_now",
    "go_on",
}


def test_each_override_is_called_by_the_trainer() -> None:
    """Under a new name in transformers an override would never be called, and the Trainer's own would be."""
    methods = {name: f for name, f in vars(SiliangTrainer).items() if inspect.isfunction(f) and name != "__init__"}
    assert set(methods) >= OWN
    assert not [name for name in OWN if hasattr(Trainer, name)]  # an override that nobody meant
    source = inspect.getsource(inspect.getmodule(Trainer))  # type: ignore[arg-type]
    for name, ours in methods.items():
        if name in OWN:
            continue
        assert callable(getattr(Trainer, name, None)), name
        assert f"self.{name}" in source or not name.startswith("_"), name
        theirs = inspect.signature(getattr(Trainer, name)).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(ours).parameters.values())
        if not open_ended:
            assert list(inspect.signature(ours).parameters) == list(theirs), name
